"""Mean and deviation of the cached features, so that one learning rate serves all backbones."""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from karmma_pipeline.models.fusion import FusionModel
from karmma_pipeline.store import TokenSource
from karmma_pipeline.training.screen import finite

_CLIPS, _AT_ONCE = 2048, 64
"""Clips over which mean and deviation are measured, and how many of them are in memory at once."""


def standardise(model: FusionModel, store: TokenSource, clips: npt.NDArray[np.int64]) -> list[str]:
    """Set the model's standardization from (up to 2048, evenly spread) clips of the store.

    Clips whose features are not all finite do not count: one of them would spoil every other.

    Returns:
        The clips that were left out, as ``clip (modality)``.
    """
    left_out: list[str] = []
    for column, m in enumerate(store.modalities):
        present = clips[store.present[clips, column]]
        chosen = present[:: max(1, len(present) // _CLIPS)]
        mean, std, spoilt = _moments(store, m, chosen)
        left_out += [f"{clip} ({m})" for clip in spoilt]
        if mean is not None and std is not None:
            floor = 1e-3 * std.mean().clamp(min=1e-6)  # channels that hardly move stay small
            model.standardise(m, mean.float(), torch.maximum(std, floor).float())
    return left_out


def _moments(
    store: TokenSource, modality: str, clips: npt.NDArray[np.int64]
) -> tuple[Tensor | None, Tensor | None, list[str]]:
    """Return mean and deviation over tokens, [width], in two passes that need little memory."""
    spoilt: list[str] = []
    kept: list[Tensor] = []
    total, count = torch.zeros((), dtype=torch.float64), 0
    for i in range(0, len(clips), _AT_ONCE):
        index = torch.from_numpy(clips[i : i + _AT_ONCE])
        tokens = store.gather(modality, index)
        good = finite({modality: tokens})[:, 0]
        spoilt += [store.clip_ids[j].decode() for j in index[~good].tolist()]
        kept.append(index[good])
        tokens = tokens[good].double().flatten(0, 1)
        total, count = total + tokens.sum(dim=0), count + len(tokens)
    if count < 2:
        return None, None, spoilt
    mean, squares = total / count, torch.zeros((), dtype=torch.float64)
    for index in kept:
        tokens = store.gather(modality, index).double().flatten(0, 1)
        squares = squares + (tokens - mean).square().sum(dim=0)
    return mean, (squares / (count - 1)).sqrt(), spoilt
