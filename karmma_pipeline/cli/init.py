"""`karmma init`: recipes to start from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from karmma_pipeline.errors import ConfigError

if TYPE_CHECKING:
    from karmma_pipeline.config import Recipe

STAGES = ("extract", "train-teacher", "train-baseline", "distill", "evaluate")


@click.command()
@click.argument("stage", type=click.Choice(STAGES))
@click.option("--out", type=click.Path(path_type=Path), help="File to write; default: print.")
def init(stage: str, out: Path | None) -> None:
    """Write a commented recipe of a stage, with every key and its default."""
    from karmma_pipeline import config, files

    text = f"# Recipe for: karmma {stage} RECIPE\n\n{config.template(recipe_model(stage))}"
    if out is None:
        click.echo(text.rstrip())
        return
    if out.exists():
        raise ConfigError(f"--out {out}: the file exists; choose another name or remove it.")
    files.write_text(out, text)
    click.echo(f"recipe: {out}")


def recipe_model(stage: str) -> type[Recipe]:
    """Return the recipe of a stage."""
    if stage == "extract":
        from karmma_pipeline.extract.recipe import ExtractRecipe

        return ExtractRecipe
    if stage == "evaluate":
        from karmma_pipeline.evaluate.recipe import EvaluateRecipe

        return EvaluateRecipe
    from karmma_pipeline.train.recipe import BaselineRecipe, DistillRecipe, TeacherRecipe

    models: dict[str, type[Recipe]] = {
        "train-teacher": TeacherRecipe,
        "train-baseline": BaselineRecipe,
        "distill": DistillRecipe,
    }
    return models[stage]
