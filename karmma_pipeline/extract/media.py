"""Reads frames and sound of a media file at real times, on one clock for both.

The clock is a player's: zero where the first stream of the file starts. decord counts each
stream from its own start, so the difference is added here. T frames, S audio samples.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
import torch  # noqa: F401  (before decord, which crashes some CUDA builds otherwise)
from av.stream import Disposition

import decord  # isort: skip

from karmma_pipeline.extract.sampling import Times, covering
from karmma_pipeline.modalities import Reason

_CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,wav,flac,mp3,ogg"
"""Formats that hold media themselves; playlists, which open other files, are not among them."""

_PLAYLIST = re.compile(
    rb"\s*(#EXTM3U|ffconcat|<\?xml|<MPD|<smil|\[playlist\]|v=0\s)", re.IGNORECASE
)
"""How playlists begin: decord brings an older FFmpeg, which may know one where PyAV's does not."""

ROUNDING_S = 5e-4
"""A frame counts as shown from this much before its start: decord's times are float32, and an
annotation that names a frame's own start must get that frame."""

_AT_ONCE = 16
"""Full-size frames in memory at a time."""

Numbers = npt.NDArray[np.int64]
Frames = npt.NDArray[np.uint8]

decord.logging.set_level(decord.logging.QUIET)  # faults are reported as reasons


class MediaFaultError(Exception):
    """A stream cannot be had; carries the reason that goes into the store."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason.name.lower()}: {detail}")
        self.reason = reason


@dataclass(frozen=True)
class _Probe:
    video_delay_s: float | None
    audio_delay_s: float | None
    audio_rate: int | None


class MediaFile:
    """One file, opened lazily, decoded forward; close it by dropping it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @cached_property
    def _probe(self) -> _Probe:
        if not self.path.is_file():
            raise MediaFaultError(Reason.FILE_MISSING, str(self.path))
        name = f"file:{self.path.absolute()}"
        try:
            with self.path.open("rb") as file:
                if _PLAYLIST.match(file.read(4096)):
                    raise MediaFaultError(Reason.DECODE_ERROR, f"{self.path}: a list, not a video")
            with av.open(name, options={"format_whitelist": _CONTAINERS}) as container:
                return self._look(container)
        except (av.error.FFmpegError, OSError, ValueError) as error:
            raise MediaFaultError(Reason.DECODE_ERROR, f"{self.path}: {error}") from None

    def _look(self, container: "av.container.InputContainer") -> _Probe:
        if any(s.codec_context is None for s in container.streams.video):
            raise MediaFaultError(Reason.DECODE_ERROR, f"{self.path}: damaged header")
        video, audio = (container.streams.best(kind) for kind in ("video", "audio"))
        if video is not None and video.disposition & Disposition.attached_pic:
            video = None  # the cover of a sound file
        starts = {
            # Sound before zero is the encoder's run-in, which decoders leave out.
            kind: max(0.0, float((s.start_time or 0) * (s.time_base or 0)))
            for kind, s in (("video", video), ("audio", audio))
            if s is not None
        }
        zero = min(starts.values(), default=0.0)
        delays = {kind: start - zero for kind, start in starts.items()}
        rate = getattr(audio, "sample_rate", None)
        return _Probe(delays.get("video"), delays.get("audio"), rate)

    @cached_property
    def _video(self) -> "tuple[decord.VideoReader, Times, float]":
        if self._probe.video_delay_s is None:
            raise MediaFaultError(Reason.NO_STREAM, f"{self.path}: no video stream")
        try:
            reader = decord.VideoReader(str(self.path.absolute()), ctx=decord.cpu(), num_threads=1)
            spans = reader.get_frame_timestamp(range(len(reader))).astype(np.float64)
        except (decord.DECORDError, RuntimeError, IndexError) as error:
            raise MediaFaultError(Reason.DECODE_ERROR, _first_line(error)) from None
        if not len(spans):
            raise MediaFaultError(Reason.DECODE_ERROR, f"{self.path}: no frame")
        order = np.maximum.accumulate(spans[:, 0]) + self._probe.video_delay_s
        return reader, order, float(spans[:, 1].max()) + self._probe.video_delay_s

    @property
    def video_stop_s(self) -> float:
        """End of the last frame, seconds."""
        return self._video[2]

    @property
    def frame_starts(self) -> Times:
        """Start of every frame, seconds [frames]."""
        return self._video[1]

    @property
    def audio_rate(self) -> int | None:
        """The track's own rate, Hz; None if the file does not say."""
        return self._probe.audio_rate

    def numbers(self, times: Times) -> Numbers:
        """Return which frame is shown at each moment, [T]."""
        return covering(self.frame_starts, times + ROUNDING_S)

    def decode(self, numbers: Numbers) -> Iterator[tuple[int, npt.NDArray[np.uint8]]]:
        """Yield frames by number in ascending order, each once: uint8 [H, W, 3], RGB.

        What a clip gets does not depend on what was read before it.

        Raises:
            MediaFaultError: they cannot be decoded.
        """
        reader = self._video[0]
        unique = np.unique(numbers)
        try:
            reader.seek(0)
            for first in range(0, len(unique), _AT_ONCE):
                some = unique[first : first + _AT_ONCE]
                yield from zip(some.tolist(), reader.get_batch(some).asnumpy(), strict=True)
            reader.seek(0)  # an idle reader would go on to fill its queue
        except (decord.DECORDError, RuntimeError) as error:
            self.__dict__.pop("_video", None)  # after an error it is of no more use to other clips
            raise MediaFaultError(Reason.DECODE_ERROR, _first_line(error)) from None

    def frames(self, times: Times) -> tuple[Frames, Times]:
        """Return the frames shown at the given moments and the moments at which they start.

        Args:
            times: seconds [T].

        Returns:
            uint8 [T, H, W, 3] in RGB, and seconds [T].

        Raises:
            MediaFaultError: no such stream, or it cannot be decoded.
        """
        wanted, starts = self.numbers(times), self.frame_starts
        decoded = dict(self.decode(wanted))
        return np.stack([decoded[n] for n in wanted.tolist()]), starts[wanted]

    def sound_span(self, rate: int) -> tuple[float, float]:
        """Return where the audio track starts and ends, seconds."""
        track = self._track(rate)  # first: it tells whether there is one
        start = self._probe.audio_delay_s or 0.0
        return start, start + len(track) / rate

    def sound(self, start_s: float, stop_s: float, rate: int) -> npt.NDArray[np.float32]:
        """Return mono sound float32 [S] at ``rate`` Hz; outside the track it is silence.

        Raises:
            MediaFaultError: no such stream, or it cannot be decoded.
        """
        track = self._track(rate)
        delay = self._probe.audio_delay_s or 0.0
        first, count = round((start_s - delay) * rate), max(1, round((stop_s - start_s) * rate))
        window = np.zeros(count, np.float32)
        low, high = max(first, 0), min(first + count, len(track))
        if high > low:
            window[low - first : high - first] = track[low:high]
        return window

    def _track(self, rate: int) -> npt.NDArray[np.float32]:
        if self._probe.audio_delay_s is None:
            raise MediaFaultError(Reason.NO_STREAM, f"{self.path}: no audio stream")
        status = self.path.stat()
        try:
            return _whole_track(str(self.path.absolute()), rate, status.st_size, status.st_mtime_ns)
        except (decord.DECORDError, RuntimeError, IndexError) as error:
            raise MediaFaultError(Reason.DECODE_ERROR, _first_line(error)) from None


@lru_cache(maxsize=1)  # tasks of one video follow one another, each with some of its clips
def _whole_track(path: str, rate: int, size: int, changed: int) -> npt.NDArray[np.float32]:
    reader = decord.AudioReader(path, ctx=decord.cpu(), sample_rate=rate, mono=True)
    track: npt.NDArray[np.float32] = reader[:].asnumpy()[0]
    return track


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
