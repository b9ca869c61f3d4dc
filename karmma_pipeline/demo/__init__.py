"""What ``karmma demo`` runs: its recipes and its commands, as data."""

from importlib.resources import files as package_files
from pathlib import Path
from string import Template

from karmma_pipeline import files

RECIPES = ("extract", "teacher", "baseline", "baseline_delta", "student")
_FULL = {"clips": "700", "epochs": "25"}
_QUICK = {"clips": "64", "epochs": "2"}


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
    clips = _values(out, quick, seed)["clips"]
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
    source = package_files("karmma_pipeline.demo")
    paths = {name: out / "recipes" / f"{name}.yaml" for name in RECIPES}
    for name, path in paths.items():
        text = source.joinpath(f"{name}.yaml").read_text("utf-8")
        files.write_text(path, Template(text).substitute(_values(out, quick, seed)))
    return paths


def _values(out: Path, quick: bool, seed: int) -> dict[str, str]:
    return {**(_QUICK if quick else _FULL), "out": str(out), "seed": str(seed)}
