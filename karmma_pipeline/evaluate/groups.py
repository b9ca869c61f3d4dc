"""Groups of clips with scores of their own: unseen participants, tail classes."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from karmma_pipeline.data.manifest import SIDECAR
from karmma_pipeline.errors import ManifestError
from karmma_pipeline.evaluate.predict import Predictions
from karmma_pipeline.evaluate.recipe import GroupFiles
from karmma_pipeline.evaluate.results import ACTION

Bools = npt.NDArray[np.bool_]


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
