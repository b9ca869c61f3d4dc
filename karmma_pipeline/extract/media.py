"""Reads frames and sound of a media file at real times, on one clock for both.

The clock is a player's: zero where the first stream of the file starts. decord counts each
stream from its own start, so the difference is added here. T frames, S audio samples.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
import torch  # noqa: F401  (before decord, which crashes some CUDA builds otherwise)

import decord  # isort: skip

from karmma_pipeline.extract.sampling import Times, covering
from karmma_pipeline.modalities import Reason

_CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,wav,flac,mp3,ogg"
"""Formats that hold media themselves; playlists, which open other files, are not among them."""


ROUNDING_S = 1e-3
"""A frame counts as shown from this much before its start: decord's times are float32, and an
annotation that names a frame's own start must get that frame."""


class MediaFaultError(Exception):
    """A stream cannot be had; carries the reason that goes into the store."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason.name.lower()}: {detail}")
        self.reason = reason


@dataclass(frozen=True)
class _Probe:
    video_delay_s: float | None
    audio_delay_s: float | None
    audio_stop_s: float | None


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
            with av.open(name, options={"format_whitelist": _CONTAINERS}) as container:
                starts = {
                    kind: float((s.start_time or 0) * (s.time_base or 0))
                    for kind in ("video", "audio")
                    for s in getattr(container.streams, kind)[:1]
                }
                if any(s.codec_context is None for s in container.streams.video):
                    raise MediaFaultError(Reason.DECODE_ERROR, f"{self.path}: damaged header")
                whole_s = float((container.duration or 0) / av.time_base)
        except (av.error.FFmpegError, OSError, ValueError) as error:
            raise MediaFaultError(Reason.DECODE_ERROR, f"{self.path}: {error}") from None
        zero = min(starts.values(), default=0.0)
        delays = {kind: start - zero for kind, start in starts.items()}
        return _Probe(
            delays.get("video"), delays.get("audio"), whole_s if "audio" in starts else None
        )

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

    @cached_property
    def _audio(self) -> "dict[int, npt.NDArray[np.float32]]":
        return {}

    @property
    def video_stop_s(self) -> float:
        """End of the last frame, seconds."""
        return self._video[2]

    @property
    def sound_stop_s(self) -> float:
        """End of the audio track in seconds, as its container states it."""
        if self._probe.audio_stop_s is None:
            raise MediaFaultError(Reason.NO_STREAM, f"{self.path}: no audio stream")
        return self._probe.audio_stop_s

    def frames(self, times: Times) -> tuple[npt.NDArray[np.uint8], Times]:
        """Return the frames shown at the given moments and the moments at which they start.

        Args:
            times: seconds [T].

        Returns:
            uint8 [T, H, W, 3] in RGB, and seconds [T].

        Raises:
            MediaFaultError: no such stream, or it cannot be decoded.
        """
        reader, starts, _ = self._video
        wanted = covering(starts, times + ROUNDING_S)
        unique, back = np.unique(wanted, return_inverse=True)
        try:
            decoded = reader.get_batch(unique).asnumpy()
        except (decord.DECORDError, RuntimeError) as error:
            raise MediaFaultError(Reason.DECODE_ERROR, _first_line(error)) from None
        return decoded[back], starts[wanted]

    def sound(self, start_s: float, stop_s: float, rate: int) -> npt.NDArray[np.float32]:
        """Return mono sound float32 [S] at ``rate`` Hz; outside the track it is silence.

        Raises:
            MediaFaultError: no such stream, it cannot be decoded, or the whole window lies
                outside the track.
        """
        track = self._track(rate)
        delay = self._probe.audio_delay_s or 0.0
        first, count = round((start_s - delay) * rate), max(1, round((stop_s - start_s) * rate))
        window = np.zeros(count, np.float32)
        low, high = max(first, 0), min(first + count, len(track))
        if high <= low:
            raise MediaFaultError(Reason.OUT_OF_RANGE, f"{self.path}: no sound at {start_s:.2f} s")
        window[low - first : high - first] = track[low:high]
        return window

    def _track(self, rate: int) -> npt.NDArray[np.float32]:
        if self._probe.audio_delay_s is None:
            raise MediaFaultError(Reason.NO_STREAM, f"{self.path}: no audio stream")
        if rate not in self._audio:
            try:
                reader = decord.AudioReader(
                    str(self.path.absolute()), ctx=decord.cpu(), sample_rate=rate, mono=True
                )
                self._audio[rate] = reader[:].asnumpy()[0]
            except (decord.DECORDError, RuntimeError, IndexError) as error:
                raise MediaFaultError(Reason.DECODE_ERROR, _first_line(error)) from None
        return self._audio[rate]


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
