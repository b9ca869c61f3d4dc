"""Specification of a feature store: modalities, label space and clips."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from karmma_pipeline.config import Recipe, without_defaults
from karmma_pipeline.metrics import ACTION
from karmma_pipeline.modalities import canonical
from karmma_pipeline.views import Views, frame_windows

_STEPS = 127
# Of a row with a zero point.
_FIRST, _LAST = -128, 127
#: The largest magnitude that can be held.
LARGEST = _STEPS * float(np.finfo(np.float16).max)


def quantise(tokens: npt.NDArray[Any]) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float16]]:
    """Return int8 [..., N, D] and scale float16 [..., N, 1] of finite tokens up to `LARGEST`.

    A token that is smaller than float16 can scale becomes zero.
    """
    values = np.asarray(tokens, np.float32)
    # The scale is rounded to float16 before it divides: reading multiplies by just that one.
    scale = (np.abs(values).max(axis=-1, keepdims=True) / _STEPS).astype("<f2")
    steps = np.clip(np.rint(values / _divisor(scale)), -_STEPS, _STEPS)
    return np.ascontiguousarray(steps.astype(np.int8)), np.ascontiguousarray(scale)


def quantise_affine(
    tokens: npt.NDArray[Any],
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float16]]:
    """Return int8 [..., N, D], and float16 [..., N, 2]: scale and zero point of each row.

    All steps lie between the least and the largest value of a row, so that activations behind a
    ReLU, which are never negative, get twice as many as from `quantise`. Zero is exact.
    """
    values = np.asarray(tokens, np.float32)
    low = np.minimum(values.min(axis=-1, keepdims=True), 0)
    high = np.maximum(values.max(axis=-1, keepdims=True), 0)
    scale = ((high - low) / (_LAST - _FIRST)).astype("<f2")  # rounded first, as above
    divisor = _divisor(scale)
    zero = np.clip(np.rint(_FIRST - low / divisor), _FIRST, _LAST)
    steps = np.clip(np.rint(values / divisor) + zero, _FIRST, _LAST)
    # Whole numbers up to 128 are exact in float16.
    both = np.concatenate([scale, zero.astype("<f2")], axis=-1)
    return np.ascontiguousarray(steps.astype(np.int8)), both


def _divisor(scale: npt.NDArray[np.float16]) -> npt.NDArray[np.float32]:
    return np.where(scale == 0, np.float32(np.inf), scale.astype(np.float32))


def dequantise(
    steps: npt.NDArray[np.int8], scale: npt.NDArray[np.float16]
) -> npt.NDArray[np.float32]:
    """Return float32 tokens [..., N, D] of int8 [..., N, D] and scale [..., N, 1 or 2]."""
    values, scale = steps.astype(np.float32), scale.astype(np.float32)
    return (values - scale[..., 1:] if scale.shape[-1] == 2 else values) * scale[..., :1]


Dtype = Literal["float16", "bfloat16", "float32", "int8"]
# Pictures before a network that is cut at its input are what they are, whatever a recipe says.
# What a stage of a cut network takes is often never negative, which int8 is made for there.
StoredDtype = Dtype | Literal["uint8", "int8_affine"]
ClipNumbers = npt.NDArray[np.int64]

_DISK = {"float16": "<f2", "bfloat16": "<u2", "float32": "<f4", "uint8": "|u1"}
_DISK |= dict.fromkeys(("int8", "int8_affine"), "|i1")
#: Columns of `scale` beside steps.
_SCALES = {"int8": 1, "int8_affine": 2}
_LARGEST = {
    "float16": float(np.finfo(np.float16).max),
    "bfloat16": float(np.uint32(0x7F7F0000).view(np.float32)),
    "float32": float(np.finfo(np.float32).max),
    "int8": LARGEST,
    "int8_affine": LARGEST,
    "uint8": 255.0,
}
# Values of one clip and modality; more is a mistake or an attack, not a feature.
_MAX_VALUES = 1 << 28


@dataclass(frozen=True, slots=True)
class StoredArray:
    """One array of a modality on disk: ``tokens`` rows of ``width`` values per clip."""

    name: str
    tokens: int
    width: int
    dtype: np.dtype[Any]

    @property
    def token_bytes(self) -> int:
        """Bytes of one token."""
        return self.width * self.dtype.itemsize

    @property
    def clip_bytes(self) -> int:
        """Bytes of one clip."""
        return self.tokens * self.token_bytes


def activation_dtype(dtype: StoredDtype) -> StoredDtype:
    """Return how what a recipe calls ``dtype`` is stored before a stage of a cut backbone."""
    return "int8_affine" if dtype == "int8" else dtype


class ModalitySpec(Recipe):
    """Tokens of one modality and where they come from."""

    tokens: int = Field(gt=0, le=1_000_000, description="Tokens N per clip.")
    width: int = Field(gt=0, le=1_000_000, description="Width D of a token.")
    dtype: StoredDtype = Field(
        "float16",
        description="Data type on disk. bfloat16 is stored as uint16 bits, int8 with a "
        "float16 scale per token (half the size of float16). int8_affine also has a zero point "
        "and is for activations of a cut backbone, as uint8 is for frames.",
    )
    frames: int = Field(0, ge=0, description="Number of recorded sampling times T per clip.")
    provenance: dict[str, Any] = Field({}, description="Backbone, weights, transform, sampling.")
    computed: dict[str, Any] = Field(
        {},
        description="Precision, memory format and batch size of the computation; they change "
        "tokens only in the last bits.",
    )

    @model_validator(mode="after")
    def _is_of_sane_size(self) -> Self:
        if self.tokens * self.width > _MAX_VALUES:
            raise ValueError(
                f"tokens={self.tokens} times width={self.width} is more than {_MAX_VALUES} values "
                "per clip"
            )
        return self

    @property
    def arrays(self) -> tuple[StoredArray, ...]:
        """The arrays on disk: ``tokens``, and ``scale`` [N, 1 or 2] beside int8."""
        tokens = StoredArray("tokens", self.tokens, self.width, np.dtype(_DISK[self.dtype]))
        if not self.is_scaled:
            return (tokens,)
        return tokens, StoredArray("scale", self.tokens, _SCALES[self.dtype], np.dtype("<f2"))

    @property
    def grid(self) -> tuple[int, ...]:
        """The shape of the N tokens: what they were pooled to, else the backbone's own map.

        Of a backbone that is cut: that of the activation, or the input, which are its rows.
        """
        facts = self.provenance
        if self.is_cut:
            facts = {"raw_grid": facts["cut"].get("grid")}
        for sides in (facts.get("token_grid"), facts.get("raw_grid")):
            whole = isinstance(sides, list) and all(isinstance(s, int) and s > 0 for s in sides)
            if sides and whole:
                return tuple(sides) if math.prod(sides) == self.tokens else (self.tokens,)
        return (self.tokens,)

    @property
    def is_scaled(self) -> bool:
        """Whether tokens are int8, and numbers only with what stands beside them."""
        return self.dtype in _SCALES

    @property
    def is_cut(self) -> bool:
        """Whether rows are no tokens yet: a part of the backbone is to follow."""
        return isinstance(self.provenance.get("cut"), dict)

    @property
    def windows(self) -> npt.NDArray[np.int64]:
        """The rows [W, T] that a network may take at a time, `frame_windows`; all unless more are.

        More frames than it takes are stored before a network that is cut at its input.
        """
        facts = self.provenance
        if self.is_cut and facts["cut"]["before"] == "input" and len(facts["input"]) == 4:
            return frame_windows(self.tokens, facts["input"][1])
        return np.arange(self.tokens, dtype=np.int64)[None]

    @property
    def clip_bytes(self) -> int:
        """Bytes of one clip in all arrays together."""
        return sum(array.clip_bytes for array in self.arrays)

    @property
    def largest(self) -> float:
        """The largest magnitude that the type on disk holds."""
        return _LARGEST[self.dtype]

    def holds(self, tokens: npt.NDArray[Any]) -> bool:
        """Tell whether all tokens are numbers that the type on disk holds."""
        # Not "largest > bound", which NaN would pass.
        return bool(float(np.abs(tokens).max()) <= self.largest)

    def encode(self, tokens: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], ...]:
        """Turn tokens [N, D] of any float type into what `arrays` hold, rounding to nearest."""
        if self.dtype == "int8":
            return quantise(tokens)
        if self.dtype == "int8_affine":
            return quantise_affine(tokens)
        if self.dtype != "bfloat16":
            return (np.ascontiguousarray(tokens, _DISK[self.dtype]),)
        # bfloat16 is the upper half of float32. Half of the last kept bit is added, less one where
        # that bit is 0: round to nearest, ties to even. NaN never comes here.
        bits = np.ascontiguousarray(tokens, "<f4").view("<u4")
        rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
        return (np.ascontiguousarray(rounded.astype("<u2")),)

    def decode(self, arrays: tuple[npt.NDArray[Any], ...]) -> npt.NDArray[np.float32]:
        """Return float32 tokens [..., N, D] of what `arrays` hold, exactly."""
        if self.is_scaled:
            return dequantise(*arrays)
        if self.dtype == "bfloat16":
            return (arrays[0].astype("<u4") << 16).view("<f4")
        return arrays[0].astype(np.float32)


def check_head_names(heads: Collection[str]) -> None:
    """Refuse a head that has the name of the composite: one name would have two accuracies.

    Raises:
        ValueError: a head is called action, and there are others.
    """
    if len(heads) > 1 and ACTION in map(str.casefold, heads):
        raise ValueError(
            f"head {ACTION!r}: with several heads, this is the name of their composite"
        )


class StoreSpec(Recipe):
    """Everything that must be equal for two runs to write into one store."""

    modalities: dict[str, ModalitySpec] = Field(min_length=1, description="By name.")
    heads: dict[str, tuple[str, ...]] = Field(description="Class names of each label set.")
    clips_per_shard: int = Field(256, gt=0, le=65_536, description="Clips per shard file.")
    views: Views | None = Field(
        None, description="Views per clip, stored as consecutive rows; null: one row."
    )

    _as_stored = without_defaults("views")

    @property
    def order(self) -> tuple[str, ...]:
        """Modalities in canonical order: the columns of presence and masks."""
        return canonical(self.modalities)

    @property
    def arrays(self) -> tuple[tuple[str, StoredArray], ...]:
        """Every array on disk with its modality, in canonical order."""
        return tuple((m, array) for m in self.order for array in self.modalities[m].arrays)


@dataclass(frozen=True, slots=True)
class ClipRow:
    """A clip as the store lists it; times in seconds, ``stop_s`` NaN where not stated."""

    clip_id: str
    labels: Mapping[str, int]
    split: str = ""
    group: str = ""
    start_s: float = 0.0
    stop_s: float = float("nan")
