"""How a recipe says how large a fusion model is; torch is not needed to read it."""

from typing import Literal

from pydantic import Field, field_validator, model_validator

from karmma_pipeline import own_code
from karmma_pipeline.config import Recipe, without_defaults

#: Rules for absent tokens that have a name; `karmma_pipeline.models.absence` says what each does.
ABSENT = ("learned", "zeros", "mean", "drop")

#: Models that have a name; empty is the fusion model.
MODELS = ("", "late_fusion")


_MOST_WEIGHTS = 10**9
"""Weights of the layers, 300 times those of KARMMA: more is a slip of the pen."""


class FusionSize(Recipe):
    """Size of a fusion model and how it treats absence."""

    dim: int = Field(384, gt=0, description="Token width in the fusion block.")
    layers: int = Field(1, gt=0, le=1_000, description="Transformer layers.")
    attention_heads: int = Field(6, gt=0, description="Attention heads; must divide dim.")
    ffn_width: int = Field(384, gt=0, description="Hidden width of the feed-forward networks.")
    head_width: int = Field(
        768, gt=0, description="Hidden width of the MLP that all heads share (pool: mean)."
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout in the layers and the MLP.")
    absent: str = Field(
        "learned",
        description="Replacement of absent modalities: learned (learnable tokens, KARMMA), "
        "zeros (attended like data, Baseline), mean (mean token of the training clips, "
        "attended like data), drop (removed from the sequence), or a custom one as "
        "package.module:function.",
    )

    pool: Literal["mean", "attentive"] = Field(
        "mean",
        description="Pooling before the heads: mean (CLS and the mean token of each modality, "
        "KARMMA), or attentive (a learned query per head attends to all present tokens, as in "
        "V-JEPA 2's probe, which has layers: 3 and ffn_width: 4 * dim).",
    )

    @field_validator("absent")
    @classmethod
    def _known(cls, name: str) -> str:
        return own_code.check_name(name, ABSENT)

    @model_validator(mode="after")
    def _heads_divide_dim(self) -> "FusionSize":
        if self.dim % self.attention_heads:
            raise ValueError(
                f"dim={self.dim} must be divisible by attention_heads={self.attention_heads}"
            )
        return self

    @model_validator(mode="after")
    def _is_plausible(self) -> "FusionSize":
        of_a_layer = 4 * self.dim**2 + 2 * self.dim * self.ffn_width
        if (weights := self.layers * of_a_layer + self.dim * self.head_width) > _MOST_WEIGHTS:
            raise ValueError(
                f"dim={self.dim}, layers={self.layers}, ffn_width={self.ffn_width}, "
                f"head_width={self.head_width} give {weights:.2g} weights, more than the maximum "
                f"of {_MOST_WEIGHTS:.0e}; reduce one of them"
            )
        return self

    _as_saved = without_defaults("pool")
