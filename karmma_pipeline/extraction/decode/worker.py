"""What a decode process does: clips of one video in, network inputs of each out.

Every frame of a clip is decoded once, for RGB and flow, every network and every backbone set.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from karmma_pipeline.data.manifest import Clip
from karmma_pipeline.data.sources import BoxSource
from karmma_pipeline.extraction.decode.boxes import read_boxes
from karmma_pipeline.extraction.decode.flow import FramePairs
from karmma_pipeline.extraction.decode.frame_selection import (
    Pictures,
    Plan,
    clamped,
    clip_span,
    plan,
)
from karmma_pipeline.extraction.decode.sampling import Times, sample_times
from karmma_pipeline.extraction.decode.spectrogram import longest_s, mel_image
from karmma_pipeline.extraction.media.errors import MediaFaultError
from karmma_pipeline.extraction.media.media_file import Decoder
from karmma_pipeline.extraction.media.open import Readers, sound_reader, video_reader
from karmma_pipeline.extraction.recipe import Audio, ExtractRecipe, Flow, Sampling
from karmma_pipeline.modalities import Reason
from karmma_pipeline.models.backbones import BackboneChoice, FrameTransform
from karmma_pipeline.models.backbones.boxes import NUMBERS, SLOTS

TAR_INDEX = "tar_index"
"""Folder beside the stores in which lists of tars are kept."""


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
    """The parts of the recipe that decide what is decoded; picklable.

    index_folder: where lists of tars are kept; None: nowhere.
    """

    sampling: Sampling
    flow: Flow
    audio: Audio
    inputs: tuple[InputSpec, ...]
    index_folder: Path | None = None

    @classmethod
    def of(cls, recipe: ExtractRecipe) -> "Settings":
        """Collect them, each input once however many networks want it."""
        wanted = [
            input_spec(m, choice)
            for choices in recipe.sets.values()
            for m, choice in choices.items()
        ]
        inputs = tuple(dict.fromkeys(wanted))
        return cls(recipe.sampling, recipe.flow, recipe.audio, inputs, recipe.out / TAR_INDEX)


@dataclass
class Decoded:
    """The inputs of one clip, or why there are none; times are float64 [2, T].

    pairs: frames whose flow is computed beside the backbones. padded: audio windows that reach
    past the track; audio_rate: the track's own, Hz. decoders: modality to what read it.
    """

    clip_id: str
    arrays: dict[InputSpec, npt.NDArray[Any]] = field(default_factory=dict)
    times: dict[InputSpec, Times] = field(default_factory=dict)
    reasons: dict[InputSpec, Reason] = field(default_factory=dict)
    pairs: dict[InputSpec, FramePairs] = field(default_factory=dict)
    padded: int = 0
    audio_rate: int | None = None
    decoders: dict[str, str] = field(default_factory=dict)


def lost(clip_id: str, settings: Settings, reason: Reason) -> Decoded:
    """Return a clip of which nothing could be decoded."""
    return Decoded(clip_id, reasons=dict.fromkeys(settings.inputs, reason))


def decode_clips(
    clips: list[Clip], settings: Settings, decoder: Decoder = "decord"
) -> list[Decoded]:
    """Decode clips; each file is opened once. A fault costs its modality of its clip.

    Args:
        clips: of one video, as far as possible.
        settings: what to decode.
        decoder: the one that is tried first.
    """
    with Readers(decoder, settings.index_folder) as readers:
        begun = [_begin(clip, settings, readers) for clip in clips]
        several = len(begun) > 1
        pictures = Pictures([p for _, plans in begun for p in plans.values()], several)
        for decoded, plans in begun:
            again = several and pictures.lack(plans.values())
            _finish(decoded, plans, Pictures(plans.values()) if again else pictures, settings)
        return [decoded for decoded, _ in begun]


def _begin(
    clip: Clip, settings: Settings, readers: Readers
) -> tuple[Decoded, dict[InputSpec, Plan]]:
    """Read boxes and sound, and choose the frames of the rest."""
    decoded = Decoded(clip.clip_id)
    plans: dict[InputSpec, Plan] = {}
    for spec in settings.inputs:
        with _faults_of(decoded, spec):
            if spec.modality not in clip.media:
                raise MediaFaultError(Reason.NOT_IN_DATASET, spec.modality)
            source = clip.media[spec.modality]
            if isinstance(source, BoxSource):
                boxes, times = read_boxes(clip, source, settings.sampling, spec.frames)
                decoded.arrays[spec], decoded.times[spec] = boxes, times
            elif spec.modality == "audio":
                _audio(decoded, clip, spec, settings, readers)
            else:
                plans[spec] = _plan(clip, spec, settings, readers)
    return decoded, plans


def _finish(
    decoded: Decoded, plans: dict[InputSpec, Plan], pictures: Pictures, settings: Settings
) -> None:
    for spec, one in plans.items():
        with _faults_of(decoded, spec):
            found = pictures.input(one, settings.flow)
            if isinstance(found, FramePairs):
                decoded.pairs[spec] = found
            else:
                decoded.arrays[spec] = found
            decoded.times[spec] = one.times
            decoded.decoders[spec.modality] = one.video.video_decoder


@contextmanager
def _faults_of(decoded: Decoded, spec: InputSpec) -> Iterator[None]:
    try:
        yield
    except MediaFaultError as fault:
        decoded.reasons[spec] = fault.reason
    except MemoryError:
        decoded.reasons[spec] = Reason.OUT_OF_MEMORY


def _plan(clip: Clip, spec: InputSpec, settings: Settings, readers: Readers) -> Plan:
    assert spec.transform is not None  # noqa: S101  (rgb and flow always have one)
    video = video_reader(readers.of(clip.media[spec.modality]))
    return plan(
        clip, spec.modality, spec.frames, spec.transform, settings.sampling, settings.flow, video
    )


def _sound_span(clip: Clip, settings: Settings, readers: Readers) -> tuple[float, float]:
    """Return the span that the clip's pictures have, or, without pictures, its sound's."""
    tolerance = settings.sampling.tolerance_s
    with suppress(MediaFaultError, KeyError):
        return clip_span(clip, "rgb", video_reader(readers.of(clip.media["rgb"])), tolerance)
    if clip.stop_s is not None:
        return clip.start_s, clip.stop_s
    sound = sound_reader(readers.of(clip.media["audio"]))
    return clamped(clip.start_s, None, sound.sound_span(settings.audio.sample_rate)[1], tolerance)


def _audio(
    decoded: Decoded, clip: Clip, spec: InputSpec, settings: Settings, readers: Readers
) -> None:
    audio, sound = settings.audio, sound_reader(readers.of(clip.media["audio"]))
    rate = audio.sample_rate
    track_start, track_stop = sound.sound_span(rate)
    start, stop = _sound_span(clip, settings, readers)
    if spec.per_frame:
        centres = sample_times(settings.sampling, start, stop, spec.frames)
        length = audio.frame_s
    else:
        centres = np.array([(start + stop) / 2])
        length = min(audio.window_s or stop - start, longest_s(audio))
    first, last = centres - length / 2, centres + length / 2
    heard = (last > track_start) & (first < track_stop)
    if not heard.any():
        raise MediaFaultError(Reason.OUT_OF_RANGE, f"{sound.path}: no sound at {start:.2f} s")
    images = [
        mel_image(audio, sound.sound(a, b, rate), spec.image)
        for a, b in zip(first, last, strict=True)
    ]
    decoded.arrays[spec] = np.stack(images) if spec.per_frame else images[0]
    decoded.times[spec] = np.stack([centres, centres])
    decoded.padded += int(((first < track_start) | (last > track_stop)).sum())
    decoded.audio_rate = sound.audio_rate
    decoded.decoders["audio"] = sound.audio_decoder
