"""Which clips of a report are shown as pictures: by a seeded rule, never by hand.

N clips, S subsets, C classes of a head.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from safetensors import safe_open

from karmma_pipeline.evaluation.results import metric_names
from karmma_pipeline.metrics import metric_correct

Kind = Literal["correct", "wrong", "rescued"]
KINDS: tuple[Kind, ...] = ("correct", "wrong", "rescued")


@dataclass(frozen=True)
class Shown:
    """A clip of the gallery: ``best`` and ``alone`` are classes per head, -1 for none.

    best: with all modalities that it has. alone: with the best single modality.
    """

    clip_id: str
    kind: Kind
    best: Mapping[str, int]
    alone: Mapping[str, int]


@dataclass(frozen=True)
class Choice:
    """The clips of a gallery, and the sentence that says by which rule they were chosen."""

    rule: str
    alone: str
    clips: tuple[Shown, ...]


@dataclass(frozen=True)
class Picture:
    """A clip as the page shows it: the name of its video in ``gallery``, and what is said."""

    video: str
    kind: Kind
    lines: tuple[str, ...]


@dataclass(frozen=True)
class Gallery:
    """The gallery of a report's page."""

    rule: str
    pictures: tuple[Picture, ...]


def choose(logits: Path, count: int, seed: int) -> Choice:
    """Choose clips of a run by what it answered in an evaluation.

    Of each kind ``count`` are drawn without replacement, or all if there are fewer: clips that are
    right with all modalities and with the best single one; clips that are wrong with all; and
    rescued ones, which the best single modality has and gets wrong and all get right. The best
    single modality is the one that is right most often by itself. Clips without a label, or of
    which there is nothing to see, are left out.

    Args:
        logits: of the run, as the report has them.
        count: clips of each kind.
        seed: of the draw.
    """
    about, tensors = _read(logits)
    of_head = {k.removeprefix("logits."): v for k, v in tensors.items() if k.startswith("logits.")}
    labels = {head: tensors[f"labels.{head}"] for head in of_head}
    subsets = [tuple(subset) for subset in about["subsets"]]
    main = metric_names(of_head)[-1]
    known = np.all([of >= 0 for of in labels.values()], axis=0) & tensors["present"].any(axis=1)

    def right(place: int) -> npt.NDArray[np.bool_]:
        return metric_correct(main, {h: of[place] for h, of in of_head.items()}, labels, 1) & known

    every = right(0)  # the largest subset comes first
    singles = [place for place, subset in enumerate(subsets) if len(subset) == 1]
    present = {p: _has(subsets[p][0], subsets[0], tensors["present"]) for p in singles}
    best = max(singles, key=lambda place: int((right(place) & present[place]).sum()))
    alone = right(best) & present[best]
    pools: dict[Kind, npt.NDArray[np.bool_]] = {
        "correct": every & alone,
        "wrong": known & ~every,
        "rescued": every & ~alone & present[best],
    }
    rng, clips, said = np.random.default_rng(seed), list[Shown](), list[str]()
    ids = [bytes(row).rstrip(b"\0").decode() for row in tensors["clip_ids"]]
    for kind in KINDS:
        rows = np.flatnonzero(pools[kind])
        drawn = sorted(rng.permutation(rows)[:count].tolist())
        said.append(f"{len(drawn)} of {len(rows)} {kind}")
        clips += [
            Shown(ids[row], kind, _classes(of_head, 0, row), _classes(of_head, best, row))
            for row in drawn
        ]
    rule = (
        f"{about['name']}: {', '.join(said)}, sampled with seed {seed}; rescued: wrong with "
        f"{subsets[best][0]} alone, correct with all modalities"
    )
    return Choice(rule, subsets[best][0], tuple(clips))


def _read(path: Path) -> tuple[dict[str, Any], dict[str, npt.NDArray[Any]]]:
    with safe_open(path, "numpy") as file:
        about = json.loads(file.metadata()["karmma"])
        return about, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _has(
    modality: str, modalities: Sequence[str], present: npt.NDArray[np.uint8]
) -> npt.NDArray[np.bool_]:
    """Tell which clips have a modality; the largest subset names the columns in order."""
    return present[:, modalities.index(modality)].astype(bool)


def _classes(logits: Mapping[str, npt.NDArray[np.float32]], place: int, row: int) -> dict[str, int]:
    return {head: int(of[place, row].argmax()) for head, of in logits.items()}
