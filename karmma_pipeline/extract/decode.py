"""What a decode process does: clips of one video in, network inputs of each out.

Every frame of a clip is decoded once, for RGB and flow, every network and every backbone set.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from karmma_pipeline.data.manifest import Clip
from karmma_pipeline.data.sources import BoxSource, FileSource, Source
from karmma_pipeline.extract.boxes import read_boxes
from karmma_pipeline.extract.flow import as_pictures, dis_flow
from karmma_pipeline.extract.media import MediaFaultError, MediaFile
from karmma_pipeline.extract.recipe import Audio, ExtractRecipe, Flow, Sampling
from karmma_pipeline.extract.sampling import Times, partners, sample_times
from karmma_pipeline.extract.spectrogram import mel_image
from karmma_pipeline.modalities import Reason
from karmma_pipeline.models.backbones import BackboneChoice, FrameTransform
from karmma_pipeline.models.backbones.boxes import NUMBERS, SLOTS


@dataclass(frozen=True)
class InputSpec:
    """What a network wants of a clip; networks with equal wants share one array.

    Arrays: uint8 [T, 3, h, w] for rgb and flow; float32 [h, w] or, for video networks,
    [T, h, w] for audio; float32 [T, slots, numbers] for boxes.
    """

    modality: str
    frames: int
    transform: FrameTransform | None
    image: tuple[int, int]
    per_frame: bool

    @property
    def times(self) -> int:
        """Moments T that are recorded per clip."""
        return self.frames


def input_spec(modality: str, choice: BackboneChoice) -> InputSpec:
    """Return what a backbone wants of a modality.

    Raises:
        ConfigError: an image network for rgb or flow, or one without its image size.
    """
    if choice.architecture.kind == "boxes":
        return InputSpec(modality, choice.frame_count, None, (SLOTS, NUMBERS), per_frame=True)
    video = choice.architecture.kind == "video"
    height, width = choice.input_shape[-2:]
    if modality == "audio":
        frames = choice.frame_count if video else 1
        return InputSpec(modality, frames, None, (height, width), per_frame=video)
    return InputSpec(
        modality, choice.frame_count, choice.transform, (height, width), per_frame=True
    )


@dataclass(frozen=True)
class Settings:
    """The parts of the recipe that decide what is decoded; picklable."""

    sampling: Sampling
    flow: Flow
    audio: Audio
    inputs: tuple[InputSpec, ...]

    @classmethod
    def of(cls, recipe: ExtractRecipe) -> "Settings":
        """Collect them, each input once however many networks want it."""
        wanted = [
            input_spec(m, choice)
            for choices in recipe.sets.values()
            for m, choice in choices.items()
        ]
        return cls(recipe.sampling, recipe.flow, recipe.audio, tuple(dict.fromkeys(wanted)))


@dataclass
class Decoded:
    """The inputs of one clip, or why there are none; times are float64 [2, T].

    padded: audio windows that reach past the track; audio_rate: the track's own, Hz.
    """

    clip_id: str
    arrays: dict[InputSpec, npt.NDArray[Any]] = field(default_factory=dict)
    times: dict[InputSpec, Times] = field(default_factory=dict)
    reasons: dict[InputSpec, Reason] = field(default_factory=dict)
    padded: int = 0
    audio_rate: int | None = None


def lost(clip_id: str, settings: Settings, reason: Reason) -> Decoded:
    """Return a clip of which nothing could be decoded."""
    return Decoded(clip_id, reasons=dict.fromkeys(settings.inputs, reason))


def decode_clips(clips: list[Clip], settings: Settings) -> list[Decoded]:
    """Decode clips; each file is opened once. A fault costs its modality of its clip."""
    media: dict[Path, MediaFile] = {}
    return [_decode(clip, settings, media) for clip in clips]


def _decode(clip: Clip, settings: Settings, media: dict[Path, MediaFile]) -> Decoded:
    decoded = Decoded(clip.clip_id)
    files = {
        m: _open(source, media)
        for m, source in clip.media.items()
        if not isinstance(source, BoxSource)
    }
    plans: dict[InputSpec, _Plan] = {}
    for spec in settings.inputs:
        with _faults_of(decoded, spec):
            if spec.modality not in clip.media:
                raise MediaFaultError(Reason.NOT_IN_DATASET, spec.modality)
            source = clip.media[spec.modality]
            if isinstance(source, BoxSource):
                boxes, times = read_boxes(clip, source, settings.sampling, spec.frames)
                decoded.arrays[spec], decoded.times[spec] = boxes, times
            elif spec.modality == "audio":
                _audio(decoded, clip, spec, settings, files)
            else:
                plans[spec] = _plan(clip, spec, settings, files[spec.modality])
    pictures = _Pictures(plans.values())
    for spec, plan in plans.items():
        with _faults_of(decoded, spec):
            decoded.arrays[spec] = pictures.input(spec, plan, settings.flow)
            decoded.times[spec] = plan.times
    return decoded


def _open(source: Source, media: dict[Path, MediaFile]) -> MediaFile:
    if not isinstance(source, FileSource):
        raise NotImplementedError(f"{type(source).__name__} cannot be read yet")
    return media.setdefault(source.path, MediaFile(source.path))


@contextmanager
def _faults_of(decoded: Decoded, spec: InputSpec) -> Iterator[None]:
    try:
        yield
    except MediaFaultError as fault:
        decoded.reasons[spec] = fault.reason
    except MemoryError:
        decoded.reasons[spec] = Reason.OUT_OF_MEMORY


@dataclass(frozen=True)
class _Plan:
    """Frames that a network wants: numbers [T] for rgb, for flow also their partners'."""

    file: MediaFile
    transform: FrameTransform
    times: Times
    first: npt.NDArray[np.int64]
    second: npt.NDArray[np.int64] | None = None

    @property
    def numbers(self) -> npt.NDArray[np.int64]:
        return self.first if self.second is None else np.concatenate([self.first, self.second])


def _plan(clip: Clip, spec: InputSpec, settings: Settings, file: MediaFile) -> _Plan:
    assert spec.transform is not None  # noqa: S101  (rgb and flow always have one)
    start, stop = _span(clip, file.video_stop_s)
    times = sample_times(settings.sampling, start, stop, spec.frames)
    if spec.modality != "flow":
        numbers = file.numbers(times)
        real = file.frame_starts[numbers]
        return _Plan(file, spec.transform, np.stack([times, real]), numbers)
    if len(file.frame_starts) < 2:
        raise MediaFaultError(Reason.TOO_SHORT, f"{file.path}: one frame has no motion")
    inside = np.maximum(np.minimum(times, stop - settings.flow.gap_s), start)
    first, second = partners(file.frame_starts, file.numbers(inside), settings.flow.gap_s)
    real = file.frame_starts[first]
    return _Plan(file, spec.transform, np.stack([times, real]), first, second)


class _Pictures:
    """Resized and cropped frames of one clip: each frame is decoded once for all networks."""

    def __init__(self, plans: Iterable[_Plan]) -> None:
        self._pictures: dict[tuple[Path, FrameTransform, int], npt.NDArray[np.uint8]] = {}
        self._faults: dict[Path, MediaFaultError] = {}
        by_file: dict[Path, list[_Plan]] = {}
        for plan in plans:
            by_file.setdefault(plan.file.path, []).append(plan)
        for path, some in by_file.items():
            try:
                self._decode(path, some)
            except MediaFaultError as fault:
                self._faults[path] = fault
            except MemoryError:
                self._faults[path] = MediaFaultError(Reason.OUT_OF_MEMORY, str(path))

    def _decode(self, path: Path, plans: list[_Plan]) -> None:
        wanted: dict[FrameTransform, set[int]] = {}
        for plan in plans:
            wanted.setdefault(plan.transform, set()).update(plan.numbers.tolist())
        union = np.array(sorted(set().union(*wanted.values())), np.int64)
        for number, frame in plans[0].file.decode(union):
            for transform, numbers in wanted.items():
                if number in numbers:
                    picture = transform.apply(frame[None])[0]
                    self._pictures[path, transform, number] = picture

    def input(self, spec: InputSpec, plan: _Plan, flow: Flow) -> npt.NDArray[np.uint8]:
        """Return uint8 [T, 3, h, w].

        Raises:
            MediaFaultError: the file's frames could not be decoded.
        """
        if plan.file.path in self._faults:
            raise self._faults[plan.file.path]
        first = self._stack(plan, plan.first)
        if plan.second is None:
            return first
        starts = plan.file.frame_starts
        real_s = np.maximum(starts[plan.second] - starts[plan.first], flow.gap_s / 8)
        motion = dis_flow(flow, first, self._stack(plan, plan.second))
        scale = (flow.gap_s / real_s).astype(np.float32)[:, None, None, None]
        return as_pictures(flow, motion * scale)

    def _stack(self, plan: _Plan, numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
        found = [self._pictures[plan.file.path, plan.transform, n] for n in numbers.tolist()]
        return np.stack(found)


def _span(clip: Clip, stop_s: float) -> tuple[float, float]:
    """Return the clip's span, clamped to where its stream ends."""
    stop = stop_s if clip.stop_s is None else min(clip.stop_s, stop_s)
    if clip.start_s >= stop_s:
        raise MediaFaultError(Reason.OUT_OF_RANGE, f"starts at {clip.start_s}, ends {stop_s}")
    if stop <= clip.start_s:
        raise MediaFaultError(Reason.TOO_SHORT, f"{clip.start_s} to {stop}")
    return clip.start_s, stop


def _sound_span(clip: Clip, files: Mapping[str, MediaFile], rate: int) -> tuple[float, float]:
    """Return the span that the clip's pictures have, or, without pictures, its sound's."""
    with suppress(MediaFaultError, KeyError):
        return _span(clip, files["rgb"].video_stop_s)
    if clip.stop_s is not None:
        return clip.start_s, clip.stop_s
    return _span(clip, files["audio"].sound_span(rate)[1])


def _audio(
    decoded: Decoded,
    clip: Clip,
    spec: InputSpec,
    settings: Settings,
    files: Mapping[str, MediaFile],
) -> None:
    audio, file = settings.audio, files["audio"]
    rate = audio.sample_rate
    track_start, track_stop = file.sound_span(rate)
    start, stop = _sound_span(clip, files, rate)
    if spec.per_frame:
        centres = sample_times(settings.sampling, start, stop, spec.frames)
        length = audio.frame_s
    else:
        centres, length = np.array([(start + stop) / 2]), audio.window_s or stop - start
    first, last = centres - length / 2, centres + length / 2
    heard = (last > track_start) & (first < track_stop)
    if not heard.any():
        raise MediaFaultError(Reason.OUT_OF_RANGE, f"{file.path}: no sound at {start:.2f} s")
    images = [
        mel_image(audio, file.sound(a, b, rate), spec.image)
        for a, b in zip(first, last, strict=True)
    ]
    decoded.arrays[spec] = np.stack(images) if spec.per_frame else images[0]
    decoded.times[spec] = np.stack([centres, centres])
    decoded.padded += int(((first < track_start) | (last > track_stop)).sum())
    decoded.audio_rate = file.audio_rate
