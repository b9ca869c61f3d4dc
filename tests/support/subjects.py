"""Choose settings on UTD-MHAD by leaving one training subject out, and never the test subjects.

A setting is trained once for each of the four subjects that are held out, and each seed; the last
epoch counts, for none may be chosen on the subject that is reported. The stores are those of
``karmma extract extract/utd_mhad.yaml --set dataset.val_subjects=[S] --set out=STORES/sS``.

``PYTHONPATH=.:tests python -m support.subjects STORES OUT train NAME COMMAND KEY=VALUE...`` trains
a setting (``teacher=NAME+NAME`` names those that were trained before), ``... compare NAME NAME...``
prints means and the paired differences to the first, which docs/experiments.md has.
"""

import resource
import sys
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from scipy.stats import t

import karmma_pipeline as km
from karmma_pipeline import config
from karmma_pipeline.metrics import drop_distribution
from karmma_pipeline.recipes import recipe_model

T = TypeVar("T")
SUBJECTS = (1, 3, 5, 7)
SEEDS = (0, 1)
TRAIN = {
    "train-teacher": km.train_teacher,
    "train-baseline": km.train_baseline,
    "distill": km.distill,
}
#: As in batch/utd_mhad.yaml.
COMMON: dict[str, Any] = {"batch_size": 32, "epochs": 60, "select_by": "epoch", "device": "cpu"}
TEACHER = {"dim": 128, "layers": 2, "attention_heads": 4, "ffn_width": 128, "head_width": 256}
STUDENT = {"dim": 64, "layers": 1, "attention_heads": 4, "ffn_width": 64, "head_width": 128}


def train(stores: Path, out: Path, name: str, command: str, given: Sequence[str]) -> None:
    """Train a setting on all subjects but one, each in turn, and keep what it answers rightly."""
    seeds = [int(s) for g in given if g.startswith("seeds=") for s in g[6:].split(",")] or SEEDS
    taught = [g.partition("=")[2].split("+") for g in given if g.startswith("teacher=")]
    changes = [g for g in given if not g.startswith(("seeds=", "teacher="))]
    began = _seconds()
    for seed in seeds:
        for subject in SUBJECTS:
            folder, store = out / name / f"s{subject}-{seed}", stores / f"s{subject}" / "sensors"
            if (folder / "right.npy").is_file():
                continue
            size = TEACHER if command == "train-teacher" else STUDENT
            tree: dict[str, Any] = {**COMMON, "store": str(store), "out": str(folder), "seed": seed}
            tree |= {"size": dict(size), "optimiser": {"lr": 2e-3}}
            if taught:
                tree["teacher"] = [str(out / of / folder.name) for of in taught[0]]
                tree["teacher_store"] = str(store)
            sets = [c.replace("SUBJECT", str(subject)) for c in changes]
            recipe: Any = config.build(recipe_model(command), tree, name, sets)
            TRAIN[command](recipe)
            np.save(folder / "right.npy", _right(folder, store))
    print(f"{name}: {_seconds() - began:.0f} CPU s")
    compare(out, [name])


def _right(run: Path, store: Path) -> npt.NDArray[np.bool_]:
    """Return what the last epoch answers rightly, [subsets, clips]."""
    model = km.load_model(run, checkpoint="last")
    modalities = model.network.modalities
    rows = []
    for subset in _subsets(modalities):
        said = km.predict(
            model, store, split="val", without=[m for m in modalities if m not in subset]
        )
        ((head, logits),) = said.logits.items()
        rows.append(logits.argmax(axis=1) == said.labels[head])
    return np.stack(rows)


def _subsets(modalities: Sequence[T]) -> list[tuple[T, ...]]:
    sizes = range(len(modalities), 0, -1)
    return [subset for size in sizes for subset in combinations(modalities, size)]


def compare(out: Path, names: Sequence[str]) -> None:
    """Print the mean over the drop curve and with everything, and differences to the first.

    The intervals are t intervals over the differences of the pairs of subject and seed.
    """
    first = _scores(out, names[0])
    for name in names:
        mine = _scores(out, name)
        each = np.array([*mine.values()])
        line = f"{name:32} curve {each[:, 0].mean():5.1f}  all {each[:, 1].mean():5.1f}"
        both = [key for key in mine if key in first]
        if name != names[0] and both:
            apart = np.array([mine[key] - first[key] for key in both])
            half = t.ppf(0.975, len(both) - 1) * apart.std(axis=0, ddof=1) / len(both) ** 0.5
            for place, what in enumerate(("curve", "all")):
                mean, ends = apart[:, place].mean(), half[place]
                line += f"  {what} {mean:+.1f} [{mean - ends:+.1f}, {mean + ends:+.1f}]"
            line += f" of {len(both)}"
        print(line)


def _scores(out: Path, name: str) -> dict[str, npt.NDArray[np.float64]]:
    """Return the mean over the drop curve and the complete view, in percent, by run."""
    found = {}
    for path in sorted((out / name).glob("*/right.npy")):
        right = np.load(path, allow_pickle=False).mean(axis=1)
        width = (len(right) + 1).bit_length() - 1
        masks = [tuple(i in kept for i in range(width)) for kept in _subsets(range(width))]
        curve = []
        for rate in range(10):
            chances = drop_distribution((True,) * width, rate / 10)
            curve.append(sum(chances[m] * of for m, of in zip(masks, right, strict=True)))
        found[path.parent.name] = 100 * np.array([np.mean(curve), right[0]])
    return found


def _seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    torch.set_num_threads(1)
    stores, out, (what, *rest) = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    if what == "train":
        train(stores, out, rest[0], rest[1], rest[2:])
    else:
        compare(out, rest)
