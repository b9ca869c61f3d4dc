"""Mean and deviation of the cached features, so that one learning rate serves all backbones."""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from karmma_pipeline.data.loading.clips import ClipModality, non_finite_error
from karmma_pipeline.models.fusion import FusionModel
from karmma_pipeline.store import TokenSource

NEW_FOLDER = "Then train into a new folder, --set out=FOLDER: a run keeps to its clips."

_CLIPS, _AT_ONCE = 2048, 64
"""Clips over which mean and deviation are measured, and how many of them are in memory at once."""


def standardise(model: FusionModel, store: TokenSource, clips: npt.NDArray[np.int64]) -> None:
    """Set the model's standardization from (up to 2048, evenly spread) clips of the store.

    Raises:
        StoreError: clips have tokens that are NaN or infinite; they are named.
    """
    for column, m in enumerate(store.modalities):
        present = clips[store.present[clips, column]]
        chosen = present[:: max(1, len(present) // _CLIPS)]
        if (moments := _moments(store, m, chosen)) is not None:
            mean, std = moments
            floor = 1e-3 * std.mean().clamp(min=1e-6)  # channels that hardly move stay small
            model.standardise(m, mean.float(), torch.maximum(std, floor).float())


def _moments(
    store: TokenSource, modality: str, clips: npt.NDArray[np.int64]
) -> tuple[Tensor, Tensor] | None:
    """Return mean and deviation over tokens, [width], in two passes that need little memory."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for index in _pieces(clips):
        tokens = store.gather(modality, index).double().flatten(0, 1)
        total, count = total + tokens.sum(dim=0), count + len(tokens)
    if count < 2:
        return None
    if not bool(total.isfinite().all()):  # a sum of finite tokens in float64 cannot overflow
        raise non_finite_error(store, _bad_clips(store, modality, clips), NEW_FOLDER)
    mean, squares = total / count, torch.zeros((), dtype=torch.float64)
    for index in _pieces(clips):
        tokens = store.gather(modality, index).double().flatten(0, 1)
        squares = squares + (tokens - mean).square().sum(dim=0)
    return mean, (squares / (count - 1)).sqrt()


def _pieces(clips: npt.NDArray[np.int64]) -> Iterator[Tensor]:
    for start in range(0, len(clips), _AT_ONCE):
        yield torch.from_numpy(clips[start : start + _AT_ONCE])


def _bad_clips(
    store: TokenSource, modality: str, clips: npt.NDArray[np.int64]
) -> list[ClipModality]:
    bad: list[ClipModality] = []
    for index in _pieces(clips):
        finite = store.gather(modality, index).isfinite().flatten(1).all(dim=1)
        bad += [(store.clip_ids[i].decode(), modality) for i in index[~finite].tolist()]
    return bad
