"""Selects the frames of a clip for each backbone; each frame is decoded once.

T frames, h and w the network's input size.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from karmma_pipeline.data.manifest import Clip
from karmma_pipeline.data.sources import FrameSource
from karmma_pipeline.extraction.decode.flow import Motion, as_pictures, dis_flow, resized
from karmma_pipeline.extraction.media.interface import MediaFaultError, MediaReader
from karmma_pipeline.extraction.recipe import Flow, Sampling
from karmma_pipeline.extraction.types import InputSpec, Numbers, Pictures, Times
from karmma_pipeline.modalities import Reason
from karmma_pipeline.models.backbones.frame_transform import FrameTransform
from karmma_pipeline.views import Side

PAIRS = "frame at t and the other frame nearest to gap_s later, inside the clip; scaled to gap_s"
"""The rule of `partners` in words, as stores record it."""


@dataclass(frozen=True)
class FrameSelection:
    """Pictures that a network wants of one video.

    Attributes:
        times: requested and real seconds [2, T].
        first: their numbers [T].
        second: for flow that is to be computed, the numbers of their partners.
        flow_scale: for such flow, what makes px per pair px per gap, float32 [T].
        stored: they are flow already.
        side: where they are cropped, see `FrameTransform.apply`.
    """

    video: MediaReader
    spec: InputSpec
    times: Times
    first: Numbers
    second: Numbers | None = None
    flow_scale: npt.NDArray[np.float32] | None = None
    stored: bool = False
    side: Side = None

    @property
    def transform(self) -> FrameTransform:
        """Resizes and crops the pictures."""
        assert self.spec.transform is not None  # noqa: S101  (rgb and flow always have one)
        return self.spec.transform

    @property
    def decoded(self) -> Numbers:
        """Numbers of the frames that must be decoded as pictures."""
        if self.stored:
            return self.first[:0]
        return self.first if self.second is None else np.concatenate([self.first, self.second])


def sample_times(settings: Sampling, start_s: float, stop_s: float, count: int) -> Times:
    """Return ``count`` moments of a clip in seconds [T], within its borders."""
    # The middle of each of ``count`` equal parts: no moment lies on a border, where rounding would
    # decide whether the neighbouring clip's frame is taken.
    if settings.mode == "uniform":
        return start_s + (stop_s - start_s) * (np.arange(count) + 0.5) / count
    first = (start_s + stop_s) / 2 - (count - 1) / 2 / settings.fps
    if settings.short == "repeat_last":
        first = max(first, start_s)
    times = first + np.arange(count) / settings.fps
    # A span ends before its stop, which is the first moment of the clip after it.
    return np.clip(times, start_s, np.nextafter(stop_s, start_s))


def partners(starts: Times, first: Numbers, gap_s: float) -> tuple[Numbers, Numbers]:
    """Return pairs of different frames [T] as close to ``gap_s`` apart as the file has them.

    The second is the frame whose start is nearest to the first's + gap_s; where the file ends
    before it, the pair moves back.
    """
    wanted = starts[first] + gap_s
    after = np.clip(np.searchsorted(starts, wanted), 1, len(starts) - 1)
    nearest = np.where(wanted - starts[after - 1] < starts[after] - wanted, after - 1, after)
    # Where frames are further apart than the gap, the nearest one is the frame itself, and that
    # pair would show no motion.
    second = np.minimum(np.maximum(nearest, first + 1), len(starts) - 1)
    return np.minimum(first, second - 1), second


def clip_span(
    clip: Clip, modality: str, video: MediaReader, tolerance_s: float
) -> tuple[float, float]:
    """Return the clip's span in its video, clamped to the video's end.

    Pictures are addressed by the numbers that their data set states, if it does.

    Raises:
        MediaFaultError: the clip lies outside, or reaches out of the video by more than the
            tolerance.
    """
    start, stop = clip.start_s, clip.stop_s
    source = clip.media[modality]
    if isinstance(source, FrameSource) and source.span:
        start, stop = video.span(*source.span)
    return clamped(start, stop, video.stop_s, tolerance_s, video.beyond)


def clamped(
    start_s: float, stop_s: float | None, end_s: float, tolerance_s: float, beyond: str = ""
) -> tuple[float, float]:
    """Return a span that ends with its stream.

    Args:
        start_s: of the clip.
        stop_s: of the clip; None: the stream's end.
        end_s: of the stream.
        tolerance_s: how far the clip may reach beyond it.
        beyond: what lies there, for people.

    Raises:
        MediaFaultError: it lies outside, or reaches out of it by more than the tolerance.
    """
    stop = end_s if stop_s is None else min(stop_s, end_s)
    ends = f"its file ends at {end_s:.2f} s{beyond}"
    if start_s >= end_s:
        raise MediaFaultError(Reason.OUT_OF_RANGE, f"starts at {start_s:.2f} s, but {ends}")
    if stop_s is not None and stop_s > end_s + tolerance_s:
        raise MediaFaultError(Reason.OUT_OF_RANGE, f"stops at {stop_s:.2f} s, but {ends}")
    if stop <= start_s:
        raise MediaFaultError(Reason.TOO_SHORT, f"its span is empty: {start_s} to {stop} s")
    return start_s, stop


def picture_span(
    clip: Clip, start_s: float, stop_s: float, sampling: Sampling, count: int
) -> tuple[float, float]:
    """Return the part of a clip's span in which a view samples ``count`` pictures, or all of it."""
    if clip.view is None:
        return start_s, stop_s
    length = count / sampling.fps if sampling.mode == "fps" else None
    return clip.view.span(start_s, stop_s, length)


def select_frames(
    clip: Clip, spec: InputSpec, video: MediaReader, sampling: Sampling, flow: Flow
) -> FrameSelection:
    """Choose the frames of a clip, or the pairs or pictures of its flow.

    Raises:
        MediaFaultError: the clip cannot be had from this video.
    """
    start, stop = clip_span(clip, spec.modality, video, sampling.tolerance_s)
    start, stop = picture_span(clip, start, stop, sampling, spec.frames)
    times = sample_times(sampling, start, stop, spec.frames)
    is_flow, second, scale = spec.modality == "flow", None, None
    stored = is_flow and video.stores_flow
    if not is_flow:
        first = video.numbers(times)
    elif stored:
        first = video.numbers(_with_room(times, start, stop, video.gap_s))
    else:
        if len(video.frame_starts) < 2:
            raise MediaFaultError(Reason.TOO_SHORT, f"{video.path}: flow needs more than one frame")
        first = video.numbers(_with_room(times, start, stop, flow.gap_s))
        first, second = partners(video.frame_starts, first, flow.gap_s)
        scale = _flow_scale(video.frame_starts, first, second, flow.gap_s)
    real = video.frame_starts[first]
    off = _farthest(times, real, video, sampling.tolerance_s)
    if off > sampling.tolerance_s + (flow.gap_s if is_flow else 0.0):
        raise MediaFaultError(
            Reason.TIMESTAMP_MISMATCH, f"{video.path}: no frame within {off:.2f} s"
        )
    side = clip.view.side if clip.view else None
    return FrameSelection(video, spec, np.stack([times, real]), first, second, scale, stored, side)


def _farthest(times: Times, real: Times, video: MediaReader, tolerance_s: float) -> float:
    """Return how far a picture is from its moment at most, seconds."""
    starts = video.frame_starts
    # In a slide show or a time lapse every picture stands for long, and is right for as long.
    if len(starts) > 1 and float(np.median(np.diff(starts))) > tolerance_s:
        return float(np.maximum(starts[0] - times, times - video.stop_s).max())
    return float(np.abs(times - real).max())


def _with_room(times: Times, start_s: float, stop_s: float, gap_s: float) -> Times:
    """Move moments back so that a partner ``gap_s`` later still lies in the clip, if it can."""
    return np.maximum(np.minimum(times, stop_s - gap_s), start_s)


def _flow_scale(
    starts: Times, first: Numbers, second: Numbers, gap_s: float
) -> npt.NDArray[np.float32]:
    # Time stamps may repeat or lie nearly together; without a floor such a pair's noise would
    # be blown up into motion.
    real_s = np.maximum(starts[second] - starts[first], gap_s / 8)
    return (gap_s / real_s).astype(np.float32)


class DecodedFrames:
    """Resized and cropped frames of one clip, or of several, which share those they have in common.

    Args:
        selections: of all of them.
        several: a fault may then be another clip's.
    """

    def __init__(self, selections: Iterable[FrameSelection], several: bool = False) -> None:
        self._several = several
        self._frames: dict[tuple[MediaReader, FrameTransform, Side, int], Pictures] = {}
        self._faults: dict[MediaReader, MediaFaultError] = {}
        by_video: dict[MediaReader, list[FrameSelection]] = {}
        for one in selections:
            by_video.setdefault(one.video, []).append(one)
        for video, some in by_video.items():
            try:
                self._decode(video, some)
            except MediaFaultError as fault:
                self._faults[video] = fault
            except MemoryError:
                self._faults[video] = MediaFaultError(Reason.OUT_OF_MEMORY, str(video.path))

    def _decode(self, video: MediaReader, selections: list[FrameSelection]) -> None:
        """Go through a video once, forward, for all networks and clips that want frames of it.

        A full-size frame is dropped as soon as it is resized for each of them: a second of 4K
        video is 750 MB.
        """
        wanted: dict[tuple[FrameTransform, Side], set[int]] = {}
        for one in selections:
            wanted.setdefault((one.transform, one.side), set()).update(one.decoded.tolist())
        union = np.array(sorted(set().union(*wanted.values())), np.int64)
        read = video.decode_for_several if self._several else video.decode
        for number, frame in read(union):
            for (transform, side), numbers in wanted.items():
                if number in numbers:
                    picture = transform.apply(frame[None], side)[0]
                    self._frames[video, transform, side, number] = picture

    def lack(self, selections: Iterable[FrameSelection]) -> bool:
        """Tell whether a video of these selections could not be decoded."""
        return any(one.video in self._faults for one in selections)

    def array(self, one: FrameSelection, flow: Flow) -> Pictures:
        """Return a network's input, see `InputSpec`.

        Raises:
            MediaFaultError: the video's frames could not be decoded.
        """
        if one.stored:
            pictures = _stored_flow(one, flow)
            # Beside clips whose flow is still pairs of frames it must have their shape.
            return np.stack([pictures, np.zeros_like(pictures)]) if one.spec.pairs else pictures
        if one.video in self._faults:
            raise self._faults[one.video]
        first = self._stack(one, one.first)
        if one.second is None or one.flow_scale is None:
            return first
        second = self._stack(one, one.second)
        if one.spec.pairs:
            return np.stack([first, second])
        motion = self._motion(one, flow, first, second)
        return as_pictures(flow, motion * one.flow_scale[:, None, None, None])

    def _motion(self, one: FrameSelection, flow: Flow, first: Pictures, second: Pictures) -> Motion:
        """Return the motion of the pairs, float32 [T, 2, h, w], see `dis_flow`."""
        return dis_flow(flow, first, second)

    # Numbers may repeat: a clip shorter than T frame intervals shows some frames more than once.
    def _stack(self, one: FrameSelection, numbers: Numbers) -> Pictures:
        of = one.video, one.transform, one.side
        return np.stack([self._frames[*of, n] for n in numbers.tolist()])


def _stored_flow(one: FrameSelection, flow: Flow) -> Pictures:
    motion = resized(one.video.motion(one.first), one.transform, one.side)
    return as_pictures(flow, motion * np.float32(flow.gap_s / one.video.gap_s))
