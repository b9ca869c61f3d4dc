"""The sound track of a media file, window by window, in its place on the file's clock.

PyAV decodes it from its start, so that a window is what a scan gives; no more than an hour of it
is kept. Channels are averaged, as ``ffmpeg -ac 1`` does for stereo; soxr resamples. Time stamps
say where sound belongs: a hole is silence, and what a clock that runs fast has too much is left
out. S samples.
"""

from collections import deque
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import av
import h5py
import numpy as np
import numpy.typing as npt
import soxr

from karmma_pipeline.data.sources import SoundArray
from karmma_pipeline.extraction.media.container import StreamInfo, open_container
from karmma_pipeline.extraction.media.interface import (
    MediaFaultError,
    MediaReader,
    Sound,
    first_line,
)
from karmma_pipeline.extraction.media.packet_index import check_clear, until_end
from karmma_pipeline.extraction.media.series_files import plain_dataset
from karmma_pipeline.modalities import Reason

Span = tuple[float, float]

QUALITY = "HQ"
#: How tracks are brought to the rate of the recipe, as stores record it.
RESAMPLING = f"channels averaged, soxr {QUALITY}"

#: Seconds of sound beyond which a track is implausible.
LONGEST_S = 48 * 3600

#: How far sound may be from its time stamps before it is put right; less is their rounding, s.
DRIFT_S = 0.03

# Time stamps that go back farther begin anew, as in sound files that were joined. Beside pictures
# that is left out, as a moment has one picture.
_JUMP_S = 10.0

# Seconds that are resampled at a time.
_CHUNK_S = 4

# Seconds of a track that are kept, at 24 kHz 350 MB.
_KEPT_S = 3600

# Planes of sound above which PyAV's planar arrays are wrong; packed ones are right.
_PLANES = 8


class SoundTrack:
    """One sound track, mono at a rate of one's choice; decoded forward, from the start if need be.

    Args:
        path: the file.
        info: of the stream.
        rate: Hz.
        kept_s: seconds before the newest that are kept; None: an hour.
    """

    def __init__(
        self, path: Path, info: StreamInfo, rate: int, kept_s: float | None = None
    ) -> None:
        self._path, self._info, self._rate = path, info, rate
        self._kept_s = _KEPT_S if kept_s is None else kept_s
        self._length: int | None = None
        self._fault: MediaFaultError | None = None
        self._begin()

    def _begin(self) -> None:
        self._damaged: list[Span] = []
        self._stream = _decoded(self._path, self._info, self._rate, self._damaged)
        self._pieces: deque[tuple[int, Sound]] = deque()  # with the number of their first sample
        self._at, self._fault = 0, None

    @property
    def length_s(self) -> float:
        """How long the track is, seconds.

        Raises:
            MediaFaultError: no sound in it can be read, or it claims an implausible length.
        """
        if self._length is None:
            self._read_to(None)
            self._length = self._at
        return self._length / self._rate

    def window(self, start_s: float, length_s: float) -> Sound:
        """Return sound [S] from a moment of the track on, with silence where it does not reach.

        Raises:
            MediaFaultError: it is damaged there.
        """
        first, count = round(start_s * self._rate), max(1, round(length_s * self._rate))
        if self._pieces and max(first, 0) < self._pieces[0][0]:
            self._begin()
        self._read_to(first + count, first)
        if any(start_s < stop and start_s + length_s > start for start, stop in self._damaged):
            raise MediaFaultError(Reason.DECODE_ERROR, f"{self._path}: damaged at {start_s:.2f} s")
        window = np.zeros(count, np.float32)
        for begin, piece in self._pieces:
            low, high = max(first, begin), min(first + count, begin + len(piece))
            if high > low:
                window[low - first : high - first] = piece[low - begin : high - begin]
        return window

    def _read_to(self, last: int | None, first: int | None = None) -> None:
        """Decode up to a sample, or to the end; forget what is older than is kept."""
        while last is None or self._at < last:
            # What ends the track ends it for every clip, whichever asks first.
            if self._fault is not None:
                raise self._fault
            try:
                piece = next(self._stream, None)
            except MediaFaultError as fault:
                self._fault = fault
                raise
            if piece is None:
                return
            self._pieces.append((self._at, piece))
            self._at += len(piece)
            oldest = self._at - round(self._kept_s * self._rate)
            needed = oldest if first is None else min(oldest, first)
            while self._pieces[0][0] + len(self._pieces[0][1]) <= needed:
                self._pieces.popleft()


def _decoded(path: Path, info: StreamInfo, rate: int, damaged: list[Span]) -> Iterator[Sound]:
    """Yield a track bit by bit, mono at ``rate`` Hz; damaged spans are silent, and noted.

    Raises:
        MediaFaultError: no sound in it can be read, or it claims an implausible length.
    """
    # One stream resamples all pieces, which is the same as resampling the whole; pieces bound the
    # memory. A track that changes its rate is resampled in as many streams.
    stream, native, waiting = None, 0, _Waiting()
    for own_rate, piece in _Timeline(path, info, rate, damaged).pieces():
        if own_rate != native:
            if stream is not None:
                yield stream.resample_chunk(waiting.taken(), last=True)
            native = own_rate
            stream = soxr.ResampleStream(native, rate, 1, dtype="float32", quality=QUALITY)
        waiting.put(piece)
        if waiting.length >= _CHUNK_S * native and stream is not None:
            yield stream.resample_chunk(waiting.taken())
    if stream is None:
        # A recorder that is muted may open a track and write nothing into it.
        reason = Reason.DECODE_ERROR if damaged or info.claimed else Reason.NO_STREAM
        raise MediaFaultError(reason, f"{path}: its audio track is empty")
    yield stream.resample_chunk(waiting.taken(), last=True)


class _Waiting:
    """Sound that waits to be resampled."""

    def __init__(self) -> None:
        self._pieces: list[Sound] = []
        self.length = 0

    def put(self, piece: Sound) -> None:
        self._pieces.append(piece)
        self.length += len(piece)

    def taken(self) -> Sound:
        """Return all of it, and keep none."""
        pieces, self._pieces, self.length = self._pieces, [], 0
        return np.concatenate([*pieces, np.zeros(0, np.float32)])


class _Timeline:
    """A track at its own rates, every piece of it where its time stamps put it."""

    def __init__(self, path: Path, info: StreamInfo, rate: int, damaged: list[Span]) -> None:
        self._path, self._stream, self._damaged = path, info.index, damaged
        self._may_begin_anew = info.alone
        # What comes before zero is the encoder's run-in (priming), which the decoder drops itself.
        self._zero_s = max(0.0, info.first_s)
        self._native, self._length = info.rate or rate, 0

    def pieces(self) -> Iterator[tuple[int, Sound]]:
        """Yield rate and samples, with silence where the track has holes."""
        for frame in self._frames():
            if frame.sample_rate != self._native:
                self._length = round(self._length * frame.sample_rate / self._native)
                self._native = frame.sample_rate
            hole = self._hole_before(frame)
            # A packet that is lost, or left out by a recorder, must not move what follows it.
            for at in range(0, hole, self._native):  # second by second: it may take a day
                yield self._counted(np.zeros(min(hole - at, self._native), np.float32))
            if -hole < frame.samples:
                yield self._counted(_mono(frame)[max(0, -hole) :])

    def _counted(self, piece: Sound) -> tuple[int, Sound]:
        self._length += len(piece)
        return self._native, piece

    def _hole_before(self, frame: Any) -> int:
        """Return how many samples are missing before a frame, or, negative, are too many."""
        if frame.time is None:
            return 0
        start_s = frame.time - self._zero_s
        if start_s > LONGEST_S:
            raise MediaFaultError(Reason.DECODE_ERROR, f"{self._path}: damaged audio")
        hole = round(start_s * self._native) - self._length
        if hole < -_JUMP_S * self._native and self._may_begin_anew:
            self._zero_s += hole / self._native
            return 0
        return hole if abs(hole) > DRIFT_S * self._native else 0

    def _frames(self) -> Iterator[Any]:
        with open_container(self._path) as container:
            stream = container.streams[self._stream]
            if stream.codec_context is None:
                raise MediaFaultError(
                    Reason.DECODE_ERROR, f"{self._path}: audio in an unknown codec"
                )
            set_order(stream.codec_context)
            for packet in until_end(container.demux(stream)):
                check_clear(packet, self._path)
                try:
                    yield from packet.decode()
                except (av.error.FFmpegError, ValueError):
                    at = float((packet.pts or 0) * packet.time_base) - self._zero_s
                    length_s = float((packet.duration or 0) * packet.time_base)
                    self._damaged.append((at, at + length_s))


def set_order(codec: Any) -> None:
    """Let channels that lie in an order of their own pass for the usual one: they are averaged.

    PyAV copies the map of such an order (7.1 in MOV and CAF) as a pointer, and each frame frees
    it once more. The object that is read here frees the codec's own, which nothing reads again.
    """
    own = codec.layout
    if "(" in own.name:
        codec.layout = f"{own.nb_channels}c"


def _mono(frame: Any) -> Sound:
    channels = len(frame.layout.channels)
    if frame.format.is_planar and channels >= _PLANES:
        (frame,) = av.AudioResampler(frame.format.packed.name, frame.layout).resample(frame)
    samples = frame.to_ndarray()
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
            tracks = _kept_tracks(self.source, key)
            if rate not in tracks:
                tracks[rate] = _resampled(self.source, rate)
            return cut(tracks[rate], start_s, stop_s - start_s, rate)
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
    where, at = f"{source.path}: {source.key!r}", plain_dataset(file, source.path, source.key)
    if at.ndim != 1 or at.dtype.kind not in "iuf" or at.dtype.itemsize > 8:
        raise MediaFaultError(
            Reason.DECODE_ERROR, f"{where}: expected mono samples [S], found {at.dtype} {at.shape}"
        )
    if len(at) > LONGEST_S * source.rate:
        raise MediaFaultError(Reason.UNSAFE_FILE, f"{where}: {len(at)} samples, too many")
    if at.chunks and at.chunks[0] * at.dtype.itemsize > 1 << 30:
        raise MediaFaultError(
            Reason.UNSAFE_FILE, f"{where}: chunks of {at.chunks[0]} samples, too large"
        )
    return at


def _samples(stored: Any) -> Sound:
    samples = as_float(stored)
    if not np.isfinite(samples).all():
        raise ValueError("NaN or infinity in the samples")
    return samples


@lru_cache(maxsize=1)
def _kept_tracks(source: SoundArray, _key: tuple[int, int] | None) -> dict[int, Sound]:
    return {}


def _resampled(source: SoundArray, rate: int) -> Sound:
    track = SoundArrayReader(source)._read(0, LONGEST_S * source.rate)
    return np.asarray(soxr.resample(track, source.rate, rate, quality=QUALITY), np.float32)
