"""What a decode process does: clips of one video in, network inputs of each out.

One decode of the frames serves RGB and flow, every network and every backbone set.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from karmma_pipeline.data.manifest import Clip
from karmma_pipeline.extract.flow import as_pictures, dis_flow
from karmma_pipeline.extract.media import MediaFaultError, MediaFile
from karmma_pipeline.extract.recipe import Audio, ExtractRecipe, Flow, Sampling
from karmma_pipeline.extract.sampling import Times, sample_times
from karmma_pipeline.extract.spectrogram import mel_image
from karmma_pipeline.modalities import Reason
from karmma_pipeline.models.backbones import BackboneChoice, FrameTransform


@dataclass(frozen=True)
class InputSpec:
    """What a network wants of a clip; networks with equal wants share one array.

    Arrays: uint8 [T, 3, h, w] for rgb and flow; float32 [h, w] or, for video networks,
    [T, h, w] for audio.
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
    """The inputs of one clip, or why there are none; times are float64 [2, T]."""

    clip_id: str
    arrays: dict[InputSpec, npt.NDArray[Any]] = field(default_factory=dict)
    times: dict[InputSpec, Times] = field(default_factory=dict)
    reasons: dict[InputSpec, Reason] = field(default_factory=dict)


def lost(clip_id: str, settings: Settings, reason: Reason) -> Decoded:
    """Return a clip of which nothing could be decoded."""
    return Decoded(clip_id, reasons=dict.fromkeys(settings.inputs, reason))


def decode_clips(clips: list[Clip], settings: Settings) -> list[Decoded]:
    """Decode clips; each file is opened once. A fault costs its modality of its clip."""
    media: dict[Path, MediaFile] = {}
    return [_decode(clip, settings, media) for clip in clips]


def _decode(clip: Clip, settings: Settings, media: dict[Path, MediaFile]) -> Decoded:
    decoded = Decoded(clip.clip_id)
    cache: dict[Any, Any] = {}
    for spec in settings.inputs:
        try:
            path = clip.media.get(spec.modality)
            if path is None:
                raise MediaFaultError(Reason.NOT_IN_DATASET, spec.modality)
            file = media.setdefault(path, MediaFile(path))
            make = _MAKERS[spec.modality]
            decoded.arrays[spec], decoded.times[spec] = make(clip, spec, settings, file, cache)
        except MediaFaultError as fault:
            decoded.reasons[spec] = fault.reason
        except MemoryError:
            decoded.reasons[spec] = Reason.OUT_OF_MEMORY
    return decoded


def _span(clip: Clip, stop_s: float) -> tuple[float, float]:
    """Return the clip's span, clamped to where its stream ends."""
    stop = stop_s if clip.stop_s is None else min(clip.stop_s, stop_s)
    if clip.start_s >= stop_s:
        raise MediaFaultError(Reason.OUT_OF_RANGE, f"starts at {clip.start_s}, ends {stop_s}")
    if stop <= clip.start_s:
        raise MediaFaultError(Reason.TOO_SHORT, f"{clip.start_s} to {stop}")
    return clip.start_s, stop


def _video_times(clip: Clip, spec: InputSpec, settings: Settings, file: MediaFile) -> Times:
    return sample_times(settings.sampling, *_span(clip, file.video_stop_s), spec.frames)


def _pictures(
    file: MediaFile, times: Times, spec: InputSpec, cache: dict[Any, Any]
) -> tuple[npt.NDArray[np.uint8], Times]:
    """Decode, resize and crop frames once for all networks that want the same."""
    key = (file.path, times.tobytes(), spec.transform)
    if key not in cache:
        raw = (file.path, times.tobytes())
        if raw not in cache:
            cache[raw] = file.frames(times)
        frames, real = cache[raw]
        assert spec.transform is not None  # noqa: S101  (rgb and flow always have one)
        cache[key] = spec.transform.apply(frames), real
    return cache[key]


def _rgb(
    clip: Clip, spec: InputSpec, settings: Settings, file: MediaFile, cache: dict[Any, Any]
) -> tuple[npt.NDArray[Any], Times]:
    times = _video_times(clip, spec, settings, file)
    pictures, real = _pictures(file, times, spec, cache)
    return pictures, np.stack([times, real])


def _flow(
    clip: Clip, spec: InputSpec, settings: Settings, file: MediaFile, cache: dict[Any, Any]
) -> tuple[npt.NDArray[Any], Times]:
    times = _video_times(clip, spec, settings, file)
    first, real = _pictures(file, times, spec, cache)
    second, _ = _pictures(file, times + settings.flow.gap_s, spec, cache)
    motion = dis_flow(settings.flow, first, second)
    return as_pictures(settings.flow, motion), np.stack([times, real])


def _audio(
    clip: Clip, spec: InputSpec, settings: Settings, file: MediaFile, cache: dict[Any, Any]
) -> tuple[npt.NDArray[Any], Times]:
    audio = settings.audio
    start, stop = clip.start_s, file.sound_stop_s if clip.stop_s is None else clip.stop_s
    if spec.per_frame:
        centres = sample_times(settings.sampling, start, stop, spec.frames)
        length = audio.frame_s
    else:
        centres, length = np.array([(start + stop) / 2]), audio.window_s or stop - start
    images = []
    for centre in centres:
        window = (centre - length / 2, centre + length / 2)
        images.append(mel_image(audio, file.sound(*window, audio.sample_rate), spec.image))
    array = np.stack(images) if spec.per_frame else images[0]
    return array, np.stack([centres, centres])


_MAKERS: Mapping[str, Callable[..., tuple[npt.NDArray[Any], Times]]] = {
    "rgb": _rgb,
    "flow": _flow,
    "audio": _audio,
}
