"""Groups of clips with scores of their own: unseen participants, tail classes."""

import csv
from pathlib import Path

import numpy as np
import numpy.typing as npt

from karmma_pipeline.errors import ManifestError
from karmma_pipeline.evaluate.predict import Predictions
from karmma_pipeline.evaluate.recipe import GroupFiles
from karmma_pipeline.evaluate.results import ACTION

Bools = npt.NDArray[np.bool_]


def find_groups(run: Predictions, lists: GroupFiles) -> dict[str, Bools]:
    """Return ``unseen_HEAD`` and ``tail_HEAD`` masks [N], as EPIC-KITCHENS-100 defines them.

    A tail action has a tail class in any head (the official evaluator's OR).
    """
    heads = list(run.labels)
    metrics = [*heads, ACTION] if len(heads) > 1 else heads
    groups: dict[str, Bools] = {}
    if lists.unseen is not None:
        wanted = set(_first_column(lists.unseen))
        unseen = np.isin(run.store.group[run.clips], sorted(wanted))
        groups |= {f"unseen_{metric}": unseen for metric in metrics}
    tails = []
    for head, path in lists.tail.items():
        if head not in run.labels:
            raise ManifestError(f"groups.tail: head {head!r} is unknown; there are: {heads}.")
        ids = [_class_id(path, cell, run.card.heads[head]) for cell in _first_column(path)]
        groups[f"tail_{head}"] = np.isin(run.labels[head], ids)
        tails.append(groups[f"tail_{head}"])
    if len(heads) > 1 and tails:
        groups[f"tail_{ACTION}"] = np.logical_or.reduce(tails)
    return groups


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
