"""What crosses the seams of an extraction, and the rule by which a moment names a frame.

Naming one of these types imports no decoder: libraries that open media are the business of
`media` and `decode` alone. T frames, h and w a network's input size.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from karmma_pipeline.extraction.recipe import Audio, ExtractRecipe, Flow, Sampling
from karmma_pipeline.modalities import Reason
from karmma_pipeline.models.backbones import BackboneChoice, FrameTransform
from karmma_pipeline.models.backbones.registry import BOX_NUMBERS, BOX_SLOTS

Times = npt.NDArray[np.float64]
Numbers = npt.NDArray[np.int64]
Pictures = npt.NDArray[np.uint8]

TAR_INDEX = "tar_index"
"""Folder beside the stores in which lists of tars are kept."""

ROUNDING_S = 5e-4
"""A frame counts as shown from this much before its start: decord's times are float32, and an
annotation that names a frame's own start must get that frame."""

_ALONE_S = 0.04
"""How long the only frame of a video counts as shown if the file does not say."""


@dataclass(frozen=True)
class FramePairs:
    """Frames whose motion is computed later, where the backbones run.

    frames: uint8 [2, T, 3, h, w], first and second ones. scale: what makes px per pair px per
    gap, float32 [T].
    """

    frames: Pictures
    scale: npt.NDArray[np.float32]


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
        return InputSpec(
            modality, choice.frame_count, None, (BOX_SLOTS, BOX_NUMBERS), per_frame=True
        )
    video = choice.architecture.kind == "video"
    height, width = choice.input_shape[-2:]
    if modality == "audio":
        frames = choice.frame_count if video else 1
        return InputSpec(modality, frames, None, (height, width), per_frame=video)
    return InputSpec(
        modality, choice.frame_count, choice.transform, (height, width), per_frame=True
    )


@dataclass(frozen=True)
class DecodeSettings:
    """The parts of the recipe that decide what is decoded; picklable.

    index_folder: where lists of tars are kept; None: nowhere.
    """

    sampling: Sampling
    flow: Flow
    audio: Audio
    inputs: tuple[InputSpec, ...]
    index_folder: Path | None = None

    @classmethod
    def of(cls, recipe: ExtractRecipe) -> "DecodeSettings":
        """Collect them, each input once however many networks want it."""
        wanted = [
            input_spec(m, choice)
            for choices in recipe.sets.values()
            for m, choice in choices.items()
        ]
        inputs = tuple(dict.fromkeys(wanted))
        return cls(recipe.sampling, recipe.flow, recipe.audio, inputs, recipe.out / TAR_INDEX)


@dataclass
class DecodedClip:
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


def covering(starts: Times, times: Times) -> Numbers:
    """Return the frame that is shown at each moment: the last one that starts by then.

    Args:
        starts: ascending start of each frame's interval, seconds [frames].
        times: seconds [T]; moments before the first or after the last frame get that frame.
    """
    found = np.searchsorted(starts, times, side="right") - 1
    return np.clip(found, 0, len(starts) - 1).astype(np.int64)


def end_of(starts: Times, last_s: float) -> float:
    """Return when the last frame ends: after its own duration, or the usual one if longer."""
    usual = float(np.median(np.diff(starts))) if len(starts) > 1 else _ALONE_S
    return float(starts[-1]) + max(last_s, usual)
