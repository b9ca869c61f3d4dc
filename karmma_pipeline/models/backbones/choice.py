"""The settings of a frozen backbone, and everything derived from them without weights.

Torch is imported where a network is looked at: to read a recipe must not take seconds.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, PositiveInt, field_serializer, model_validator

from karmma_pipeline.config import Recipe
from karmma_pipeline.errors import ConfigError
from karmma_pipeline.models.backbones import names
from karmma_pipeline.models.backbones.front_end import BOX_NUMBERS, BOX_SLOTS, Audio

if TYPE_CHECKING:
    from karmma_pipeline.models.backbones.layers import Stages
    from karmma_pipeline.models.backbones.names import Kind
    from karmma_pipeline.models.backbones.registry import Architecture, FrameTransform
    from karmma_pipeline.models.backbones.watched import Chain

Engine = Literal["torch", "openvino"]
WeightSource = Literal["none", "random", "file", "published", "library"]

#: The cut before everything: what is stored is the prepared input itself.
INPUT = "input"

#: Networks that learn nothing.
WITHOUT_WEIGHTS = frozenset(("boxes", "windows"))

_FILES = {".pt", ".pth", ".safetensors", ".ckpt", ".bin", ".pyth", ".tar"}


# More is a slip of the pen, and would end in an allocation that fails.
Pixels = Annotated[int, Field(gt=0, le=8_192)]
Count = Annotated[int, Field(gt=0, le=4_096)]


class BackboneChoice(Recipe):
    """Which frozen network turns a modality into tokens, and how."""

    name: str = Field(
        description="A name from `karmma backbones list`, timm:NAME, hf:ID, hf:FOLDER, or a "
        "custom one as package.module:factory.",
        examples=["swin3d_t"],
    )
    weights: str = Field(
        "DEFAULT",
        description="Published weights (DEFAULT, KINETICS400_V1, ...), the path of a state "
        "dict, or random:SEED. With timm: and hf:, DEFAULT means the published weights of "
        "that name.",
    )
    key_map: tuple[tuple[str, str], ...] = Field(
        (),
        description="For state dicts of other code bases: [regex, replacement] pairs that map "
        "its parameter names to this network's; all are applied to each name, in order "
        "(re.sub).",
    )
    frames: Count | None = Field(
        None,
        description="Frames T per clip; null: the network's default. Networks with a fixed "
        "number of frames accept multiples of it, computed in parts.",
    )
    stored_frames: PositiveInt | None = Field(
        None,
        description="With cut: input, frames to store per clip, at least `frames`. Training "
        "samples `frames` of them in each epoch; everything else uses the middle ones. With "
        "sampling.mode uniform, three times `frames` works best. null: `frames`.",
    )
    size: Pixels | None = Field(
        None,
        description="Crop size in px; null: that of the weights' transform. The resize before "
        "the crop scales with it, so the field of view stays the same.",
    )
    image: tuple[Pixels, Pixels] | None = Field(
        None,
        description="Height and width of the log-mel image (image networks on audio); null: "
        "those of the network's spectrogram.",
    )
    audio: Audio | None = Field(
        None,
        description="Spectrogram settings of this network; override the recipe's `audio` or "
        "the network's own.",
    )
    tokens: tuple[Count, Count, Count] | None = Field(
        None,
        description="Pool the output to this grid (time, height, width), such as [12, 5, 5] = "
        "300 tokens; null: the network's grid.",
    )
    class_tokens: Literal["drop", "keep"] = Field(
        "drop",
        description="Class and register tokens, for timm: and hf: only. keep: store those of "
        "each frame or clip before the grid tokens.",
    )
    layer: int | str | None = Field(
        None,
        description="Use the output of this block (0 is the first, -1 the last) or module (by "
        "name), before any norm that follows. null: the last one, with its norm.",
    )
    cut: str | None = Field(
        None,
        description="Where the frozen prefix ends and the trained suffix begins: a stage of "
        "the network (its input is stored), or input (the prepared frames or spectrogram are "
        "stored). null: tokens are stored and the backbone is frozen. See docs/cut.md.",
    )
    series: tuple[PositiveInt, PositiveInt, PositiveInt] | None = Field(
        None,
        description="Sensors: number of windows N, samples per window, channels; filled in "
        "from `sensors`.",
    )

    engine: Engine = Field(
        "torch",
        description="Inference engine. openvino: faster for convolutional networks and Swin "
        "on CPUs (docs/extraction.md); needs pip install 'karmma-pipeline[openvino]'.",
    )

    @model_validator(mode="after")
    def _fits_shipped_network(self) -> Self:
        """Find faults when the recipe is read; a package.module:factory is imported later."""
        if self.engine != "torch" and self.name in WITHOUT_WEIGHTS:
            raise ValueError(
                f"engine={self.engine!r}: {self.name} does not compute anything; remove engine"
            )
        if self.cut is not None:
            self._check_cut(self.cut)
        if self.stored_frames is not None and self.cut != INPUT:
            raise ValueError(f"stored_frames={self.stored_frames}: requires cut: input; remove it")
        seed = parse_seed(self.weights)
        if self.key_map and seed is not None:
            raise ValueError(f"key_map: weights={self.weights!r} has no parameter names to map")
        for pattern, replacement in self.key_map:
            _check_pair(pattern, replacement)
        if self.name in names.FREE:
            self._check_kind(names.FREE[self.name])
        elif ":" not in self.name:
            self._check_input(self.architecture)
        return self

    def _check_cut(self, cut: str) -> None:
        if self.name in WITHOUT_WEIGHTS:
            raise ValueError(f"cut={cut!r}: {self.name} has no trainable parameters; remove cut")
        if self.engine != "torch":
            raise ValueError(f"cut={cut!r}: only for engine torch; remove engine={self.engine!r}")
        if self.layer is not None and cut != INPUT:
            raise ValueError(
                f"cut={cut!r} and layer={self.layer!r}: give only one of them, or cut: input"
            )

    @field_serializer("audio")
    def _as_stated(self, audio: Audio | None) -> dict[str, Any] | None:
        """Keep what is left out apart: it is the network's own."""
        return None if audio is None else audio.model_dump(mode="json", exclude_unset=True)

    @property
    def architecture(self) -> Architecture:
        """The network behind the name, as it is to be cut.

        Raises:
            ConfigError: the name is unknown, or the factory cannot be imported.
        """
        from karmma_pipeline.models.backbones import registry

        found = registry.find(self.name)
        if self.layer is None and self.class_tokens == found.class_tokens:
            return found
        return replace(found, layer=self.layer, class_tokens=self.class_tokens)

    @property
    def own_audio(self) -> Audio | None:
        """The spectrogram that the network or the recipe states for it; None: the recipe's one."""
        own = self.architecture.audio or {}
        if self.audio is None:
            return Audio.model_validate(own) if own else None
        # As it was stated: what was left out is the network's, unless it is another front end.
        stated = self.audio.model_dump(exclude_unset=True)
        return Audio.model_validate({**own, **stated})

    def fed(self, series: tuple[int, int, int]) -> Self:
        """Return the choice for a sensor of these windows, samples of each and channels.

        Raises:
            ValueError: it is no network for series, or is stated for others.
        """
        if self.series not in {None, series}:
            raise ValueError(f"series={self.series}: the sensor has {list(series)}")
        changed = self.model_dump(exclude_unset=True) | {"series": series}
        return type(self).model_validate(changed)

    @property
    def source(self) -> WeightSource:
        """Where the weights come from.

        Raises:
            ConfigError: ``weights`` is none of the three.
        """
        from karmma_pipeline.models.backbones import state_dicts

        if self.name in WITHOUT_WEIGHTS or self.architecture.kind == "boxes":
            return "none"
        if parse_seed(self.weights) is not None:
            return "random"
        if self.weights == "DEFAULT" and self.architecture.pretrained is not None:
            return "library"
        if state_dicts.enum_member(self.architecture, self.weights) is not None:
            return "published"
        path = Path(self.weights)
        if path.suffix in _FILES or len(path.parts) > 1 or path.is_file():
            return "file"
        raise ConfigError(
            f"weights={self.weights!r}: neither a file nor published weights of {self.name}; "
            "known: "
            f"{', '.join(['random:SEED', 'a path', *state_dicts.known(self.architecture)])}."
        )

    @property
    def frame_count(self) -> int:
        """Frames T of one input (1 for networks on images), or windows of a sensor."""
        if self.series is not None:
            return self.series[0]
        return self.frames or self.architecture.frames

    @property
    def decoded_frames(self) -> int:
        """Frames that are decoded of a clip: more than one input has where more are stored."""
        return self.stored_frames or self.frame_count

    @property
    def transform(self) -> FrameTransform:
        """Resize, crop and normalisation of video frames, at ``size``.

        Published weights come with theirs; a file and random weights get that of the
        network's DEFAULT weights.

        Raises:
            ConfigError: one's own network states none.
        """
        own = self._own_transform()
        return own if self.size is None else own.scaled(self.size)

    def _own_transform(self) -> FrameTransform:
        from karmma_pipeline.models.backbones import state_dicts
        from karmma_pipeline.models.backbones.frame_transform import of_weights

        architecture = self.architecture
        name = self.weights if self.source == "published" else "DEFAULT"
        member = state_dicts.enum_member(architecture, name)
        if member is not None:
            return of_weights(member.transforms())
        if architecture.transform is None:
            raise ConfigError(
                f"name={self.name!r}: its Architecture needs transform=FrameTransform(...), "
                "since no published weights define how to preprocess video frames."
            )
        return architecture.transform

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input: [3, T, h, w] for video, [3, h, w] for an image, [D, T] for boxes.

        Of a sensor: [N, W, C], windows, samples of each and channels.

        Raises:
            ConfigError: the network cannot take what the recipe asks for.
        """
        self._check_input(self.architecture)
        if self.architecture.kind == "boxes":
            return (BOX_SLOTS * BOX_NUMBERS, self.frame_count)
        if self.architecture.kind == "series":
            if self.series is None:
                raise ConfigError(
                    f"name={self.name!r}: takes windows of a sensor; define the modality under "
                    "sensors in the recipe, or set series: [windows, samples, channels]."
                )
            return self.series
        image = self.image or (self.own_audio.image if self.own_audio else None)
        if self.architecture.kind == "image" and image is not None:
            return (3, *image)
        return (3, self.frame_count, *self.transform.crop)

    def _check_input(self, architecture: Architecture) -> None:
        self._check_kind(architecture.kind, bool(architecture.audio))
        if architecture.fixed and architecture.kind == "video":
            self._check_fixed(architecture)
        if self.stored_frames is None:
            return
        if architecture.kind != "video":
            raise ConfigError(
                f"stored_frames={self.stored_frames}: {self.name} takes no frames; remove it."
            )
        if self.stored_frames < self.frame_count:
            raise ConfigError(
                f"stored_frames={self.stored_frames}: {self.name} takes {self.frame_count} frames; "
                "store as many or more."
            )

    def _check_kind(self, kind: Kind, own_audio: bool = False) -> None:
        if kind == "series":
            self._check_series()
            return
        if self.series is not None:
            raise ConfigError(
                f"name={self.name!r}: does not take sensor series; use windows, or a custom "
                "network of kind series."
            )
        if kind == "boxes":
            if self.size is not None or self.image is not None or self.weights != "DEFAULT":
                raise ConfigError(
                    f"name={self.name!r}: takes object boxes and has no weights; only frames "
                    "and tokens can be set."
                )
            return
        if kind == "image":
            own = own_audio or (self.audio is not None and self.audio.image is not None)
            if self.image is None and not own:
                raise ConfigError(f"name={self.name!r}: needs image: [height, width].")
            if self.frames is not None or self.size is not None:
                raise ConfigError(
                    f"name={self.name!r}: takes images; set image: [height, width], and remove "
                    "frames and size."
                )
        elif self.image is not None:
            raise ConfigError(
                f"image={list(self.image)}: {self.name} takes video frames; set frames and size "
                "instead."
            )

    def _check_series(self) -> None:
        if self.frames is not None or self.size is not None or self.image is not None:
            raise ConfigError(
                f"name={self.name!r}: takes windows of a sensor, which are defined under "
                "sensors; remove frames, size and image."
            )
        if self.name == "windows" and (self.weights != "DEFAULT" or self.key_map):
            raise ConfigError(f"name={self.name!r}: has no weights; remove the key.")

    def _check_fixed(self, architecture: Architecture) -> None:
        side = self._own_transform().crop[0]
        if self.frame_count % architecture.frames or self.size not in {None, side}:
            raise ConfigError(
                f"frames={self.frame_count}, size={self.size}: {self.name} takes "
                f"{architecture.frames} frames of {side} px only, or a multiple of these "
                "frames; remove both keys."
            )

    @property
    def raw_grid(self) -> tuple[int, int, int]:
        """The network's own output grid (t, h, w), before pooling."""
        from karmma_pipeline.models.backbones import registry

        _, t, h, w, _ = registry.map_shape(self.architecture, self.input_shape)
        return t, h, w

    @property
    def grid(self) -> tuple[int, int, int]:
        """The tokens' grid (t, h, w), after pooling.

        Raises:
            ConfigError: ``tokens`` is finer than the network's own grid, so that pooling would
                only repeat tokens.
        """
        raw = self.raw_grid
        if self.tokens is None:
            return raw
        if any(wanted > there for wanted, there in zip(self.tokens, raw, strict=True)):
            raise ConfigError(
                f"tokens={list(self.tokens)}: finer than the grid {list(raw)} of {self.name} "
                f"for an input {list(self.input_shape)}; use at most this grid."
            )
        return self.tokens

    @property
    def cuts(self) -> tuple[str, ...]:
        """Where the network could be cut, from its input on."""
        from karmma_pipeline.models.backbones import registry

        return INPUT, *registry.cuts(self.architecture, self.input_shape)

    @property
    def stages(self) -> Stages | Chain:
        """The stages between which the network can be cut.

        Raises:
            ConfigError: it is not made of such.
        """
        from karmma_pipeline.models.backbones import registry

        return registry.stages(self.architecture, self.input_shape)

    def cut_at(self, cut: str | None) -> Self:
        """Return the choice with another cut, or without one."""
        stored = self.stored_frames if cut == INPUT else None
        return self.model_copy(update={"cut": cut, "stored_frames": stored})

    @property
    def stored_grid(self) -> tuple[int, ...]:
        """The shape of the N rows that are stored: of tokens, of an activation, or of the input.

        Raises:
            ConfigError: the network has no such stage.
        """
        if self.cut is None:
            return self.grid
        if self.cut == INPUT:
            # Frames, or the bands of one spectrogram.
            return (self.stored_frames or self.input_shape[1],)
        return self._activation[0]

    def stored_shape(self, modality: str = "") -> tuple[int, int]:
        """Return N rows and their width D as a store holds them for one clip.

        Without a cut these are tokens. Of the prepared input a row is a frame, a mel band or a
        window; of flow only the two channels that say something.

        Raises:
            ConfigError: the network has no such stage.
        """
        if self.cut is None:
            return self.output_shape
        if self.cut != INPUT:
            grid, width = self._activation
            return math.prod(grid), width
        kind, shape = self.architecture.kind, self.input_shape
        if kind == "series":
            return shape[0], math.prod(shape[1:])
        if kind == "image":
            return shape[1], shape[2]
        channels = {"audio": 1, "flow": 2}.get(modality, 3)
        return self.stored_frames or shape[1], channels * math.prod(shape[2:])

    @property
    def _activation(self) -> tuple[tuple[int, ...], int]:
        from karmma_pipeline.models.backbones import registry

        assert self.cut is not None  # noqa: S101  (see above)
        return registry.activation_shape(self.architecture, self.cut, self.input_shape)

    @property
    def output_shape(self) -> tuple[int, int]:
        """Tokens N and width D of one clip, worked out without building any weights.

        Those of the whole network, wherever it is cut.
        """
        from karmma_pipeline.models.backbones import registry

        t, h, w = self.grid
        width, *_, extra = registry.map_shape(self.architecture, self.input_shape)
        return t * h * w + extra, width


def _check_pair(pattern: str, replacement: str) -> None:
    try:
        re.sub(f"(?:{pattern})?", replacement, "")  # the replacement is parsed even so
    except re.error as error:
        raise ValueError(
            f"key_map: [{pattern!r}, {replacement!r}] is not a valid regular expression and "
            f"replacement ({error})"
        ) from None


def parse_seed(weights: str) -> int | None:
    """Return the seed of ``random:SEED``, None for any other source.

    Raises:
        ConfigError: what follows the colon is no whole number.
    """
    if not weights.startswith("random:"):
        return None
    try:
        seed = int(weights.removeprefix("random:"))
    except ValueError:
        seed = 2**64
    if not -(2**63) <= seed < 2**64:  # what PyTorch takes
        raise ConfigError(f"weights={weights!r}: write random:SEED, where SEED is an integer.")
    return seed
