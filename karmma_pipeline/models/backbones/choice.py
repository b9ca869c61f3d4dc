"""What a recipe says about a frozen backbone, and what follows from it without any weights.

Torch is imported where a network is looked at: to read a recipe must not take seconds.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, PositiveInt, field_serializer, model_validator

from karmma_pipeline.config import Recipe
from karmma_pipeline.errors import ConfigError
from karmma_pipeline.models.backbones import names
from karmma_pipeline.models.backbones.front_end import BOX_NUMBERS, BOX_SLOTS, Audio

if TYPE_CHECKING:
    from karmma_pipeline.models.backbones.names import Kind
    from karmma_pipeline.models.backbones.registry import Architecture, FrameTransform
    from karmma_pipeline.models.backbones.stages import Stages
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
        description="A name of `karmma backbones list`, timm:NAME, hf:ID or hf:FOLDER, or your\n"
        "own as package.module:factory.",
        examples=["swin3d_t"],
    )
    weights: str = Field(
        "DEFAULT",
        description="A torchvision weight (DEFAULT, KINETICS400_V1, ...), the path of a\n"
        "state dict, or random:SEED. DEFAULT of timm: and hf: are the weights of that name.",
    )
    key_map: tuple[tuple[str, str], ...] = Field(
        (),
        description="For a state dict of another code base: [regex, replacement] pairs that turn\n"
        "its names into this network's, each applied to every name in this order (re.sub).",
    )
    frames: Count | None = Field(
        None,
        description="Frames T per clip; null: the network's own. Networks of a fixed number take\n"
        "a multiple of it, in parts.",
    )
    size: Pixels | None = Field(
        None,
        description="Crop in px; null: that of the weights' own transform. Another size shows\n"
        "the same part of the picture: the resize before the crop scales with it.",
    )
    image: tuple[Pixels, Pixels] | None = Field(
        None,
        description="Height and width of the log-mel image (audio networks for images); null: as\n"
        "the network's own spectrogram has them.",
    )
    audio: Audio | None = Field(
        None,
        description="The spectrogram of this network, if it is another than the recipe's audio\n"
        "or, of a network that states its own, than that.",
    )
    tokens: tuple[Count, Count, Count] | None = Field(
        None,
        description="Pool the output to this grid (time, height, width), such as\n"
        "[12, 5, 5] = 300; null keeps the network's own grid.",
    )
    class_tokens: Literal["drop", "keep"] = Field(
        "drop",
        description="Class and register tokens, timm: and hf: only. keep: of each frame or clip,\n"
        "before the tokens of the grid.",
    )
    layer: int | str | None = Field(
        None,
        description="Take the output of this block (0 is the first, -1 the last) or module (by\n"
        "its name), before any norm that follows; the rest is not computed. null: the last one,\n"
        "normed.",
    )
    cut: str | None = Field(
        None,
        description="Where what is stored ends and what a training changes begins: a stage of the\n"
        "network (its input is stored), or input (prepared pictures, a spectrogram); null: the\n"
        "tokens are stored and nothing of the network trains. docs/cut.md has the stages.",
    )
    series: tuple[PositiveInt, PositiveInt, PositiveInt] | None = Field(
        None,
        description="Sensors: windows N, samples of each, channels; a recipe's sensors fill it in.",
    )

    engine: Engine = Field(
        "torch",
        description="What computes it. openvino: on CPUs, convolutional networks and Swin faster\n"
        "(docs/extraction.md); pip install 'karmma-pipeline[openvino]'.",
    )

    @model_validator(mode="after")
    def _fits_shipped_network(self) -> Self:
        """Find faults when the recipe is read; a package.module:factory is imported later."""
        if self.engine != "torch" and self.name in WITHOUT_WEIGHTS:
            raise ValueError(f"engine={self.engine!r}: {self.name} computes nothing; leave it out")
        if self.cut is not None:
            self._check_cut(self.cut)
        seed = parse_seed(self.weights)
        if self.key_map and seed is not None:
            raise ValueError(f"key_map: weights={self.weights!r} has no names to change")
        for pattern, replacement in self.key_map:
            _check_pair(pattern, replacement)
        if self.name in names.FREE:
            self._check_kind(names.FREE[self.name])
        elif ":" not in self.name:
            self._check_input(self.architecture)
        return self

    def _check_cut(self, cut: str) -> None:
        if self.name in WITHOUT_WEIGHTS:
            raise ValueError(f"cut={cut!r}: {self.name} has nothing to train; leave it out")
        if self.engine != "torch":
            raise ValueError(f"cut={cut!r}: is for engine torch; leave engine={self.engine!r} out")
        if self.layer is not None and cut != INPUT:
            raise ValueError(f"cut={cut!r} and layer={self.layer!r}: give one, or cut: input")

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
            f"weights={self.weights!r}: neither a file nor a published weight of {self.name}; "
            f"known: {', '.join(['random:SEED', 'a path', *state_dicts.known(self.architecture)])}."
        )

    @property
    def frame_count(self) -> int:
        """Frames T of one input (1 for networks on images), or windows of a sensor."""
        if self.series is not None:
            return self.series[0]
        return self.frames or self.architecture.frames

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
                f"name={self.name!r}: its Architecture needs transform=FrameTransform(...), since "
                "no published weights state how to prepare video frames."
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
                    f"name={self.name!r}: takes the windows of a sensor; describe the modality "
                    "under sensors in the recipe, or give series: [windows, samples, channels]."
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

    def _check_kind(self, kind: Kind, own_audio: bool = False) -> None:
        if kind == "series":
            self._check_series()
            return
        if self.series is not None:
            raise ConfigError(
                f"name={self.name!r}: does not take a sensor's series; windows does, or your own "
                "network of kind series."
            )
        if kind == "boxes":
            if self.size is not None or self.image is not None or self.weights != "DEFAULT":
                raise ConfigError(
                    f"name={self.name!r}: takes object boxes and has no weights; give frames and "
                    "tokens alone."
                )
            return
        if kind == "image":
            own = own_audio or (self.audio is not None and self.audio.image is not None)
            if self.image is None and not own:
                raise ConfigError(f"name={self.name!r}: needs image: [height, width].")
            if self.frames is not None or self.size is not None:
                raise ConfigError(
                    f"name={self.name!r}: takes images; give image: [height, width] alone, "
                    "without frames and size."
                )
        elif self.image is not None:
            raise ConfigError(
                f"image={list(self.image)}: {self.name} takes video frames; give frames and size."
            )

    def _check_series(self) -> None:
        if self.frames is not None or self.size is not None or self.image is not None:
            raise ConfigError(
                f"name={self.name!r}: takes a sensor's windows; their number and length stand "
                "under sensors, and frames, size and image mean nothing here."
            )
        if self.name == "windows" and (self.weights != "DEFAULT" or self.key_map):
            raise ConfigError(f"name={self.name!r}: has no weights; leave them out.")

    def _check_fixed(self, architecture: Architecture) -> None:
        side = self._own_transform().crop[0]
        if self.frame_count % architecture.frames or self.size not in {None, side}:
            raise ConfigError(
                f"frames={self.frame_count}, size={self.size}: {self.name} takes "
                f"{architecture.frames} frames of {side} px only, or a multiple of them in parts; "
                "leave both out."
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
                f"tokens={list(self.tokens)}: finer than the grid {list(raw)} that {self.name} "
                f"gives for an input {list(self.input_shape)}; ask for at most that."
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
        return self.model_copy(update={"cut": cut})

    @property
    def stored_grid(self) -> tuple[int, ...]:
        """The shape of the N rows that are stored: of tokens, of an activation, or of the input.

        Raises:
            ConfigError: the network has no such stage.
        """
        if self.cut is None:
            return self.grid
        if self.cut == INPUT:
            return self.input_shape[1:2]  # frames, or the bands of one spectrogram
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
        return shape[1], channels * math.prod(shape[2:])

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


def recorded(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of the choice that a store's provenance records, all but its weights.

    Raises:
        ConfigError: the network that it names is not there.
    """
    from karmma_pipeline.models.backbones import registry

    shape = facts["input"]
    of_input = {
        "boxes": {"frames": shape[1]},
        "series": {"series": tuple(shape)},
        "image": {"image": tuple(shape[1:])},
        "video": {"frames": shape[1], "size": shape[-1]},
    }
    kept = {key: facts[key] for key in ("layer", "class_tokens") if key in facts}
    if "cut" in facts:
        kept["cut"] = facts["cut"]["before"]
    kind = registry.find(facts["backbone"]).kind
    return {"name": facts["backbone"], "tokens": facts["token_grid"], **kept, **of_input[kind]}


def _check_pair(pattern: str, replacement: str) -> None:
    try:
        re.sub(f"(?:{pattern})?", replacement, "")  # the replacement is parsed even so
    except re.error as error:
        raise ValueError(
            f"key_map: [{pattern!r}, {replacement!r}] is no regular expression and its "
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
        raise ConfigError(f"weights={weights!r}: write random:SEED with a whole number.")
    return seed
