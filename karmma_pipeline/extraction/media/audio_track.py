"""The sound track of a media file as one array, in its place on the file's clock.

PyAV decodes it: decord's, measured against PyAV's at three rates, put in samples between packets
(correlation 0.97) and took longer. Channels are averaged, as ``ffmpeg -ac 1`` does for stereo;
soxr resamples. S samples.
"""

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import av
import h5py
import numpy as np
import numpy.typing as npt
import soxr

from karmma_pipeline.data.manifest import SoundArray
from karmma_pipeline.extraction.media.container import StreamInfo, open_container
from karmma_pipeline.extraction.media.interface import (
    MediaFaultError,
    MediaReader,
    Sound,
    first_line,
)
from karmma_pipeline.extraction.media.pyav_video import until_end
from karmma_pipeline.modalities import Reason

Span = tuple[float, float]

QUALITY = "HQ"
RESAMPLING = f"channels averaged, soxr {QUALITY}"
"""How tracks are brought to the rate of the recipe, as stores record it."""

LONGEST_S = 48 * 3600
"""Seconds of sound beyond which a track is implausible."""

# A hole in a track that is longer is silence; a shorter one is rounding of time stamps.
_GAP_S = 0.05

# Seconds that are resampled at a time.
_CHUNK_S = 4


def read_track(path: Path, info: StreamInfo, rate: int) -> tuple[Sound, tuple[Span, ...]]:
    """Return a sound track, mono [S] at ``rate`` Hz, and its damaged spans.

    Spans are seconds from the track's start; there the track is silent.

    Raises:
        MediaFaultError: no sound in it can be read, or it claims an implausible length.
    """
    damaged: list[Span] = []
    native = info.rate or rate
    stream = soxr.ResampleStream(native, rate, 1, dtype="float32", quality=QUALITY)
    # One stream resamples all pieces, which is the same as resampling the whole; pieces bound the
    # memory of a long track's native samples.
    pieces, waiting, length = [], [], 0
    for piece in _pieces(path, info, native, damaged):
        waiting.append(piece)
        length += len(piece)
        if length >= _CHUNK_S * native:
            pieces.append(stream.resample_chunk(np.concatenate(waiting)))
            waiting, length = [], 0
    if not pieces and not length:
        raise MediaFaultError(Reason.DECODE_ERROR, f"{path}: no sound in its track")
    waiting.append(np.zeros(0, np.float32))
    pieces.append(stream.resample_chunk(np.concatenate(waiting), last=True))
    return np.concatenate(pieces), tuple(damaged)


def _pieces(path: Path, info: StreamInfo, native: int, damaged: list[Span]) -> Iterator[Sound]:
    """Yield the track bit by bit at its own rate, with silence where it has holes."""
    # What comes before zero is the encoder's run-in (priming), which the decoder drops itself.
    zero_s, length = max(0.0, info.first_s), 0
    with open_container(path) as container:
        stream = container.streams[info.index]
        if stream.codec_context is None:
            raise MediaFaultError(Reason.DECODE_ERROR, f"{path}: sound in an unknown codec")
        for packet in until_end(container.demux(stream)):
            try:
                frames = packet.decode()
            except (av.error.FFmpegError, ValueError):
                at = float((packet.pts or 0) * packet.time_base) - zero_s
                damaged.append((at, at + float((packet.duration or 0) * packet.time_base)))
                continue
            for frame in frames:
                start_s = length / native if frame.time is None else frame.time - zero_s
                if start_s > LONGEST_S or frame.sample_rate != native:
                    raise MediaFaultError(Reason.DECODE_ERROR, f"{path}: damaged sound")
                # A packet that is lost, or left out by a recorder, must not move what follows it.
                hole = round(start_s * native) - length
                if hole > _GAP_S * native:
                    yield np.zeros(hole, np.float32)
                    length += hole
                yield _mono(frame)
                length += frame.samples


def _mono(frame: Any) -> Sound:
    samples = frame.to_ndarray()
    channels = len(frame.layout.channels)
    if not frame.format.is_planar:
        samples = samples.reshape(-1, channels).T
    return as_float(samples).mean(axis=0) if channels > 1 else as_float(samples)[0]


def as_float(samples: npt.NDArray[Any]) -> Sound:
    """Return samples of any type as float32, full scale at +-1."""
    if samples.dtype.kind == "f":
        return samples.astype(np.float32, copy=False)
    full = float(2 ** (8 * samples.dtype.itemsize - 1))
    zero = full if samples.dtype.kind == "u" else 0.0
    return ((samples - zero) / full).astype(np.float32)


def cut(track: Sound, start_s: float, length_s: float, rate: int) -> Sound:
    """Return a window of a track [S], with silence where the track does not reach."""
    first, count = round(start_s * rate), max(1, round(length_s * rate))
    window = np.zeros(count, np.float32)
    low, high = max(first, 0), min(first + count, len(track))
    if high > low:
        window[low - first : high - first] = track[low:high]
    return window


class SoundArrayReader(MediaReader):
    """One track; read by windows, or as a whole where it must be resampled."""

    audio_decoder = "h5py"

    def __init__(self, source: SoundArray) -> None:
        self.source, self.path = source, source.path

    @property
    def audio_rate(self) -> int:
        """The track's own rate, Hz."""
        return self.source.rate

    def sound_span(self, rate: int) -> tuple[float, float]:
        """Return where the track starts and ends, seconds."""
        return 0.0, self._read(None, None) / self.source.rate

    def sound(self, start_s: float, stop_s: float, rate: int) -> Sound:
        """Return mono sound float32 [S] at ``rate`` Hz; outside the track it is silence.

        Raises:
            MediaFaultError: no such file or dataset, or it is refused or damaged.
        """
        if rate != self.source.rate:
            status = self.path.stat() if self.path.is_file() else None
            key = None if status is None else (status.st_size, status.st_mtime_ns)
            return cut(_resampled(self.source, rate, key), start_s, stop_s - start_s, rate)
        first, count = round(start_s * rate), max(1, round((stop_s - start_s) * rate))
        window = np.zeros(count, np.float32)
        low, high = max(first, 0), max(first + count, 0)
        samples = self._read(low, high)
        window[low - first : low - first + len(samples)] = samples
        return window

    def _read(self, low: int | None, high: int | None) -> Any:
        """Return samples ``low`` to ``high``, or without them the track's length."""
        source = self.source
        if not source.path.is_file():
            raise MediaFaultError(Reason.FILE_MISSING, str(source.path))
        try:
            with h5py.File(source.path, "r", locking=False) as file:
                track = _dataset(file, source)
                if high is None:
                    return len(track)
                return _samples(track[low:high])
        except (OSError, RuntimeError, KeyError, ValueError) as error:
            raise MediaFaultError(
                Reason.DECODE_ERROR, f"{source.path}: {first_line(error)}"
            ) from None


def _dataset(file: h5py.File, source: SoundArray) -> h5py.Dataset:
    # Step by step, as each may be a link into another file, which h5py would follow silently.
    where, at = f"{source.path}: {source.key!r}", file
    for part in source.key.strip("/").split("/"):
        link = at.get(part, getlink=True) if isinstance(at, h5py.Group) else None
        if link is None:
            raise MediaFaultError(Reason.NO_STREAM, f"{where}: not in the file")
        if not isinstance(link, h5py.HardLink):
            raise MediaFaultError(Reason.UNSAFE_FILE, f"{where}: a link")
        at = at[part]
    if not isinstance(at, h5py.Dataset):
        raise MediaFaultError(Reason.NO_STREAM, f"{where}: a group")
    if at.external or at.is_virtual:
        raise MediaFaultError(Reason.UNSAFE_FILE, f"{where}: kept in another file")
    if at.ndim != 1 or at.dtype.kind not in "iuf" or at.dtype.itemsize > 8:
        raise MediaFaultError(Reason.DECODE_ERROR, f"{where}: {at.shape} {at.dtype}, not samples")
    if len(at) > LONGEST_S * source.rate:
        raise MediaFaultError(Reason.UNSAFE_FILE, f"{where}: {len(at)} samples")
    if at.chunks and at.chunks[0] * at.dtype.itemsize > 1 << 30:
        raise MediaFaultError(Reason.UNSAFE_FILE, f"{where}: chunks of {at.chunks[0]} samples")
    return at


def _samples(stored: Any) -> Sound:
    samples = as_float(stored)
    if not np.isfinite(samples).all():
        raise ValueError("NaN or infinity in the samples")
    return samples


@lru_cache(maxsize=1)
def _resampled(source: SoundArray, rate: int, _key: tuple[int, int] | None) -> Sound:
    track = SoundArrayReader(source)._read(0, LONGEST_S * source.rate)
    return np.asarray(soxr.resample(track, source.rate, rate, quality=QUALITY), np.float32)
