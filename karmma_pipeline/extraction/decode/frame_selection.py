"""Which pictures of a video a network gets, and the pictures: each is decoded once for all.

T frames, h and w the network's input size.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from karmma_pipeline.data.manifest import Clip
from karmma_pipeline.data.sources import FrameSource
from karmma_pipeline.extraction.decode.flow import as_pictures, dis_flow, resized
from karmma_pipeline.extraction.media.errors import MediaFaultError
from karmma_pipeline.extraction.media.image_frames import FrameFiles
from karmma_pipeline.extraction.media.open import Video
from karmma_pipeline.extraction.recipe import Flow, Sampling
from karmma_pipeline.extraction.types import FramePairs, Numbers, Times
from karmma_pipeline.modalities import Reason
from karmma_pipeline.models.backbones import FrameTransform

PAIRS = "frame at t and the other frame nearest to gap_s later, inside the clip; scaled to gap_s"
"""The rule of `partners` in words, as stores record it."""


@dataclass(frozen=True)
class Plan:
    """Pictures that a network wants of one video.

    Attributes:
        times: requested and real seconds [2, T].
        first: their numbers [T].
        second: for flow that is to be computed, the numbers of their partners.
        stored: they are flow already.
    """

    video: Video
    transform: FrameTransform
    times: Times
    first: Numbers
    second: Numbers | None = None
    stored: bool = False

    @property
    def decoded(self) -> Numbers:
        """Numbers of the frames that must be decoded as pictures."""
        if self.stored:
            return self.first[:0]
        return self.first if self.second is None else np.concatenate([self.first, self.second])


def sample_times(settings: Sampling, start_s: float, stop_s: float, count: int) -> Times:
    """Return ``count`` moments of a clip in seconds [T], within its borders."""
    if settings.mode == "uniform":
        return start_s + (stop_s - start_s) * (np.arange(count) + 0.5) / count
    first = (start_s + stop_s) / 2 - (count - 1) / 2 / settings.fps
    if settings.short == "repeat_last":
        first = max(first, start_s)
    times = first + np.arange(count) / settings.fps
    return np.clip(times, start_s, np.nextafter(stop_s, start_s))


def partners(starts: Times, first: Numbers, gap_s: float) -> tuple[Numbers, Numbers]:
    """Return pairs of different frames [T] as close to ``gap_s`` apart as the file has them.

    The second is the frame whose start is nearest to the first's + gap_s; where the file ends
    before it, the pair moves back.
    """
    wanted = starts[first] + gap_s
    after = np.clip(np.searchsorted(starts, wanted), 1, len(starts) - 1)
    nearest = np.where(wanted - starts[after - 1] < starts[after] - wanted, after - 1, after)
    second = np.minimum(np.maximum(nearest, first + 1), len(starts) - 1)
    return np.minimum(first, second - 1), second


def clip_span(clip: Clip, modality: str, video: Video, tolerance_s: float) -> tuple[float, float]:
    """Return the clip's span in its video, clamped to the video's end.

    Pictures are addressed by the numbers that their data set states, if it does.

    Raises:
        MediaFaultError: the clip lies outside, or reaches out of the video by more than the
            tolerance.
    """
    start, stop = clip.start_s, clip.stop_s
    source = clip.media[modality]
    if isinstance(source, FrameSource) and source.span and isinstance(video, FrameFiles):
        start, stop = video.span(*source.span)
    return clamped(start, stop, video.stop_s, tolerance_s)


def clamped(
    start_s: float, stop_s: float | None, end_s: float, tolerance_s: float
) -> tuple[float, float]:
    """Return a span that ends with its stream.

    Raises:
        MediaFaultError: it lies outside, or reaches out of it by more than the tolerance.
    """
    stop = end_s if stop_s is None else min(stop_s, end_s)
    if start_s >= end_s:
        raise MediaFaultError(Reason.OUT_OF_RANGE, f"starts at {start_s}, the file ends at {end_s}")
    if stop_s is not None and stop_s > end_s + tolerance_s:
        raise MediaFaultError(Reason.OUT_OF_RANGE, f"stops at {stop_s}, the file ends at {end_s}")
    if stop <= start_s:
        raise MediaFaultError(Reason.TOO_SHORT, f"{start_s} to {stop}")
    return start_s, stop


def plan(
    clip: Clip,
    modality: str,
    frames: int,
    transform: FrameTransform,
    sampling: Sampling,
    flow: Flow,
    video: Video,
) -> Plan:
    """Choose the frames of a clip, or the pairs or pictures of its flow.

    Raises:
        MediaFaultError: the clip cannot be had from this video.
    """
    start, stop = clip_span(clip, modality, video, sampling.tolerance_s)
    times = sample_times(sampling, start, stop, frames)
    stored = modality == "flow" and isinstance(video, FrameFiles) and len(video.source.names) == 2
    second = None
    if modality != "flow":
        first = video.numbers(times)
    elif stored:
        assert isinstance(video, FrameFiles)  # noqa: S101  (mypy)
        first = video.numbers(np.maximum(np.minimum(times, stop - video.gap_s), start))
    else:
        if len(video.frame_starts) < 2:
            raise MediaFaultError(Reason.TOO_SHORT, f"{video.path}: one frame has no motion")
        inside = np.maximum(np.minimum(times, stop - flow.gap_s), start)
        first, second = partners(video.frame_starts, video.numbers(inside), flow.gap_s)
    real = video.frame_starts[first]
    off = float(np.abs(times - real).max())
    if off > sampling.tolerance_s + (flow.gap_s if modality == "flow" else 0.0):
        raise MediaFaultError(Reason.TIME_OFF, f"{video.path}: nothing within {off:.2f} s")
    return Plan(video, transform, np.stack([times, real]), first, second, stored)


class Pictures:
    """Resized and cropped frames of one clip, or of several, which share those they have in common.

    Args:
        plans: of all of them.
        several: a fault may then be another clip's.
    """

    def __init__(self, plans: Iterable[Plan], several: bool = False) -> None:
        self._several = several
        self._pictures: dict[tuple[Video, FrameTransform, int], npt.NDArray[np.uint8]] = {}
        self._faults: dict[Video, MediaFaultError] = {}
        by_video: dict[Video, list[Plan]] = {}
        for one in plans:
            by_video.setdefault(one.video, []).append(one)
        for video, some in by_video.items():
            try:
                self._decode(video, some)
            except MediaFaultError as fault:
                self._faults[video] = fault
            except MemoryError:
                self._faults[video] = MediaFaultError(Reason.OUT_OF_MEMORY, str(video.path))

    def _decode(self, video: Video, plans: list[Plan]) -> None:
        wanted: dict[FrameTransform, set[int]] = {}
        for one in plans:
            wanted.setdefault(one.transform, set()).update(one.decoded.tolist())
        union = np.array(sorted(set().union(*wanted.values())), np.int64)
        read = video.decode_for_several if self._several else video.decode
        for number, frame in read(union):
            for transform, numbers in wanted.items():
                if number in numbers:
                    self._pictures[video, transform, number] = transform.apply(frame[None])[0]

    def lack(self, plans: Iterable[Plan]) -> bool:
        """Tell whether a video of these plans could not be decoded."""
        return any(one.video in self._faults for one in plans)

    def input(self, one: Plan, flow: Flow) -> npt.NDArray[np.uint8] | FramePairs:
        """Return uint8 [T, 3, h, w], or, for flow that is computed later, the pairs of frames.

        Raises:
            MediaFaultError: the video's frames could not be decoded.
        """
        if one.stored:
            return _stored_flow(one, flow)
        if one.video in self._faults:
            raise self._faults[one.video]
        first = self._stack(one, one.first)
        if one.second is None:
            return first
        second, starts = self._stack(one, one.second), one.video.frame_starts
        real_s = np.maximum(starts[one.second] - starts[one.first], flow.gap_s / 8)
        scale = (flow.gap_s / real_s).astype(np.float32)
        if flow.source != "dis":
            return FramePairs(np.stack([first, second]), scale)
        return as_pictures(flow, dis_flow(flow, first, second) * scale[:, None, None, None])

    def _stack(self, one: Plan, numbers: Numbers) -> npt.NDArray[np.uint8]:
        return np.stack([self._pictures[one.video, one.transform, n] for n in numbers.tolist()])


def _stored_flow(one: Plan, flow: Flow) -> npt.NDArray[np.uint8]:
    assert isinstance(one.video, FrameFiles)  # noqa: S101  (only they hold flow)
    motion = resized(one.video.motion(one.first), one.transform)
    return as_pictures(flow, motion * np.float32(flow.gap_s / one.video.gap_s))
