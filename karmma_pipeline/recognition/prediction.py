"""What a model says of a clip or a window, and what was left out on purpose."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from karmma_pipeline.data.manifest import Clip
from karmma_pipeline.errors import ConfigError
from karmma_pipeline.metrics import softmax

DROPPED = "dropped"
"""Reason of a modality that was present and was excluded on request."""


@dataclass(frozen=True)
class Prediction:
    """What a model says of a clip.

    Attributes:
        clip: with its id, ``start_s`` and ``stop_s`` (None: the end of the file).
        logits: head to float32 [C]; empty if no modality was left: there was nothing to see.
        mask: modality to whether the model saw it.
        reasons: absent modality to why: a reason of an extraction, or ``dropped``.
        heads: head to its C class names.
    """

    clip: Clip
    logits: Mapping[str, npt.NDArray[np.float32]]
    mask: Mapping[str, bool]
    reasons: Mapping[str, str]
    heads: Mapping[str, Sequence[str]]

    def top(self, head: str, count: int = 1) -> list[tuple[str, float]]:
        """Return the best classes of a head and their probabilities; none if nothing was seen."""
        if head not in self.heads:
            raise ConfigError(f"head={head!r}: the model has {', '.join(self.heads)}.")
        if head not in self.logits:
            return []
        of = self.probabilities[head]
        return [(self.heads[head][i], float(of[i])) for i in np.argsort(-of, kind="stable")[:count]]

    @property
    def probabilities(self) -> dict[str, npt.NDArray[np.float64]]:
        """Head to the softmax of its logits, float64 [C]."""
        return {head: softmax(of) for head, of in self.logits.items()}


@dataclass(frozen=True)
class Dropout:
    """Modalities that are left out on purpose.

    without: these, of every clip.
    rate, seed: the others as modality dropout would in training, each with this probability.
    """

    without: tuple[str, ...] = ()
    rate: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.rate <= 1:  # no NaN either
            raise ConfigError(f"rate={self.rate}: must be a probability between 0 and 1.")
        if self.seed < 0:
            raise ConfigError(f"seed={self.seed}: must be a non-negative integer.")

    def check(self, modalities: Sequence[str]) -> None:
        """Refuse to leave out what a model does not take.

        Raises:
            ConfigError: ``without`` has a name that is not among the model's ``modalities``.
        """
        if unknown := [m for m in self.without if m not in modalities]:
            raise ConfigError(f"without={unknown[0]!r}: the model takes {', '.join(modalities)}.")
