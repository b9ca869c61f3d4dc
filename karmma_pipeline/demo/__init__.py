"""``karmma demo``: the whole road on generated clips, stage by stage, each a printed command."""

import shlex
import time
from importlib.resources import files as package_files
from pathlib import Path
from string import Template

import click

from karmma_pipeline import files

RECIPES = ("extract", "teacher", "baseline", "baseline_delta", "student")
_FULL = {"clips": "700", "epochs": "25"}
_QUICK = {"clips": "64", "epochs": "2"}


def run_demo(out: Path, *, quick: bool = False, seed: int = 0) -> None:
    """Run sample, extract, train, distill and evaluate into ``out``; run again, it goes on.

    Args:
        out: folder; the recipes that are used are written to ``out/recipes``.
        quick: a few clips and epochs; shows the road, not accuracy.
        seed: of the data and of every training.
    """
    values = {**(_QUICK if quick else _FULL), "out": str(out), "seed": str(seed)}
    recipes = write_recipes(out / "recipes", values)
    runs = {name: str(out / "runs" / name) for name in RECIPES[1:]}
    stores = [str(out / "features" / name) for name in ("teacher", "student")]
    started = time.monotonic()
    click.echo("Each stage is a command that you can run by itself:\n")
    _run("sample", str(out / "clips"), "--clips", values["clips"], "--seed", str(seed))
    _run("extract", recipes["extract"])
    _run("train-teacher", recipes["teacher"])
    _run("train-baseline", recipes["baseline"])
    _run("train-baseline", recipes["baseline_delta"])
    _run("distill", recipes["student"])
    _run(
        "evaluate",
        *runs.values(),
        *(word for store in stores for word in ("--store", store)),
        "--out",
        str(out / "report"),
        "--set",
        "title=Digits in motion",
        "--set",
        "memory=true",
    )
    click.echo(f"\n{time.monotonic() - started:.0f} s in all. Open {out / 'report' / 'index.html'}")


def write_recipes(folder: Path, values: dict[str, str]) -> dict[str, str]:
    """Fill in the recipes of the demo and return their paths by name."""
    source = package_files("karmma_pipeline.demo")
    paths = {}
    for name in RECIPES:
        text = source.joinpath(f"{name}.yaml").read_text("utf-8")
        files.write_text(folder / f"{name}.yaml", Template(text).substitute(values))
        paths[name] = str(folder / f"{name}.yaml")
    return paths


def _run(*arguments: str) -> None:
    from karmma_pipeline.cli import main

    click.secho(f"$ karmma {shlex.join(arguments)}", bold=True)
    main.main(list(arguments), prog_name="karmma", standalone_mode=False)
    click.echo()
