"""Accuracy as the official EPIC-KITCHENS-100 evaluator counts it, and what follows from it.

Pure functions of numpy arrays. N clips, C classes of a head, M modalities.
"""

import math
from collections.abc import Mapping
from itertools import product

import numpy as np
import numpy.typing as npt

Bools = npt.NDArray[np.bool_]
Scores = npt.NDArray[np.floating]
Labels = npt.NDArray[np.integer]

#: Name of the composite of all heads, where there are several.
ACTION = "action"

# Classes of each head that may form an action.
_CANDIDATES = 100
_ROWS = 256


def softmax(logits: Scores) -> npt.NDArray[np.float64]:
    """Return the probabilities of clips' classes, float64 [..., C]."""
    powers = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=-1, keepdims=True))


def topk_correct(logits: Scores, labels: Labels, k: int) -> Bools:
    """Tell for each clip whether its label is among the k highest scores.

    Args:
        logits: [N, C]; equal scores rank by class id.
        labels: [N], 0..C-1.
        k: how many may be named.
    """
    # Counting those behind it takes a tenth of the time that sorting hundreds of classes takes.
    classes = np.arange(logits.shape[1])
    here = labels[:, None] == classes
    mine = np.max(logits, axis=1, where=here, initial=-np.inf, keepdims=True)
    behind = (logits < mine) | ((logits == mine) & (classes > labels[:, None]))
    return here.any(axis=1) & (len(classes) - 1 - behind.sum(axis=1) < k)


def metric_correct(
    metric: str, logits: Mapping[str, Scores], labels: Mapping[str, Labels], k: int
) -> Bools:
    """Tell which clips are right by a metric: a head's name, else the composite of all heads."""
    if metric in logits:
        return topk_correct(logits[metric], labels[metric], k)
    return action_correct(logits, labels, k)


def action_correct(logits: Mapping[str, Scores], labels: Mapping[str, Labels], k: int) -> Bools:
    """Tell for each clip whether its action is among the k best.

    With several heads an action is one class of each; its score is the product of the heads'
    probabilities. As in the official evaluator only the 100 best classes of each head form
    candidates. Top-1 is therefore: every head right.
    """
    heads = list(logits)
    if len(heads) == 1:
        return topk_correct(logits[heads[0]], labels[heads[0]], k)
    if k == 1:
        return np.stack([topk_correct(logits[h], labels[h], 1) for h in heads]).min(axis=0)
    N = len(labels[heads[0]])
    chunks = [
        _action_chunk(logits, labels, slice(i, i + _ROWS), min(k, _CANDIDATES))
        for i in range(0, N, _ROWS)
    ]
    return np.concatenate(chunks) if chunks else np.zeros(0, bool)


def _action_chunk(
    logits: Mapping[str, Scores], labels: Mapping[str, Labels], rows: slice, k: int
) -> Bools:
    clips = len(next(iter(labels.values()))[rows])
    total, right = np.zeros((clips, 1)), np.ones((clips, 1), bool)  # [rows, candidates so far]
    for head, scores in logits.items():
        # Only the k best of each side go on: of every other pair k are better, or equal and first.
        best = np.argsort(-scores[rows], axis=1, kind="stable")[:, :k]
        part = np.asarray(scores[rows], np.float64)
        log_p = np.take_along_axis(part - _log_sum_exp(part), best, axis=1)
        hit = best == labels[head][rows, None]
        total = (total[:, :, None] + log_p[:, None]).reshape(clips, -1)
        right = (right[:, :, None] & hit[:, None]).reshape(clips, -1)
        ranked = np.argsort(-total, axis=1, kind="stable")[:, :k]
        total = np.take_along_axis(total, ranked, axis=1)
        right = np.take_along_axis(right, ranked, axis=1)
    return np.asarray(right.any(axis=1))


def _log_sum_exp(scores: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    top = scores.max(axis=1, keepdims=True)
    return top + np.log(np.exp(scores - top).sum(axis=1, keepdims=True))


def mean_class_accuracy(correct: Bools, labels: Labels) -> float:
    """Return the mean over the classes that occur of the share of right clips, 0 to 1.

    Of no clips it is NaN.
    """
    if not len(labels):
        return math.nan
    counts = np.bincount(labels)
    hits = np.bincount(labels, correct, len(counts))
    return float((hits[counts > 0] / counts[counts > 0]).mean())


def wilson_interval(correct: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Return the Wilson score interval of a share, 0 to 1; z is 1.96 for 95 %."""
    if n == 0:
        return 0.0, 1.0
    p, z2 = correct / n, z * z
    centre, spread = p + z2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    low, high = (centre - spread) / (1 + z2 / n), (centre + spread) / (1 + z2 / n)
    # Rounding may put an end on the wrong side of the share itself, at 0 and at 1.
    return max(0.0, min(low, p)), min(1.0, max(high, p))


def kept_distribution(count: int, rate: float) -> npt.NDArray[np.float64]:
    """Return the probability that 0..count of so many modalities are left, [count + 1].

    Each drops with ``rate``; if all fall out, one is restored. All that keep as many are as likely.
    """
    chances = np.array(
        [math.comb(count, k) * (1 - rate) ** k * rate ** (count - k) for k in range(count + 1)]
    )
    if count:
        chances[1] += chances[0]
        chances[0] = 0.0
    return chances


def drop_distribution(present: tuple[bool, ...], rate: float) -> dict[tuple[bool, ...], float]:
    """Return the probability of each mask when every present modality drops with ``rate``.

    If all of the present ones fall out, one of them, drawn uniformly, is restored: the rule
    that reproduces the paper's drop curves. A clip with nothing present keeps nothing.
    """
    count = sum(present)
    if count == 0:
        return {present: 1.0}
    chances: dict[tuple[bool, ...], float] = {}
    for kept in product((False, True), repeat=len(present)):
        if any(k and not p for k, p in zip(kept, present, strict=True)) or not any(kept):
            continue
        chance = (1 - rate) ** sum(kept) * rate ** (count - sum(kept))
        if sum(kept) == 1:
            chance += rate**count / count
        chances[kept] = chance
    return chances
