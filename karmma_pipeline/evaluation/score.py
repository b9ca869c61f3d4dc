"""From logits to scores: every subset that was evaluated. S subsets, N clips, M modalities."""

import csv
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from karmma_pipeline import metrics
from karmma_pipeline.data.manifest import SIDECAR
from karmma_pipeline.errors import ManifestError, counted
from karmma_pipeline.evaluation import results
from karmma_pipeline.evaluation.complete_view import calibration, confusion
from karmma_pipeline.evaluation.costs import model_costs
from karmma_pipeline.evaluation.drop_curve import Correct, drop_curves
from karmma_pipeline.evaluation.paper import SIZES
from karmma_pipeline.evaluation.predict import SubsetLogits
from karmma_pipeline.evaluation.recipe import EvaluateRecipe, GroupFiles, data_name
from karmma_pipeline.jobs import StopFlag
from karmma_pipeline.modalities import Reason
from karmma_pipeline.store import TokenSource
from karmma_pipeline.store.spec import ClipNumbers

Bools = npt.NDArray[np.bool_]
_MEMORY_NOTE = "Peak memory: one clip, float32, in a separate process. "
_NO_LABELS = (
    "No clip of this split has a label; only logits and submission files are written, no "
    "accuracies."
)


def clip_facts(run: SubsetLogits, recipe: EvaluateRecipe) -> results.Data:
    """Return what the report says of the clips, which are the same for every run."""
    heads = {head: tuple(names) for head, names in run.card.heads.items()}
    counts = {
        head: np.bincount(run.labels[head][run.labels[head] >= 0], minlength=len(names))
        for head, names in heads.items()
    }
    modalities = run.store.modalities
    return results.Data(
        name=recipe.title or data_name(run.store.path),
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
        notes=tuple(_notes(run, recipe, counts)),
    )


def _notes(
    run: SubsetLogits, recipe: EvaluateRecipe, counts: dict[str, npt.NDArray[np.int64]]
) -> Iterator[str]:
    if not any(c.any() for c in counts.values()):
        yield _NO_LABELS
    for head, count in counts.items():
        if 0 < count.sum() < len(run.clips):
            unknown = counted(len(run.clips) - int(count.sum()), "clip")
            yield f"{unknown} without a known {head}: not counted."
    yield from getattr(run.store, "notes", ())
    if nothing := int((~run.present.any(axis=1)).sum()):
        yield f"{counted(nothing, 'clip')} without any modality: counted as wrong."
    if len(run.subsets) < 2 ** len(run.store.modalities) - 1:
        yield (
            f"Of all subsets of the {len(run.store.modalities)} modalities, {len(run.subsets)} "
            f"were evaluated. The drop curve is an estimate from these and {len(run.drawn)} "
            "random subsets of other sizes per clip; its intervals cover clips and draws."
        )
    if recipe.exclude is not None:
        yield f"The clips listed in {recipe.exclude} are excluded."


def _count_reasons(run: SubsetLogits, modality: int) -> dict[str, int]:
    codes = Counter(np.asarray(run.store.reasons)[run.clips, modality].tolist())
    return {Reason(c).label: n for c, n in sorted(codes.items()) if c != Reason.PRESENT}


def _majority_class(
    run: SubsetLogits, counts: dict[str, npt.NDArray[np.int64]]
) -> dict[str, float | None]:
    """Return the accuracy of naming the most frequent class, or combination of classes."""
    accuracy = {h: 100 * float(c.max() / c.sum()) if c.any() else None for h, c in counts.items()}
    if len(counts) > 1:
        labels = np.stack([run.labels[h] for h in counts], axis=1)
        labels = labels[(labels >= 0).all(axis=1)]
        actions = Counter(map(tuple, labels.tolist()))
        accuracy[metrics.ACTION] = 100 * max(actions.values()) / len(labels) if actions else None
    return accuracy


def run_result(
    correct: Correct, recipe: EvaluateRecipe, device: torch.device, stop: StopFlag
) -> results.RunResult:
    """Return everything that the report says of one run.

    Raises:
        StoppedError: a stop was asked for.
    """
    run, card = correct.run, correct.run.card
    kind = "teacher" if card.kind == "teacher" else "student"
    return results.RunResult(
        name=run.name,
        kind=card.kind,
        seed=card.training.get("seed"),
        weights={m: str(p.get("weights", "?")) for m, p in card.provenance.items()},
        size=card.size.model_dump(),
        paper_size=not card.model
        and card.size == SIZES[kind].model_copy(update={"absent": card.size.absent}),
        trained_on=card.training.get("train_split"),
        chosen_on=chosen_on(run),
        model_digest=card.weights_sha256,
        store_digest=run.store.digest,
        subsets=tuple(subset_scores(correct, find_groups(run.store, run.clips, recipe.groups))),
        drop=tuple(drop_curves(correct, recipe)),
        costs=tuple(model_costs(card, device, recipe.memory, stop)) if recipe.costs else (),
        cost_note=_MEMORY_NOTE if recipe.costs and recipe.memory else "",
        class_correct={head: _correct_per_class(correct, head) for head in run.labels},
        confusion=confusion(run) if recipe.classes else {},
        calibration=calibration(correct) if recipe.classes else {},
    )


def chosen_on(run: SubsetLogits) -> str | None:
    """Return the split on which a run's epoch was chosen; None if none chose it, or unknown."""
    training = run.card.training
    if run.checkpoint == "last" or training.get("select_by") == "epoch":
        return None
    return training.get("val_split")


def split_warnings(runs: Sequence[SubsetLogits], split: str) -> Iterator[str]:
    """Yield how the clips that are reported are those that shaped the models, if they are."""
    for what, of_run in (
        ("the best epoch was chosen", chosen_on),
        ("models were trained", lambda run: run.card.training.get("train_split")),
    ):
        names = {run.name: None for run in runs if of_run(run) and split in ("", of_run(run))}
        same = all(run.store.digest == run.card.store_digest for run in runs if run.name in names)
        if names:
            clips = f"the split {split!r}," if split else "all clips of the store, including those"
            where = "" if same else ", but in another store; make sure that no clip is in both"
            yield (
                f"This report evaluates {clips} on which {what} ({', '.join(names)}){where}. "
                "Such accuracies are optimistic."
            )


def _correct_per_class(correct: Correct, head: str) -> tuple[int, ...]:
    """Return the clips answered rightly with every modality, by class."""
    labels, known = correct.run.labels[head], correct.known[head]
    right = correct.table[head, 1][0][known]  # the largest subset comes first
    return tuple(
        np.bincount(labels[known][right], minlength=len(correct.run.card.heads[head])).tolist()
    )


def score(correct: Bools) -> results.Score:
    """Return the share of right clips in percent with its Wilson interval."""
    n, right = len(correct), int(correct.sum())
    if not n:
        return results.Score(correct=0, n=0, value=None, low=None, high=None)
    low, high = metrics.wilson_interval(right, n)
    return results.Score(correct=right, n=n, value=100 * right / n, low=100 * low, high=100 * high)


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
                    mean_class[metric] = 100 * mean if len(truth) else None
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


def find_groups(store: TokenSource, clips: ClipNumbers, lists: GroupFiles) -> dict[str, Bools]:
    """Return ``unseen_HEAD`` and ``tail_HEAD`` masks [N], as EPIC-KITCHENS-100 defines them.

    A tail action has a tail class in any head (the official evaluator's OR). Where the recipe
    names no lists, those of the data set count, which extraction has left beside the store.

    Raises:
        ManifestError: a list cannot be read, or names a head or class that the store does not have.
    """
    published = _published(store.path.parent / SIDECAR)
    labels = {head: np.asarray(of)[clips] for head, of in store.labels.items()}
    groups: dict[str, Bools] = {}
    participants = _first_column(lists.unseen) if lists.unseen else published.get("unseen", [])
    if participants:
        unseen = np.isin(store.group[clips], participants)
        groups |= {f"unseen_{name}": unseen for name in results.metric_names(labels)}
    tails = []
    for head, ids in _tail_ids(store, lists, published).items():
        groups[f"tail_{head}"] = np.isin(labels[head], ids)
        tails.append(groups[f"tail_{head}"])
    if len(labels) > 1 and tails:
        groups[f"tail_{metrics.ACTION}"] = np.logical_or.reduce(tails)
    return groups


def _tail_ids(
    store: TokenSource, lists: GroupFiles, published: dict[str, Any]
) -> dict[str, list[int]]:
    heads = store.heads
    if not lists.tail:
        return {head: ids for head, ids in published.get("tail", {}).items() if head in heads}
    if unknown := [head for head in lists.tail if head not in heads]:
        raise ManifestError(
            f"groups.tail: head {unknown[0]!r} is unknown; the heads are {[*heads]}."
        )
    return {
        head: [_class_id(path, cell, heads[head]) for cell in _first_column(path)]
        for head, path in lists.tail.items()
    }


def _published(path: Path) -> dict[str, Any]:
    """Return the sidecar of the store's data set; nothing if there is none."""
    if not path.is_file():
        return {}
    try:
        published = json.loads(path.read_text(encoding="utf-8"))
        return {
            "unseen": [str(name) for name in published["unseen"]],
            "tail": {str(head): [int(i) for i in ids] for head, ids in published["tail"].items()},
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ManifestError(
            f"{path}: cannot be read ({error}); remove the file, or run `karmma extract` again."
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
