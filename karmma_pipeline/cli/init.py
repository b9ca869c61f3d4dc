"""`karmma init`: recipes to start from, one by one or of a whole project."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import click

from karmma_pipeline.cli.options import Commands
from karmma_pipeline.errors import ConfigError

STAGES = {
    "extract": ("karmma extract RECIPE", "a recipe for feature extraction"),
    "train-teacher": ("karmma train-teacher RECIPE", "a recipe for the multimodal teacher"),
    "train-baseline": ("karmma train-baseline RECIPE", "a recipe for a student without a teacher"),
    "distill": ("karmma distill RECIPE", "a recipe for distillation"),
    "evaluate": ("karmma evaluate --recipe RECIPE", "a recipe for the report"),
    "chain": ("karmma submit CHAIN", "a chain of all stages as batch jobs"),
    "sweep": ("karmma sweep SWEEP", "a sweep over methods, settings and seeds"),
    "site": ("karmma submit CHAIN --site SITE", "the settings of a cluster"),
}
"""Stages to how their recipe is used, and what it is."""

NEXT = "karmma plan extract.yaml"


@click.group(cls=Commands)
def init() -> None:
    """Write commented recipes to start from.

    `karmma init project` writes all recipes for a data set of your own; the others write one recipe
    each, with every key and its default.
    """


@init.command("project")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--manifest",
    type=click.Path(path_type=Path),
    required=True,
    help="CSV with the clips: clip_id, video, start, stop, labels, split.",
)
@click.option(
    "--size",
    type=click.Choice(["tiny", "laptop", "paper"]),
    default="laptop",
    show_default=True,
    help="tiny: random weights, no download; laptop: small networks; paper: for a GPU.",
)
def init_project(folder: Path, manifest: Path, size: Any) -> None:
    """Write the recipes of a whole project.

    Recipes for extraction, teacher, baselines, student, evaluation and a chain of all stages, with
    matching paths. Run the commands inside FOLDER.
    """
    from karmma_pipeline.recipes import COMMANDS, project

    if not manifest.is_file():
        raise ConfigError(
            f"--manifest {manifest}: no such file; give the CSV that lists the clips."
        )
    _refuse_existing([folder / f"{name}.yaml" for name in COMMANDS])
    here = folder.absolute()
    inside = manifest.absolute().is_relative_to(here)
    listed = manifest.absolute().relative_to(here) if inside else manifest.absolute()
    for name, recipe in project(size, listed).items():
        use = STAGES[COMMANDS[name]][0].rsplit(" ", 1)[0]
        path = folder / f"{name}.yaml"
        _write(path, f"# {use} {path.name}", type(recipe), recipe)
        click.echo(f"recipe: {path}")
    enter = "" if here == Path.cwd() else f"cd {folder} && "
    click.echo(f"next: {enter}{NEXT}")


def _stage(name: str, use: str, what: str) -> click.Command:
    @click.command(name, help=f"Write {what}.")
    @click.option("--out", type=click.Path(path_type=Path), help="File to write; default: print.")
    def command(out: Path | None) -> None:
        from karmma_pipeline import config
        from karmma_pipeline.recipes import recipe_model

        model = recipe_model(name)
        if out is None:
            click.echo(f"# Recipe for: {use}\n\n{config.template(model)}".rstrip())
            return
        _refuse_existing([out])
        _write(out, f"# Recipe for: {use}", model)
        click.echo(f"recipe: {out}")
        click.echo(f"next: {use.rsplit(' ', 1)[0]} {shlex.quote(str(out))}")

    return command


for _name, (_use, _what) in STAGES.items():
    init.add_command(_stage(_name, _use, _what))


def _refuse_existing(paths: list[Path]) -> None:
    for path in paths:
        if path.exists():
            raise ConfigError(f"{path}: the file exists; choose another name or remove it.")


def _write(path: Path, title: str, model: Any, values: Any = None) -> None:
    from karmma_pipeline import config, files

    files.write_text(path, f"{title}\n\n{config.template(model, values)}")
