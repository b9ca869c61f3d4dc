"""Writes frames and sound as a real H.264/AAC MP4 file, the same bytes for the same input."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt

from karmma_pipeline import files
from karmma_pipeline.data.sample.scene import SAMPLE_RATE, Frames, Sound

CLOCK = 90_000
"""Ticks per second of the video stream, fine enough for a variable frame rate."""


def write_video(
    path: Path,
    frames: Frames,
    times: npt.NDArray[np.float64],
    fps: Fraction,
    sound: Sound | None,
) -> None:
    """Write frames uint8 [T, H, W, 3] shown at ``times`` (seconds), and sound [S] if any."""
    with (
        files.replacing(path) as temporary,
        av.open(str(temporary), "w", format="mp4", options={"fflags": "+bitexact"}) as container,
    ):
        height, width = frames.shape[1:3]
        stream = container.add_stream("libx264", rate=fps, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"preset": "ultrafast", "crf": "20", "threads": "1", "flags": "+bitexact"}
        stream.time_base = stream.codec_context.time_base = Fraction(1, CLOCK)
        track = None
        if sound is not None:
            track = container.add_stream("aac", rate=SAMPLE_RATE, layout="mono")
            track.codec_context.options = {"flags": "+bitexact"}
        for image, t in zip(frames, times, strict=True):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = round(t * CLOCK), Fraction(1, CLOCK)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if track is not None and sound is not None:
            samples = av.AudioFrame.from_ndarray(sound[None], format="fltp", layout="mono")
            samples.sample_rate, samples.pts = SAMPLE_RATE, 0
            container.mux(track.encode(samples))
            container.mux(track.encode())
