"""Validation: accuracy and loss with every native modality; each clip counts once."""

import math
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from karmma_pipeline.data.loading.clips import ClipModality, all_finite, non_finite
from karmma_pipeline.data.loading.loader import Batch, FeatureLoader
from karmma_pipeline.jobs import StopFlag
from karmma_pipeline.metrics import ACTION, action_correct, topk_correct
from karmma_pipeline.training.objective import UNKNOWN, cross_entropy
from karmma_pipeline.training.ranks import Ranks

Predict = Callable[[Batch], dict[str, Tensor]]


@torch.inference_mode()
def validate(
    predict: Predict,
    loader: FeatureLoader,
    ranks: Ranks,
    stop: StopFlag,
    unseen: Mapping[str, int] | None = None,
) -> tuple[dict[str, float | None], list[ClipModality]]:
    """Return loss and top-1 in percent per head and of the action, and this rank's bad clips.

    What no clip has a label for is None. ``unseen``: per head and of the action, clips with a
    label and without any modality, which no network is asked about: they count as wrong.

    Ranks share the clips of the loader, and only counts are summed, so that no clip is
    counted twice whatever the number of ranks. With logits that are not finite the loss is NaN,
    also where no label is known.

    Raises:
        StoppedError: a stop was asked for; all ranks leave together.
    """
    heads = tuple(loader.store.labels)
    totals = torch.zeros(3, len(heads) + 1, dtype=torch.float64)  # right, known, loss
    bad: list[ClipModality] = []
    for batch in loader.epoch(0):
        if stop.requested:
            break
        if not len(batch.clip_index):
            continue
        logits = {head: of.float().cpu() for head, of in predict(batch).items()}
        if not all_finite(logits):
            # Not raised here: the other ranks would wait in vain for this one's counts.
            bad += non_finite(loader.store, batch)
            totals[2] = torch.nan
        totals += _count(logits, batch, heads)
    stopping, summed = ranks.agree_to_stop(stop, totals.flatten())
    if stopping:
        stop.check("the state before validation is saved")
    right, known, loss = summed.view_as(totals)
    seen = known[:-1] > 0
    mean_loss = float((loss[:-1] / known[:-1].clamp(min=1))[seen].mean()) if seen.any() else None
    if not loss.isfinite().all():
        mean_loss = math.nan
    values: dict[str, float | None] = {"loss": mean_loss}
    for number, head in enumerate((*heads, ACTION)):
        every = float(known[number]) + (unseen or {}).get(head, 0)
        values[f"{head}_top1"] = 100 * float(right[number]) / every if every else None
    return values, bad


def _count(logits: dict[str, Tensor], batch: Batch, heads: tuple[str, ...]) -> Tensor:
    scores = {h: logits[h].numpy() for h in heads}
    truth = {h: batch.labels[h].numpy() for h in heads}
    known = [truth[h] != UNKNOWN for h in heads]
    right = [topk_correct(scores[h], truth[h], 1) for h in heads]
    known.append(np.logical_and.reduce(known))
    right.append(action_correct(scores, truth, 1))
    one = torch.ones(1, dtype=torch.float64)
    loss = [float(cross_entropy({h: logits[h]}, batch.labels, counts=one)) for h in heads]
    rows = [
        [float((r & k).sum()) for r, k in zip(right, known, strict=True)],
        [float(k.sum()) for k in known],
        [*loss, 0.0],
    ]
    return torch.tensor(rows, dtype=torch.float64)
