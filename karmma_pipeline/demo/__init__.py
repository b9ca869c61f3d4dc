"""What ``karmma demo`` runs: its recipes and its commands, as data."""

from pathlib import Path

from karmma_pipeline import config, files
from karmma_pipeline.recipes import COMMANDS, project

RECIPES = ("extract", "teacher", "baseline", "baseline_delta", "student")
_FULL = {"clips": 700, "epochs": 25}
_QUICK = {"clips": 64, "epochs": 2}


def commands(out: Path, *, quick: bool = False, seed: int = 0) -> list[list[str]]:
    """Return the arguments of each ``karmma`` command of the demo, in order.

    The recipes that they name are those of `write_recipes`, in ``out/recipes``.

    Args:
        out: folder of everything that the demo writes.
        quick: a few clips and epochs: shows every step, not accuracy.
        seed: of the data and of every training.
    """
    recipes = out / "recipes"
    runs = [str(out / "runs" / name) for name in RECIPES[1:]]
    stores = [str(out / "features" / name) for name in ("teacher", "student")]
    clips = str(_values(quick)["clips"])
    return [
        ["sample", str(out / "clips"), "--clips", clips, "--seed", str(seed)],
        ["extract", str(recipes / "extract.yaml")],
        ["train-teacher", str(recipes / "teacher.yaml")],
        ["train-baseline", str(recipes / "baseline.yaml")],
        ["train-baseline", str(recipes / "baseline_delta.yaml")],
        ["distill", str(recipes / "student.yaml")],
        [
            "evaluate",
            *runs,
            *(word for store in stores for word in ("--store", store)),
            *("--out", str(out / "report")),
            *("--set", "title=Digits in motion"),
            *("--set", "memory=true"),
        ],
    ]


def write_recipes(out: Path, *, quick: bool = False, seed: int = 0) -> dict[str, Path]:
    """Write the recipes of `commands` to ``out/recipes``; return their paths by name."""
    training = {"epochs": _values(quick)["epochs"], "seed": seed}
    recipes = project("tiny", out / "clips" / "manifest.csv", out, **training)
    paths = {name: out / "recipes" / f"{name}.yaml" for name in RECIPES}
    for name, path in paths.items():
        title = f"# karmma {COMMANDS[name]} {path}\n\n"
        files.write_text(path, title + config.template(type(recipes[name]), recipes[name]))
    return paths


def _values(quick: bool) -> dict[str, int]:
    return _QUICK if quick else _FULL
