"""From logits to scores: every subset, and accuracy while modalities drop out.

The subsets are evaluated once; a drop curve follows from them exactly, because a mask is a
subset: its expected value needs no sampling. S subsets, N clips, M modalities.
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from karmma_pipeline.data.masks import clip_keys, modality_mask
from karmma_pipeline.evaluate.predict import Predictions
from karmma_pipeline.evaluate.recipe import EvaluateRecipe
from karmma_pipeline.evaluate.results import (
    ACTION,
    DropCurve,
    DropPoint,
    Protocol,
    Sampled,
    Score,
    SubsetScores,
)
from karmma_pipeline.metrics import (
    action_correct,
    drop_distribution,
    mean_class_accuracy,
    topk_correct,
    wilson_interval,
)

Bools = npt.NDArray[np.bool_]
TOP = (1, 5)
_Z = 1.959964


class Correct:
    """Right or wrong for every subset and clip, per head and `action`: bool [S, N].

    A clip that has none of a subset's modalities is wrong there, whatever the model says.
    """

    def __init__(self, run: Predictions) -> None:
        self.run = run
        heads = list(run.logits)
        self.metrics = [*heads, ACTION] if len(heads) > 1 else heads
        self.columns = [np.array([m in s for m in run.store.modalities]) for s in run.subsets]
        self.seen = np.stack([(run.present & c).any(axis=1) for c in self.columns])
        known = np.stack([run.labels[h] >= 0 for h in heads]).all(axis=0)
        self.known = {**{h: run.labels[h] >= 0 for h in heads}, ACTION: known}
        self.table = {(m, k): self._table(m, k) for m in self.metrics for k in TOP}

    def _table(self, metric: str, k: int) -> Bools:
        run = self.run
        rows = []
        for number in range(len(run.subsets)):
            if metric in run.logits:
                rows.append(topk_correct(run.logits[metric][number], run.labels[metric], k))
            else:
                logits = {h: v[number] for h, v in run.logits.items()}
                rows.append(action_correct(logits, run.labels, k))
        return np.stack(rows) & self.seen

    def clips(self, protocol: Protocol) -> Bools:
        """Return which clips a protocol counts, bool [N]."""
        present = self.run.present
        every: Bools = np.asarray(present.all(axis=1), bool)
        return every if protocol == "complete" else np.ones(len(present), bool)


def score(correct: Bools) -> Score:
    """Return the share of right clips in percent with its Wilson interval."""
    n, right = len(correct), int(correct.sum())
    low, high = wilson_interval(right, n)
    value = 100 * right / n if n else 0.0
    return Score(correct=right, n=n, value=value, low=100 * low, high=100 * high)


def subset_scores(correct: Correct, groups: dict[str, Bools]) -> Iterator[SubsetScores]:
    """Yield the scores of every subset under both protocols.

    Args:
        correct: of one run.
        groups: such as ``tail_verb`` to bool [N]; the name ends with the metric it scores.
    """
    run = correct.run
    for protocol in ("all", "complete"):
        counted = correct.clips(protocol)
        for number, subset in enumerate(run.subsets):
            scores, mean_class = {}, {}
            for (metric, k), table in correct.table.items():
                rows = counted & correct.known[metric]
                scores[f"{metric}_top{k}"] = score(table[number, rows])
                if k == 1 and metric in run.labels:
                    truth = run.labels[metric][rows]
                    mean = mean_class_accuracy(table[number, rows], truth)
                    mean_class[metric] = 100 * mean
            for name, members in groups.items():
                metric = name.partition("_")[2]
                rows = counted & correct.known[metric] & members
                scores[name] = score(correct.table[metric, 1][number, rows])
            yield SubsetScores(
                modalities=subset,
                protocol=protocol,
                clips=int(counted.sum()),
                without=int((counted & ~correct.seen[number]).sum()),
                scores=scores,
                mean_class=mean_class,
            )


def drop_curves(correct: Correct, recipe: EvaluateRecipe) -> Iterator[DropCurve]:
    """Yield the drop curve of every metric under both protocols."""
    for protocol in ("all", "complete"):
        counted = correct.clips(protocol)
        if not counted.any():
            continue
        for metric in correct.metrics:
            rows = counted & correct.known[metric]
            points = tuple(
                _point(correct, metric, rows, rate, recipe) for rate in recipe.drop_rates
            )
            yield DropCurve(head=metric, protocol=protocol, points=points)


def _point(
    correct: Correct, metric: str, rows: Bools, rate: float, recipe: EvaluateRecipe
) -> DropPoint:
    table = correct.table[metric, 1][:, rows].astype(np.float64)  # [S, rows]
    present = correct.run.present[rows]
    per_clip = (_chances(correct, present, rate) * table).sum(axis=0)
    if not len(per_clip):
        per_clip = np.zeros(1)  # no clip has a label
    expected = float(per_clip.mean())
    spread = _Z * float(per_clip.std()) / len(per_clip) ** 0.5
    return DropPoint(
        rate=rate,
        expected=_percent(expected),
        low=_percent(expected - spread),
        high=_percent(expected + spread),
        sampled=_sampled(correct, table, present, rows, rate, recipe) if recipe.draws else None,
    )


def _percent(share: float) -> float:
    return min(100.0, max(0.0, 100 * share))


def _chances(correct: Correct, present: Bools, rate: float) -> npt.NDArray[np.float64]:
    """Return the probability of each subset for each clip, [S, N]."""
    number = {tuple(c.tolist()): i for i, c in enumerate(correct.columns)}
    chances = np.zeros((len(correct.columns), len(present)))
    patterns, which = np.unique(present, axis=0, return_inverse=True)
    for i, pattern in enumerate(patterns):
        for mask, chance in drop_distribution(tuple(pattern.tolist()), rate).items():
            if any(mask):  # nothing present: wrong with any mask
                chances[number[mask], which == i] = chance
    return chances


def _sampled(
    correct: Correct,
    table: npt.NDArray[np.float64],
    present: Bools,
    rows: Bools,
    rate: float,
    recipe: EvaluateRecipe,
) -> Sampled:
    keys = clip_keys(correct.run.clip_ids[rows])
    weights = 1 << np.arange(present.shape[1])
    number = np.zeros(2 ** present.shape[1], np.int64)
    for i, column in enumerate(correct.columns):
        number[int(column @ weights)] = i
    values = []
    for draw in range(recipe.draws):
        mask = modality_mask(recipe.seed, draw, keys, present, rate)
        found = table[number[mask @ weights], np.arange(len(mask))] * mask.any(axis=1)
        values.append(float(found.mean()) if len(found) else 0.0)
    low, high = np.quantile(values, [0.025, 0.975])
    return Sampled(
        mean=_percent(float(np.mean(values))), low=_percent(float(low)), high=_percent(float(high))
    )
