"""The recipe model of each command, and matching recipes for a whole project.

Nothing heavy is imported before it is asked for.
"""

from __future__ import annotations

from importlib.resources import files as package_files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from karmma_pipeline.config import Recipe

ProjectSize = Literal["tiny", "demo", "laptop", "paper"]

COMMANDS = {
    "extract": "extract",
    "teacher": "train-teacher",
    "baseline": "train-baseline",
    "baseline_delta": "train-baseline",
    "student": "distill",
    "evaluation": "evaluate",
    "chain": "chain",
}
"""The recipes of a project, ``NAME.yaml``, to what `recipe_model` takes, in the order of use."""

_NAMES = {
    "teacher": "Teacher",
    "baseline": "Baseline",
    "baseline_delta": "Baseline w/ δ",
    "student": "Student (distilled)",
}


def recipe_model(command: str) -> type[Recipe]:
    """Return the recipe of a command, or of a ``chain``, a ``sweep`` or a ``site``."""
    if command == "extract":
        from karmma_pipeline.extraction.recipe import ExtractRecipe

        return ExtractRecipe
    if command == "evaluate":
        from karmma_pipeline.evaluation.recipe import EvaluateRecipe

        return EvaluateRecipe
    if command in {"chain", "sweep", "site"}:
        from karmma_pipeline.batch.recipe import Chain, Site, Sweep

        batch: dict[str, type[Recipe]] = {"chain": Chain, "sweep": Sweep, "site": Site}
        return batch[command]
    from karmma_pipeline.training.recipe import BaselineRecipe, DistillRecipe, TeacherRecipe

    models: dict[str, type[Recipe]] = {
        "train-teacher": TeacherRecipe,
        "train-baseline": BaselineRecipe,
        "distill": DistillRecipe,
    }
    return models[command]


def use_of(tree: dict[str, Any]) -> tuple[str, ...] | None:
    """Return the commands that take a recipe with these keys; None if they do not tell."""
    for key, commands in (
        ("sets", ("extract",)),
        ("runs", ("evaluate",)),
        ("stages", ("chain",)),
        ("methods", ("sweep",)),
        ("teacher", ("distill",)),
        ("store", ("train-teacher", "train-baseline")),
    ):
        if key in tree:
            return commands
    return None


def project(
    size: ProjectSize, manifest: Path, root: Path = Path(), **training: Any
) -> dict[str, Recipe]:
    """Return the recipes of `COMMANDS`, whose folders and networks fit each other.

    Args:
        size: tiny: small networks of random weights, for a first try; demo: those that were
            trained for the clips of `karmma sample`; laptop: small networks of published weights;
            paper: those of the paper, for a GPU.
        manifest: CSV of the clips.
        root: goes before the folders that the recipes name.
        training: keys of all trainings, such as ``epochs``.
    """
    from karmma_pipeline import config

    return {
        name: config.build(recipe_model(COMMANDS[name]), tree, name)
        for name, tree in _trees(size, manifest, root, training).items()
    }


def _trees(
    size: ProjectSize, manifest: Path, root: Path, training: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """Return the recipes as plain data, without the keys that keep their defaults."""
    from karmma_pipeline import config

    text = package_files("karmma_pipeline").joinpath("recipes.yaml").read_text("utf-8")
    given = config.parse_yaml(text, "recipes.yaml")[size]
    stores = {name: root / "features" / name for name in ("teacher", "student")}
    runs = {name: root / "runs" / name for name in _NAMES}
    trees: dict[str, dict[str, Any]] = {
        "extract": {"manifest": manifest, "out": root / "features", **given["extract"]}
    }
    for name, run in runs.items():
        store = stores["teacher" if name == "teacher" else "student"]
        tree = {"store": store, "out": run, "name": _NAMES[name]}
        trees[name] = tree | given["train"] | given[name] | training
    trees["student"] |= {"teacher": runs["teacher"], "teacher_store": stores["teacher"]}
    trees["evaluation"] = {
        "runs": list(runs.values()), "stores": list(stores.values()), "out": root / "report",
    }  # fmt: skip
    stages = {name: {"command": COMMANDS[name], "recipe": root / f"{name}.yaml"} for name in trees}
    return {**trees, "chain": {"folder": root / "jobs", "stages": stages}}
