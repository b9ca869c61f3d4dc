"""The moving average of the weights (EMA), which is often a little better than the weights."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from karmma_pipeline.models.fusion import FusionModel


def moving_average(model: FusionModel, decay: float) -> AveragedModel:
    """Return a copy of the model that follows it: ``update_parameters`` after each step.

    average = d * average + (1 - d) * weights, with d = min(decay, (1 + n) / (10 + n)) after n
    updates, so that the first weights, which are random, are soon forgotten.
    """

    def follow(averages: Sequence[Tensor], weights: Sequence[Tensor], updates: Any) -> None:
        n = float(updates)
        step = 1 - min(decay, (1 + n) / (10 + n))
        with torch.no_grad():
            torch._foreach_lerp_(list(averages), list(weights), step)

    return AveragedModel(model, multi_avg_fn=follow)
