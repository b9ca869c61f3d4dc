"""Types that the parts of an extraction exchange, and the rule that maps a time to a frame.

Naming one of these types imports no decoder: libraries that open media are the business of
`media` and `decode` alone. Nor does it import torch, so that a process which only opens media
starts in a second. B clips in a batch, T frames, h and w a network's input size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict

import numpy as np
import numpy.typing as npt

from karmma_pipeline.errors import ConfigError
from karmma_pipeline.modalities import Reason
from karmma_pipeline.models.backbones.choice import INPUT
from karmma_pipeline.store.spec import StoredDtype, activation_dtype

if TYPE_CHECKING:
    from torch import Tensor

    from karmma_pipeline.data.manifest import Clip
    from karmma_pipeline.data.sensors import Sensor
    from karmma_pipeline.extraction.recipe import ExtractRecipe, Flow, Sampling
    from karmma_pipeline.models.backbones import BackboneChoice, FrameTransform
    from karmma_pipeline.models.backbones.front_end import Audio

Times = npt.NDArray[np.float64]
Numbers = npt.NDArray[np.int64]
Pictures = npt.NDArray[np.uint8]
Decoder = Literal["pyav", "decord"]

#: Folder beside the stores in which lists of tars are kept.
TAR_INDEX = "tar_index"

#: A frame counts as shown from this much before its start: decord's times are float32, and an
#: annotation that names a frame's own start must get that frame.
ROUNDING_S = 5e-4

#: Absences that are how the clip was recorded, not errors.
NATURAL = {Reason.PRESENT, Reason.NO_STREAM, Reason.NOT_IN_DATASET}

# How long the only frame of a video counts as shown if the file does not say.
_ALONE_S = 0.04


class StoredRows(TypedDict):
    """N rows of a clip, their width D and their type on disk; see `ModalitySpec`."""

    tokens: int
    width: int
    dtype: StoredDtype


@dataclass(frozen=True)
class InputSpec:
    """What a network wants of a clip; networks with equal wants share one array.

    Arrays: uint8 [T, 3, h, w] for rgb and flow; float32 [h, w] or, for video networks,
    [T, h, w] for audio; float32 [T, slots, numbers] for boxes, [N, W, C] for a sensor's windows.
    ``pairs``: flow that is computed where the networks run, from uint8 [2, T, 3, h, w], the first
    and the second frames. ``audio``: the network's own spectrogram; None: the recipe's.
    """

    modality: str
    frames: int
    transform: FrameTransform | None
    image: tuple[int, int]
    per_frame: bool
    pairs: bool = False
    audio: Audio | None = None

    @property
    def times(self) -> int:
        """Moments T that are recorded per clip."""
        return self.frames

    @property
    def array_bytes(self) -> int:
        """Bytes of the array of one clip."""
        values = prod(self.image) * (self.frames if self.per_frame else 1)
        if self.transform is None:  # float32 images or boxes
            return 4 * values
        return 3 * values * (2 if self.pairs else 1)  # uint8 in three channels


def input_spec(modality: str, choice: BackboneChoice, flow: Flow | None = None) -> InputSpec:
    """Return what a backbone wants of a modality.

    Args:
        modality: of the clip.
        choice: the backbone.
        flow: how flow is measured; None: nothing but its size and its moments is asked for.

    Raises:
        ConfigError: an image network for rgb or flow, or one without its image size.
    """
    if choice.architecture.kind == "boxes":
        from karmma_pipeline.models.backbones.front_end import BOX_NUMBERS, BOX_SLOTS

        return InputSpec(
            modality, choice.frame_count, None, (BOX_SLOTS, BOX_NUMBERS), per_frame=True
        )
    if choice.architecture.kind == "series":
        windows, samples, channels = choice.input_shape
        return InputSpec(modality, windows, None, (samples, channels), per_frame=True)
    video = choice.architecture.kind == "video"
    height, width = choice.input_shape[-2:]
    if modality == "audio":
        frames = choice.decoded_frames if video else 1
        size = (height, width)
        return InputSpec(modality, frames, None, size, per_frame=video, audio=choice.own_audio)
    pairs = modality == "flow" and flow is not None and flow.source != "dis"
    size = (height, width)
    return InputSpec(modality, choice.decoded_frames, choice.transform, size, True, pairs)


def stored_as(modality: str, choice: BackboneChoice, dtype: StoredDtype) -> StoredRows:
    """Return what a store holds of a clip: tokens, or what a cut backbone leaves of it.

    Args:
        modality: of the clip.
        choice: the backbone.
        dtype: of tokens and activations; decoded pictures stay uint8.
    """
    tokens, width = choice.stored_shape(modality)
    if choice.cut == INPUT and choice.architecture.kind == "video" and modality != "audio":
        dtype = "uint8"
    elif choice.cut is not None:
        dtype = activation_dtype(dtype)
    return {"tokens": tokens, "width": width, "dtype": dtype}


@dataclass(frozen=True)
class DecodeSettings:
    """The parts of the recipe that decide what is decoded; picklable.

    index_folder: where lists of tars are kept; None: nowhere.
    sensors: modality to its settings.
    sound_kept_s: seconds of a track that are kept for clips farther back; None: an hour.
    """

    sampling: Sampling
    flow: Flow
    audio: Audio
    inputs: tuple[InputSpec, ...]
    index_folder: Path | None = None
    video_decoder: Decoder = "pyav"
    sensors: Mapping[str, Sensor] = field(default_factory=dict)
    sound_kept_s: float | None = None

    @classmethod
    def of(cls, recipe: ExtractRecipe) -> DecodeSettings:
        """Collect them, each input once however many networks want it."""
        wanted = [
            input_spec(m, choice, recipe.flow)
            for choices in recipe.sets.values()
            for m, choice in choices.items()
        ]
        inputs = tuple(dict.fromkeys(wanted))
        if recipe.views.crops > 1:
            _check_crops(inputs)
        return cls(
            recipe.sampling,
            recipe.flow,
            recipe.audio,
            inputs,
            recipe.out / TAR_INDEX,
            recipe.video_decoder,
            recipe.sensors,
        )


def _check_crops(inputs: Sequence[InputSpec]) -> None:
    """Refuse crops of pictures that are squeezed into the network's input as a whole.

    Raises:
        ConfigError: there is nothing to crop.
    """
    pictures = [spec for spec in inputs if spec.transform is not None]
    whole = [s for s in pictures if s.transform and s.transform.resize == s.transform.crop]
    if whole or not pictures:
        what = (
            f"{whole[0].modality} is resized to {whole[0].image} without cropping"
            if whole
            else "no backbone takes images"
        )
        raise ConfigError(f"views.crops=3: {what}, so there is nothing to crop; remove it.")


@dataclass
class DecodedClip:
    """The inputs of one clip, or why there are none; times are float64 [2, T].

    flow_scales: of inputs that are pairs of frames, what makes px per pair px per gap, float32
    [T]; a clip whose data set brings its flow has none, and its pictures in place of the first
    frames. padded: audio windows that reach past the track; audio_rate: the track's own, Hz.
    decoders: modality to what read it.
    """

    clip_id: str
    arrays: dict[InputSpec, npt.NDArray[Any]] = field(default_factory=dict)
    times: dict[InputSpec, Times] = field(default_factory=dict)
    reasons: dict[InputSpec, Reason] = field(default_factory=dict)
    details: dict[InputSpec, str] = field(default_factory=dict)
    flow_scales: dict[InputSpec, npt.NDArray[np.float32]] = field(default_factory=dict)
    padded: int = 0
    audio_rate: int | None = None
    decoders: dict[str, str] = field(default_factory=dict)

    def take(self, part: DecodedClip, inputs: Sequence[InputSpec]) -> None:
        """Take over what a try for some of the inputs has found out about them."""
        for spec in inputs:
            self.reasons.pop(spec, None)
            self.details.pop(spec, None)
        for name in ("times", "reasons", "details", "flow_scales", "decoders"):
            getattr(self, name).update(getattr(part, name))
        # Copies, for these may be views of a slot that is given back.
        self.arrays.update({spec: array.copy() for spec, array in part.arrays.items()})
        self.padded += part.padded
        self.audio_rate = part.audio_rate or self.audio_rate


@dataclass(frozen=True)
class BatchPlan:
    """Clips of one shard that follow one another and are computed together.

    Attributes:
        shard: its number.
        clips: not more than the networks take at once.
        stores: names of the stores that lack the shard.
        last: with these clips the shard is whole.
        skipped: clips of the shard before them, which an earlier run has done.
    """

    shard: int
    clips: Sequence[Clip]
    stores: Sequence[str]
    last: bool
    skipped: int = 0


@dataclass(frozen=True)
class Batch:
    """A decoded batch; ``clips`` without their arrays, which lie in ``inputs`` [B, ...].

    Clips that lack an input have zeros there.
    """

    plan: BatchPlan
    clips: list[DecodedClip]
    inputs: dict[InputSpec, Tensor]

    def rows(self, spec: InputSpec, first: int, count: int) -> list[int]:
        """Return which of some clips are computed together; none if all of them lack it.

        A clip lost to a transient error keeps a row of zeros, so that the batches of other
        clips do not change.
        """
        some = range(first, min(first + count, len(self.clips)))
        if all(spec in self.clips[i].reasons for i in some):
            return []
        return [i for i in some if self.clips[i].reasons.get(spec) not in NATURAL]


def covering(starts: Times, times: Times) -> Numbers:
    """Return the frame that is shown at each moment: the last one that starts by then.

    Args:
        starts: ascending start of each frame's interval, seconds [frames].
        times: seconds [T]; moments before the first or after the last frame get that frame.
    """
    # A frame that starts at this very moment is shown already. Of frames with one time stamp it is
    # the last, as a player has drawn over the others.
    last_begun = np.searchsorted(starts, times, side="right") - 1
    return np.clip(last_begun, 0, len(starts) - 1).astype(np.int64)


def end_of(starts: Times, last_s: float) -> float:
    """Return when the last frame ends: after its own duration, or the usual one if longer."""
    # Many files state no duration for their last frame, or one of zero; without this rule a clip
    # that ends with its video would be called too long.
    usual = float(np.median(np.diff(starts))) if len(starts) > 1 else _ALONE_S
    return float(starts[-1]) + max(last_s, usual)
