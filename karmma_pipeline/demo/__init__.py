"""What ``karmma demo`` runs: its recipes and its commands, as data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from karmma_pipeline import config, files
from karmma_pipeline.jobs import cpu_count
from karmma_pipeline.recipes import COMMANDS, project, recipe_model

RECIPES = ("extract", "teacher", "baseline", "baseline_delta", "student")
"""The recipes that the sweep trains with, after that of the extraction, in legend order."""

END_TO_END = "student_end_to_end"
"""One more, if it is asked for: the student whose networks train, too."""


@dataclass(frozen=True)
class _Amount:
    clips: int
    test: int
    epochs: int
    seeds: tuple[int, ...]


# Peak of the networks' learning rate, a third of the fusion block's: they know the task already.
_SUFFIX_LR = 3e-4

_FULL = _Amount(clips=700, test=300, epochs=15, seeds=(0, 1, 2))
_QUICK = _Amount(clips=64, test=32, epochs=2, seeds=(0,))


def commands(out: Path, *, quick: bool = False, seed: int = 0) -> list[list[str]]:
    """Return the arguments of each ``karmma`` command of the demo, in order.

    The recipes that they name are those of `write_recipes`, in ``out/recipes``.

    Args:
        out: folder of everything that the demo writes.
        quick: a few clips and epochs, one seed: shows every step, not accuracy.
        seed: of the data.
    """
    amount = _QUICK if quick else _FULL
    clips = ["--clips", str(amount.clips), "--test", str(amount.test), "--seed", str(seed)]
    recipes = out / "recipes"
    return [
        ["sample", str(out / "clips"), *clips],
        ["extract", str(recipes / "extract.yaml")],
        ["sweep", str(recipes / "sweep.yaml")],
    ]


def write_recipes(out: Path, *, quick: bool = False, end_to_end: bool = False) -> dict[str, Path]:
    """Write the recipes of `commands` to ``out/recipes``; return their paths by name.

    ``sweep`` trains each of `RECIPES` with several seeds, epochs chosen on the split val, and
    reports on the split test. ``end_to_end``: and `END_TO_END`.
    """
    amount = _QUICK if quick else _FULL
    recipes = project("demo", out / "clips" / "manifest.csv", out, epochs=amount.epochs)
    # The networks are so small that decoding takes the time; half of two CPUs take twice as long.
    # More than four processes take longer to start than they save.
    workers = [f"decode.workers={min(4, cpu_count())}"]
    tree = recipes["extract"].model_dump(mode="json")
    names, kinds = list(RECIPES), dict(COMMANDS)
    if end_to_end:
        student = recipes["student"].model_dump(mode="json") | _end_to_end(out, tree["sets"])
        recipes[END_TO_END] = config.build(recipe_model("distill"), student, END_TO_END)
        names, kinds[END_TO_END] = [*names, END_TO_END], COMMANDS["student"]
    recipes["extract"] = config.build(recipe_model("extract"), tree, "extract", workers)
    paths = {name: out / "recipes" / f"{name}.yaml" for name in (*names, "sweep")}
    methods = {n: {"command": kinds[n], "recipe": str(paths[n])} for n in names[1:]}
    for name, method in methods.items():
        if kinds[name] == COMMANDS["student"]:
            method["teacher"] = "teacher"
    report = {"split": "test", "title": "Digits in motion"}
    sweep = {
        "out": out, "methods": methods, "seeds": amount.seeds, "evaluate": {"set": report},
    }  # fmt: skip
    recipes["sweep"] = config.build(recipe_model("sweep"), sweep, "sweep")
    for name, path in paths.items():
        title = f"# karmma {kinds.get(name, name)} {path}\n\n"
        files.write_text(path, title + config.template(type(recipes[name]), recipes[name]))
    return paths


def _end_to_end(out: Path, sets: dict[str, Any]) -> dict[str, Any]:
    """Add the set of the student's networks before their inputs; return what its training has."""
    sets["end_to_end"] = {m: {**choice, "cut": "input"} for m, choice in sets["student"].items()}
    return {
        "store": str(out / "features" / "end_to_end"),
        "out": str(out / "runs" / END_TO_END),
        "name": "Student, end to end (distilled)",
        "suffix": {"lr": _SUFFIX_LR},
    }
