"""What a feature store is made of: its modalities, label space and list of clips."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from karmma_pipeline.config import Recipe
from karmma_pipeline.modalities import canonical

Dtype = Literal["float16", "bfloat16", "float32"]


class ModalitySpec(Recipe):
    """Tokens of one modality and where they come from."""

    tokens: int = Field(gt=0, le=1_000_000, description="Tokens N of a clip.")
    width: int = Field(gt=0, le=1_000_000, description="Width D of a token.")
    dtype: Dtype = Field("float16", description="Type on disk; bfloat16 is kept as uint16 bits.")
    frames: int = Field(0, ge=0, description="Sampled times T that are recorded per clip.")
    provenance: dict[str, Any] = Field({}, description="Backbone, weights, transform, sampling.")

    @property
    def disk_dtype(self) -> np.dtype[Any]:
        """The little-endian type of the bytes on disk."""
        return np.dtype({"float16": "<f2", "bfloat16": "<u2", "float32": "<f4"}[self.dtype])

    @property
    def token_bytes(self) -> int:
        """Bytes of one token."""
        return self.width * self.disk_dtype.itemsize

    @property
    def clip_bytes(self) -> int:
        """Bytes of one clip's tokens."""
        return self.tokens * self.token_bytes

    def encode(self, tokens: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Cast tokens [N, D] of any float type to the type on disk, rounding to nearest."""
        if self.dtype != "bfloat16":
            return np.ascontiguousarray(tokens, self.disk_dtype)
        bits = np.ascontiguousarray(tokens, "<f4").view("<u4")
        rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
        return np.ascontiguousarray(rounded.astype("<u2"))


class StoreSpec(Recipe):
    """Everything that must be equal for two runs to write into one store."""

    modalities: dict[str, ModalitySpec] = Field(min_length=1, description="By name.")
    heads: dict[str, tuple[str, ...]] = Field(description="Class names of each label set.")
    clips_per_shard: int = Field(256, gt=0, le=65_536, description="Clips of one shard file.")

    @property
    def order(self) -> tuple[str, ...]:
        """Modalities in canonical order: the columns of presence and masks."""
        return canonical(self.modalities)


@dataclass(frozen=True, slots=True)
class ClipRow:
    """A clip as the store lists it; times in seconds, ``stop_s`` NaN where not stated."""

    clip_id: str
    labels: Mapping[str, int]
    split: str = ""
    group: str = ""
    start_s: float = 0.0
    stop_s: float = float("nan")
