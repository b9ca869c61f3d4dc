"""From logits to scores: every subset, and accuracy while modalities drop out.

The subsets are evaluated once; a drop curve follows from them exactly, because a mask is a
subset: its expected value needs no sampling. S subsets, N clips, M modalities.
"""

import csv
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from karmma_pipeline import files, metrics
from karmma_pipeline.data.loading.masks import clip_keys, modality_mask
from karmma_pipeline.data.manifest import SIDECAR
from karmma_pipeline.errors import ManifestError
from karmma_pipeline.evaluation import results
from karmma_pipeline.evaluation.costs import model_costs
from karmma_pipeline.evaluation.paper import SIZES
from karmma_pipeline.evaluation.predict import Predictions
from karmma_pipeline.evaluation.recipe import EvaluateRecipe, GroupFiles
from karmma_pipeline.modalities import Reason
from karmma_pipeline.models.saved import WEIGHTS

Bools = npt.NDArray[np.bool_]
TOP = (1, 5)
_Z = 1.959964

_MEMORY_NOTE = "Peak memory: one clip, float32, in a process of its own. "
_NO_LABELS = "No clip of this split has a label: there is no accuracy, only logits and submissions."


def clip_facts(run: Predictions, recipe: EvaluateRecipe) -> results.Data:
    """Return what the report says of the clips, which are the same for every run."""
    heads = {head: tuple(names) for head, names in run.card.heads.items()}
    counts = {
        head: np.bincount(run.labels[head][run.labels[head] >= 0], minlength=len(names))
        for head, names in heads.items()
    }
    modalities = run.store.modalities
    notes = [] if any(c.any() for c in counts.values()) else [_NO_LABELS]
    if recipe.exclude is not None:
        notes.append(f"The clips that {recipe.exclude} lists are left out.")
    return results.Data(
        name=recipe.title or run.store.path.resolve().parent.name,
        split=recipe.split,
        clips=len(run.clips),
        official_clips=recipe.official_clips,
        complete=int(run.present.all(axis=1).sum()),
        empty=int((~run.present.any(axis=1)).sum()),
        present={m: int(run.present[:, i].sum()) for i, m in enumerate(modalities)},
        reasons={m: _count_reasons(run, i) for i, m in enumerate(modalities)},
        heads=heads,
        class_clips={head: tuple(c.tolist()) for head, c in counts.items()},
        constant=_majority_class(run, counts),
        notes=tuple(notes),
    )


def _count_reasons(run: Predictions, modality: int) -> dict[str, int]:
    codes = Counter(np.asarray(run.store.reasons)[run.clips, modality].tolist())
    return {Reason(c).name.lower(): n for c, n in sorted(codes.items()) if c != Reason.PRESENT}


def _majority_class(run: Predictions, counts: dict[str, npt.NDArray[np.int64]]) -> dict[str, float]:
    """Return the accuracy of naming the most frequent class, or combination of classes."""
    accuracy = {head: 100 * float(c.max() / max(1, c.sum())) for head, c in counts.items()}
    if len(counts) > 1:
        labels = np.stack([run.labels[h] for h in counts], axis=1)
        labels = labels[(labels >= 0).all(axis=1)]
        actions = Counter(map(tuple, labels.tolist()))
        accuracy[results.ACTION] = 100 * max(actions.values(), default=0) / max(1, len(labels))
    return accuracy


def run_result(
    run: Predictions, folder: Path, recipe: EvaluateRecipe, device: torch.device
) -> results.RunResult:
    """Return everything that the report says of one run, saved in a folder."""
    correct, card = Correct(run), run.card
    kind = "teacher" if card.kind == "teacher" else "student"
    return results.RunResult(
        name=run.name,
        kind=card.kind,
        seed=card.training.get("seed"),
        weights={m: str(p.get("weights", "?")) for m, p in card.provenance.items()},
        size=card.size.model_dump(),
        paper_size=card.size == SIZES[kind].model_copy(update={"absent": card.size.absent}),
        model_digest=files.sha256(folder / recipe.checkpoint / WEIGHTS),
        store_digest=run.store.digest,
        subsets=tuple(subset_scores(correct, find_groups(run, recipe.groups))),
        drop=tuple(drop_curves(correct, recipe)),
        costs=tuple(model_costs(card, device, recipe.memory)) if recipe.costs else (),
        cost_note=_MEMORY_NOTE if recipe.costs and recipe.memory else "",
        class_correct={head: _correct_per_class(correct, head) for head in run.labels},
    )


def _correct_per_class(correct: "Correct", head: str) -> tuple[int, ...]:
    """Return the clips answered rightly with every modality, by class."""
    labels, known = correct.run.labels[head], correct.known[head]
    right = correct.table[head, 1][0][known]  # the largest subset comes first
    return tuple(
        np.bincount(labels[known][right], minlength=len(correct.run.card.heads[head])).tolist()
    )


class Correct:
    """Right or wrong for every subset and clip, per head and `action`: bool [S, N].

    A clip that has none of a subset's modalities is wrong there, whatever the model says.
    """

    def __init__(self, run: Predictions) -> None:
        self.run = run
        heads = list(run.logits)
        self.metrics = results.metric_names(heads)
        modalities = run.store.modalities
        columns = np.array([[m in subset for m in modalities] for subset in run.subsets])
        self.seen = np.stack([(run.present & column).any(axis=1) for column in columns])
        # A mask read as a binary number finds its subset without a search. That of no modality
        # is no subset: it finds 0, and whoever asks must look at the mask too.
        self._bits = 1 << np.arange(len(modalities))
        self._number_of = np.zeros(2 ** len(modalities), np.int64)
        self._number_of[columns @ self._bits] = np.arange(len(columns))
        known = np.stack([run.labels[h] >= 0 for h in heads]).all(axis=0)
        self.known = {**{h: run.labels[h] >= 0 for h in heads}, results.ACTION: known}
        self.table = {(m, k): self._table(m, k) for m in self.metrics for k in TOP}

    def _table(self, metric: str, k: int) -> Bools:
        run = self.run
        rows = []
        for number in range(len(run.subsets)):
            if metric in run.logits:
                rows.append(metrics.topk_correct(run.logits[metric][number], run.labels[metric], k))
            else:
                logits = {h: v[number] for h, v in run.logits.items()}
                rows.append(metrics.action_correct(logits, run.labels, k))
        return np.stack(rows) & self.seen

    def subset_number(self, masks: Bools) -> npt.NDArray[np.int64]:
        """Return which subset each mask [..., M] is."""
        return self._number_of[masks @ self._bits]

    def clips(self, protocol: results.Protocol) -> Bools:
        """Return which clips a protocol counts, bool [N]."""
        present = self.run.present
        every: Bools = np.asarray(present.all(axis=1), bool)
        return every if protocol == "complete" else np.ones(len(present), bool)


def score(correct: Bools) -> results.Score:
    """Return the share of right clips in percent with its Wilson interval."""
    n, right = len(correct), int(correct.sum())
    low, high = metrics.wilson_interval(right, n)
    value = 100 * right / n if n else 0.0
    return results.Score(correct=right, n=n, value=value, low=100 * low, high=100 * high)


def subset_scores(correct: Correct, groups: dict[str, Bools]) -> Iterator[results.SubsetScores]:
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
                    mean = metrics.mean_class_accuracy(table[number, rows], truth)
                    mean_class[metric] = 100 * mean
            for name, members in groups.items():
                metric = name.partition("_")[2]
                rows = counted & correct.known[metric] & members
                scores[name] = score(correct.table[metric, 1][number, rows])
            yield results.SubsetScores(
                modalities=subset,
                protocol=protocol,
                clips=int(counted.sum()),
                without=int((counted & ~correct.seen[number]).sum()),
                scores=scores,
                mean_class=mean_class,
            )


def drop_curves(correct: Correct, recipe: EvaluateRecipe) -> Iterator[results.DropCurve]:
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
            yield results.DropCurve(head=metric, protocol=protocol, points=points)


def _point(
    correct: Correct, metric: str, rows: Bools, rate: float, recipe: EvaluateRecipe
) -> results.DropPoint:
    table = correct.table[metric, 1][:, rows].astype(np.float64)  # [S, rows]
    present = correct.run.present[rows]
    per_clip = (_chances(correct, present, rate) * table).sum(axis=0)
    if not len(per_clip):
        per_clip = np.zeros(1)  # no clip has a label
    # The mean over masks is exact, so the interval is over clips alone: how far the mean would
    # move with other clips of the kind (normal approximation).
    expected = float(per_clip.mean())
    spread = _Z * float(per_clip.std()) / len(per_clip) ** 0.5
    return results.DropPoint(
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
    chances = np.zeros((len(correct.seen), len(present)))
    patterns, which = np.unique(present, axis=0, return_inverse=True)
    for i, pattern in enumerate(patterns):
        for mask, chance in metrics.drop_distribution(tuple(pattern.tolist()), rate).items():
            if any(mask):  # nothing present: wrong with any mask
                chances[correct.subset_number(np.array(mask)), which == i] = chance
    return chances


def _sampled(
    correct: Correct,
    table: npt.NDArray[np.float64],
    present: Bools,
    rows: Bools,
    rate: float,
    recipe: EvaluateRecipe,
) -> results.Sampled:
    keys = clip_keys(correct.run.clip_ids[rows])
    values = []
    for draw in range(recipe.draws):
        mask = modality_mask(recipe.seed, draw, keys, present, rate)
        right = table[correct.subset_number(mask), np.arange(len(mask))] * mask.any(axis=1)
        values.append(float(right.mean()) if len(right) else 0.0)
    low, high = np.quantile(values, [0.025, 0.975])
    return results.Sampled(
        mean=_percent(float(np.mean(values))), low=_percent(float(low)), high=_percent(float(high))
    )


def find_groups(run: Predictions, lists: GroupFiles) -> dict[str, Bools]:
    """Return ``unseen_HEAD`` and ``tail_HEAD`` masks [N], as EPIC-KITCHENS-100 defines them.

    A tail action has a tail class in any head (the official evaluator's OR). Where the recipe
    names no lists, those of the data set count, which extraction has left beside the store.
    """
    published = _published(run.store.path.parent / SIDECAR)
    groups: dict[str, Bools] = {}
    participants = _first_column(lists.unseen) if lists.unseen else published.get("unseen", [])
    if participants:
        unseen = np.isin(run.store.group[run.clips], participants)
        groups |= {f"unseen_{name}": unseen for name in results.metric_names(run.labels)}
    tails = []
    for head, ids in _tail_ids(run, lists, published).items():
        groups[f"tail_{head}"] = np.isin(run.labels[head], ids)
        tails.append(groups[f"tail_{head}"])
    if len(run.labels) > 1 and tails:
        groups[f"tail_{results.ACTION}"] = np.logical_or.reduce(tails)
    return groups


def _tail_ids(
    run: Predictions, lists: GroupFiles, published: dict[str, Any]
) -> dict[str, list[int]]:
    if not lists.tail:
        return {head: ids for head, ids in published.get("tail", {}).items() if head in run.labels}
    class_ids = {}
    for head, path in lists.tail.items():
        if head not in run.labels:
            raise ManifestError(
                f"groups.tail: head {head!r} is unknown; there are: {list(run.labels)}."
            )
        class_ids[head] = [
            _class_id(path, cell, run.card.heads[head]) for cell in _first_column(path)
        ]
    return class_ids


def _published(path: Path) -> dict[str, Any]:
    """Return the sidecar of the store's data set; nothing if there is none."""
    if not path.is_file():
        return {}
    try:
        published = json.loads(path.read_text())
        return {
            "unseen": [str(name) for name in published["unseen"]],
            "tail": {str(head): [int(i) for i in ids] for head, ids in published["tail"].items()},
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
