"""From logits to scores: every subset, and accuracy while modalities drop out.

The subsets are evaluated once; a drop curve follows from them exactly, because a mask is a
subset: its expected value needs no sampling. S subsets, N clips, M modalities.
"""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from karmma_pipeline.data.loading.masks import clip_keys, modality_mask
from karmma_pipeline.data.manifest import SIDECAR
from karmma_pipeline.errors import ManifestError
from karmma_pipeline.evaluation.predict import Predictions
from karmma_pipeline.evaluation.recipe import EvaluateRecipe, GroupFiles
from karmma_pipeline.evaluation.results import (
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


def find_groups(run: Predictions, lists: GroupFiles) -> dict[str, Bools]:
    """Return ``unseen_HEAD`` and ``tail_HEAD`` masks [N], as EPIC-KITCHENS-100 defines them.

    A tail action has a tail class in any head (the official evaluator's OR). Where the recipe
    names no lists, those of the data set count, which extraction has left beside the store.
    """
    published = _published(run.store.path.parent / SIDECAR)
    heads = list(run.labels)
    metrics = [*heads, ACTION] if len(heads) > 1 else heads
    groups: dict[str, Bools] = {}
    participants = published.get("unseen", [])
    if lists.unseen is not None:
        participants = _first_column(lists.unseen)
    if participants:
        wanted = set(participants)
        unseen = np.isin(run.store.group[run.clips], sorted(wanted))
        groups |= {f"unseen_{metric}": unseen for metric in metrics}
    tails = []
    for head, ids in _tail_ids(run, lists, published).items():
        groups[f"tail_{head}"] = np.isin(run.labels[head], ids)
        tails.append(groups[f"tail_{head}"])
    if len(heads) > 1 and tails:
        groups[f"tail_{ACTION}"] = np.logical_or.reduce(tails)
    return groups


def _tail_ids(
    run: Predictions, lists: GroupFiles, published: dict[str, Any]
) -> dict[str, list[int]]:
    if not lists.tail:
        return {head: ids for head, ids in published.get("tail", {}).items() if head in run.labels}
    found = {}
    for head, path in lists.tail.items():
        if head not in run.labels:
            raise ManifestError(
                f"groups.tail: head {head!r} is unknown; there are: {list(run.labels)}."
            )
        found[head] = [_class_id(path, cell, run.card.heads[head]) for cell in _first_column(path)]
    return found


def _published(path: Path) -> dict[str, Any]:
    """Return the sidecar of the store's data set; nothing if there is none."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text())
        return {
            "unseen": [str(name) for name in found["unseen"]],
            "tail": {str(head): [int(i) for i in ids] for head, ids in found["tail"].items()},
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ManifestError(
            f"{path}: the data set's groups cannot be read ({error}); remove the file, or run "
            "`karmma extract` again."
        ) from None


def _first_column(path: Path) -> list[str]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.reader(file))
    except (OSError, UnicodeDecodeError) as error:
        raise ManifestError(f"{path}: the list cannot be read ({error}).") from None
    return [row[0].strip() for row in rows[1:] if row]


def _class_id(path: Path, cell: str, names: tuple[str, ...]) -> int:
    if cell.isdigit() and int(cell) < len(names):
        return int(cell)
    if cell in names:
        return names.index(cell)
    raise ManifestError(f"{path}: {cell!r} is neither a class id nor a class name.")
