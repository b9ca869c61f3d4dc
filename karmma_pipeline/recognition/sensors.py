"""What live sensors have sent: buffers that any thread fills, read as if they were media files.

A camera's pictures are resized and cropped as they come and the full-size picture is let go; sound
is kept at the sensor's own rate. Both hold little more than one window.

H and W a picture's size, S samples.
"""

import sys
import threading
import zlib
from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, gcd
from pathlib import Path

import numpy as np
import numpy.typing as npt
import soxr

from karmma_pipeline.errors import ConfigError
from karmma_pipeline.extraction.decode.flow import Motion, dis_flow
from karmma_pipeline.extraction.decode.frame_selection import DecodedFrames, FrameSelection
from karmma_pipeline.extraction.inference.recent import Recent
from karmma_pipeline.extraction.media.audio_track import DRIFT_S, QUALITY
from karmma_pipeline.extraction.media.interface import MediaReader, Sound
from karmma_pipeline.extraction.recipe import Flow
from karmma_pipeline.extraction.types import (
    ROUNDING_S,
    Numbers,
    Pictures,
    Times,
    covering,
    end_of,
)
from karmma_pipeline.models.backbones import FrameTransform

#: What stands in the place of a file in predictions.
CAMERA, MICROPHONE = Path("camera"), Path("microphone")

# Sound around a window that the filter of the resampling looks at.
_MARGIN_S = 0.05


def oldest(middle_s: float, keep_s: float) -> float:
    """Return from when on samples are kept, where nobody has said what the time is.

    Around the middle one of them, not back from the newest, lest one time stamp that has gone
    astray push out all that is good.

    Args:
        middle_s: time of the sample in the middle.
        keep_s: seconds that are kept.
    """
    return middle_s - keep_s / 2


@dataclass(frozen=True, slots=True)
class _Shot:
    """A picture as the networks want it; ``serial`` tells it from all others of its camera."""

    time_s: float
    serial: int
    digest: int
    pictures: Mapping[FrameTransform, Pictures]


def _time_of(shot: _Shot) -> float:
    return shot.time_s


class CameraView(MediaReader):
    """The pictures of a camera that concern one window.

    Args:
        shots: in the order of their times, at least one.
        stop_s: end of the window: the last picture stands until then.
    """

    video_decoder = "live"

    def __init__(self, shots: Sequence[_Shot], stop_s: float) -> None:
        self.path, self.shots = CAMERA, shots
        self._starts = np.array([shot.time_s for shot in shots])
        self._stop_s = max(stop_s, end_of(self._starts, 0.0))

    @property
    def frame_starts(self) -> Times:
        """When each picture was taken, seconds [pictures]."""
        return self._starts

    @property
    def stop_s(self) -> float:
        """End of the last picture, seconds."""
        return self._stop_s

    def numbers(self, times: Times) -> Numbers:
        """Return which picture is shown at each moment, [T]."""
        return covering(self._starts, times + ROUNDING_S)

    def covered_s(self, start_s: float, stop_s: float, longest_s: float) -> float:
        """Return for how many seconds of a span there is a picture, none longer than so many."""
        ends = np.append(self._starts[1:], np.inf)
        ends = np.minimum(ends, self._starts + longest_s)
        parts = np.minimum(ends, stop_s) - np.maximum(self._starts, start_s)
        return float(np.maximum(parts, 0.0).sum())

    @property
    def same_s(self) -> float:
        """For how many seconds the newest picture has come again and again."""
        last = self.shots[-1]
        same = last
        for shot in reversed(self.shots):
            if shot.digest != last.digest:
                break
            same = shot
        return last.time_s - same.time_s


class Camera:
    """Pictures of one camera; `push` from any thread.

    Args:
        transforms: what the networks want of a picture.
        keep_s: seconds that are kept where nobody reads; half of it may lie ahead of who does.

    Attributes:
        ignored: pictures that came too late, or from the future.
        newest_s: time of the newest picture that a window has met; None before the first.
    """

    def __init__(self, transforms: Iterable[FrameTransform], keep_s: float) -> None:
        self._transforms = tuple(dict.fromkeys(transforms))
        self._keep_s, self._lock = keep_s, threading.Lock()
        self._serial, self.ignored = 0, 0
        self.forget()

    def forget(self) -> None:
        """Begin anew."""
        with self._lock:
            self._shots: list[_Shot] = []
            self._low_s, self._high_s = -np.inf, sys.float_info.max
            self.newest_s: float | None = None

    def push(self, time_s: float, frame: npt.NDArray[np.uint8]) -> None:
        """Take over a picture, uint8 [H, W, 3] in RGB, shown from ``time_s`` on.

        Raises:
            ConfigError: it is no such array.
        """
        if not (isinstance(frame, np.ndarray) and frame.dtype == np.uint8 and frame.ndim == 3):
            raise ConfigError("push: a frame must be a uint8 array [H, W, 3], RGB.")
        if frame.shape[2] != 3 or not frame.size:
            raise ConfigError(f"push: a frame must be uint8 [H, W, 3], RGB; got {frame.shape}.")
        if not self._low_s <= time_s <= self._high_s:
            self.ignored += 1
            return
        frame = np.ascontiguousarray(frame)
        pictures = {of: of.apply(frame[None])[0] for of in self._transforms}
        digest = zlib.crc32(frame.data)
        with self._lock:
            self._serial += 1
            insort(self._shots, _Shot(time_s, self._serial, digest, pictures), key=_time_of)
            oldest_s = oldest(self._shots[len(self._shots) // 2].time_s, self._keep_s)
            del self._shots[: bisect_left(self._shots, oldest_s, key=_time_of)]

    def view(self, start_s: float, stop_s: float, now_s: float) -> CameraView | None:
        """Return what there is by now for a window, and forget what is older; None if nothing."""
        with self._lock:
            # A clock gone astray must not push out what is good.
            self._low_s, self._high_s = start_s, now_s + self._keep_s / 2
            # The picture that is shown as the window starts was taken before it.
            first = bisect_right(self._shots, start_s + ROUNDING_S, key=_time_of) - 1
            last = bisect_right(self._shots, now_s, key=_time_of)
            self.ignored += len(self._shots) - last
            self._shots = self._shots[max(first, 0) : last]
            if not self._shots:
                return None
            self.newest_s = self._shots[-1].time_s
            return CameraView(list(self._shots), stop_s)


class LiveFrames:
    """Turns chosen pictures into inputs; the motion of a pair is computed once for all windows."""

    def __init__(self, recent: Recent) -> None:
        self._recent = recent

    def of(self, selections: Iterable[FrameSelection]) -> DecodedFrames:
        """Return the frames of one window."""
        return _WindowFrames(selections, self)

    def motion(
        self,
        flow: Flow,
        keys: Sequence[tuple[FrameTransform, int, int]],
        first: Pictures,
        second: Pictures,
    ) -> Motion:
        """Return the motion of pairs, float32 [T, 2, h, w]."""

        def measured(places: list[int]) -> list[Motion]:
            return [dis_flow(flow, first[i : i + 1], second[i : i + 1])[0] for i in places]

        return np.stack(self._recent.of(keys, measured))


class _WindowFrames(DecodedFrames):
    def __init__(self, selections: Iterable[FrameSelection], kept: LiveFrames) -> None:
        self._kept = kept
        super().__init__(selections)

    def _decode(self, video: MediaReader, selections: list[FrameSelection]) -> None:
        assert isinstance(video, CameraView)  # noqa: S101  (nothing else is live)
        for one in selections:
            for n in one.decoded.tolist():
                key = (video, one.transform, one.side, n)
                self._frames[key] = video.shots[n].pictures[one.transform]

    def _motion(self, one: FrameSelection, flow: Flow, first: Pictures, second: Pictures) -> Motion:
        assert isinstance(one.video, CameraView)  # noqa: S101
        assert one.second is not None  # noqa: S101  (motion is that of pairs)
        shots, pairs = one.video.shots, zip(one.first, one.second, strict=True)
        keys = [(one.transform, shots[a].serial, shots[b].serial) for a, b in pairs]
        return self._kept.motion(flow, keys, first, second)


@dataclass(frozen=True, slots=True)
class _Piece:
    """Samples from a place of the track on."""

    first: int
    samples: Sound

    @property
    def stop(self) -> int:
        return self.first + len(self.samples)


class SoundView(MediaReader):
    """The sound of a microphone that concerns one window.

    Args:
        pieces: by their places on the track.
        zero_s: when the track starts.
        native: its rate, Hz.
    """

    audio_decoder = "live"

    def __init__(self, pieces: Sequence[_Piece], zero_s: float, native: int) -> None:
        self.path, self._pieces = MICROPHONE, pieces
        self._zero_s, self._native = zero_s, native

    @property
    def audio_rate(self) -> int:
        """The sensor's own rate, Hz."""
        return self._native

    def sound_span(self, rate: int) -> tuple[float, float]:
        """Return where the sound that is kept starts and ends, seconds."""
        first, stop = self._pieces[0].first, max(piece.stop for piece in self._pieces)
        return self._zero_s + first / self._native, self._zero_s + stop / self._native

    def covered_s(self, start_s: float, stop_s: float) -> float:
        """Return for how many seconds of a span there is sound."""
        low, high = ((t - self._zero_s) * self._native for t in (start_s, stop_s))
        covered = 0.0
        for piece in self._pieces:
            stop = min(piece.stop, high)
            covered += max(0.0, stop - max(piece.first, low))
            low = max(low, stop)
        return covered / self._native

    def sound(self, start_s: float, stop_s: float, rate: int) -> Sound:
        """Return mono sound float32 [S] at ``rate`` Hz; silence where there is none."""
        first = round((start_s - self._zero_s) * rate)
        count = max(1, round((stop_s - start_s) * rate))
        if rate == self._native:
            return self._cut(first, count)
        # Where both rates have a sample at the same moment the filter has the same phases as in
        # one pass over the whole track, so that a window is a part of that.
        common = gcd(rate, self._native)
        step, own = rate // common, self._native // common
        margin = ceil(_MARGIN_S * common)
        begin, end = first // step - margin, -(-(first + count) // step) + margin
        around = self._cut(begin * own, (end - begin) * own)
        resampled = soxr.resample(around, self._native, rate, quality=QUALITY)
        offset = first - begin * step
        return np.asarray(resampled[offset : offset + count], np.float32)

    def _cut(self, first: int, count: int) -> Sound:
        window = np.zeros(count, np.float32)
        for piece in self._pieces:
            low, high = max(first, piece.first), min(first + count, piece.stop)
            if high > low:
                window[low - first : high - first] = piece.samples[low - piece.first :][
                    : high - low
                ]
        return window


class Microphone:
    """Sound of one microphone; `push` from any thread.

    Time stamps say where sound belongs, as in a file: what is less than 0.03 s off follows on
    what came before it, for that is the jitter of clocks; more is a hole.

    Args:
        rate: its own, Hz.
        keep_s: seconds that are kept where nobody reads; half of it may lie ahead of who does.
        tolerance_s: how late a chunk may come behind one that is newer.

    Attributes:
        ignored: chunks that came too late, from the future, or with samples that are no numbers.
        newest_s: end of the newest sound that a window has met; None before the first.
    """

    def __init__(self, rate: int, keep_s: float, tolerance_s: float) -> None:
        self._rate, self._keep_s, self._tolerance_s = rate, keep_s, tolerance_s
        self._lock = threading.Lock()
        self.forget()
        self.ignored = 0

    def forget(self) -> None:
        """Begin anew."""
        with self._lock:
            self._waiting: list[tuple[float, Sound]] = []
            self._pieces: list[_Piece] = []
            self._zero_s: float | None = None
            self._low_s, self._high_s = -np.inf, sys.float_info.max
            self.newest_s: float | None = None

    def push(self, time_s: float, samples: npt.NDArray[np.float32]) -> None:
        """Take over sound, float32 [S], full scale at +-1, whose first sample is of ``time_s``.

        Raises:
            ConfigError: it is no such array.
        """
        if not (isinstance(samples, np.ndarray) and samples.dtype.kind == "f"):
            raise ConfigError("push: audio must be a float32 array [S], in [-1, 1].")
        if samples.ndim != 1:
            raise ConfigError(f"push: audio must be float32 [S], mono; got {samples.shape}.")
        stop_s = time_s + len(samples) / self._rate
        usable = self._low_s < stop_s <= self._high_s and bool(np.isfinite(samples).all())
        if not (len(samples) and usable):
            self.ignored += bool(len(samples))
            return
        with self._lock:
            insort(self._waiting, (time_s, np.array(samples, np.float32)), key=_chunk_time)
            oldest_s = oldest(self._waiting[len(self._waiting) // 2][0], self._keep_s)
            del self._waiting[: bisect_left(self._waiting, oldest_s, key=_chunk_time)]

    def view(self, start_s: float, stop_s: float, now_s: float) -> SoundView | None:
        """Return what there is by now for a window, and forget what is older; None if nothing."""
        with self._lock:
            # A clock gone astray must not push out what is good.
            self._low_s, self._high_s = start_s, now_s + self._keep_s / 2
            future = bisect_right(self._waiting, now_s, key=_chunk_time)
            self.ignored += len(self._waiting) - future
            del self._waiting[future:]
            # Before chunks have had the time to come one by one, nothing is said of their places.
            settled = bisect_right(self._waiting, now_s - self._tolerance_s, key=_chunk_time)
            self._pieces = self._placed(self._waiting[:settled])
            del self._waiting[:settled]
            if self._zero_s is not None:
                low = (start_s - self._zero_s - _MARGIN_S - 1) * self._rate
                self._pieces = [piece for piece in self._pieces if piece.stop > low]
            pieces = self._placed(self._waiting)
            if not pieces or self._zero_s is None:
                return None
            self.newest_s = self._zero_s + max(piece.stop for piece in pieces) / self._rate
            return SoundView(sorted(pieces, key=_place), self._zero_s, self._rate)

    def _placed(self, chunks: Sequence[tuple[float, Sound]]) -> list[_Piece]:
        """Return the pieces of the track with those of chunks that follow."""
        pieces = list(self._pieces)
        for time_s, samples in chunks:
            if self._zero_s is None:
                self._zero_s = time_s
            first = round((time_s - self._zero_s) * self._rate)
            last = pieces[-1].stop if pieces else None
            if last is not None and abs(first - last) <= DRIFT_S * self._rate:
                first = last
            pieces.append(_Piece(first, samples))
        return pieces


def _chunk_time(chunk: tuple[float, Sound]) -> float:
    return chunk[0]


def _place(piece: _Piece) -> int:
    return piece.first
