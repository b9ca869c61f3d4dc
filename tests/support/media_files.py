"""Small media files with a frame counter and a timed click burnt in."""

from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np

CLOCK = 90_000
RATE = 16_000
BITS = 12
Maker = Callable[..., Path]


def counter_picture(number: int) -> np.ndarray:
    """A 48x96 picture that shows a number as 12 black or white blocks."""
    bits = [(number >> i) & 1 for i in range(BITS)]
    row = np.repeat(np.array(bits, np.uint8) * 220 + 16, 8)
    return np.repeat(np.tile(row, (48, 1))[..., None], 3, axis=2)


def read_counter(picture: np.ndarray) -> int:
    gray = picture[8:40].mean(axis=(0, 2)).reshape(BITS, 8)[:, 2:6].mean(axis=1)
    return sum(1 << i for i, level in enumerate(gray) if level > 128)


def panned(px: float) -> np.ndarray:
    """A 48x96 cut out of a texture that has moved to the right."""
    noise = np.random.default_rng(0).integers(0, 256, (16, 96, 3), np.uint8)
    texture = cv2.resize(noise, (384, 64), interpolation=cv2.INTER_CUBIC)
    moved = cv2.warpAffine(texture, np.array([[1, 0, px], [0, 1, 0]], np.float32), (384, 64))
    return np.ascontiguousarray(moved[8:56, 200:296])


def write_video(
    path: Path,
    times: Sequence[float] | None = None,
    seconds: float = 2.0,
    fps: float = 25,
    click_s: float | None = None,
    sound: bool = True,
    video: bool = True,
    video_delay_s: float = 0.0,
    pan_px_s: float | None = None,
) -> Path:
    """Write pictures at ``times`` or ``fps``: a counter, or a texture that moves to the right."""
    shown = np.arange(round(seconds * fps)) / fps if times is None else np.asarray(times)
    with av.open(str(path), "w") as container:
        stream = track = None
        if video:
            stream = container.add_stream("libx264", rate=25)
            stream.width, stream.height, stream.pix_fmt = 96, 48, "yuv420p"
            stream.time_base = stream.codec_context.time_base = Fraction(1, CLOCK)
        if sound:
            track = container.add_stream("aac", rate=RATE, layout="mono")
        if stream is not None:
            for number, t in enumerate(shown):
                picture = counter_picture(number) if pan_px_s is None else panned(pan_px_s * t)
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                frame.pts = round((t + video_delay_s) * CLOCK)
                frame.time_base = Fraction(1, CLOCK)
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        if track is not None:
            wave = np.zeros((1, round((seconds + video_delay_s) * RATE)), np.float32)
            if click_s is not None:
                at = round(click_s * RATE)
                wave[0, at : at + 80] = np.sin(np.arange(80) * 1.2)
            samples = av.AudioFrame.from_ndarray(wave, format="fltp", layout="mono")
            samples.sample_rate, samples.pts = RATE, 0
            container.mux(track.encode(samples))
            container.mux(track.encode())
    return path
