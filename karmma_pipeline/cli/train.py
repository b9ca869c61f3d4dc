"""`karmma train-teacher`, `train-baseline` and `distill`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from karmma_pipeline.cli.options import check_option, load_recipe, recipe_argument, set_option

if TYPE_CHECKING:
    from collections.abc import Callable

    from karmma_pipeline.config import Recipe


@click.command("train-teacher")
@recipe_argument
@set_option
@check_option
def train_teacher(recipe: Path, overrides: tuple[str, ...], check: bool) -> None:
    """Train the multimodal teacher on cached tokens."""
    from karmma_pipeline.train.recipe import TeacherRecipe

    resolved = load_recipe(TeacherRecipe, recipe, overrides, check)
    from karmma_pipeline.train import stages

    _train(stages.train_teacher, resolved)


@click.command("train-baseline")
@recipe_argument
@set_option
@check_option
def train_baseline(recipe: Path, overrides: tuple[str, ...], check: bool) -> None:
    """Train the student's architecture without a teacher: Baseline and Baseline w/ delta."""
    from karmma_pipeline.train.recipe import BaselineRecipe

    resolved = load_recipe(BaselineRecipe, recipe, overrides, check)
    from karmma_pipeline.train import stages

    _train(stages.train_baseline, resolved)


@click.command()
@recipe_argument
@set_option
@check_option
def distill(recipe: Path, overrides: tuple[str, ...], check: bool) -> None:
    """Train the student to follow the teacher under the same missing modalities."""
    from karmma_pipeline.train.recipe import DistillRecipe

    resolved = load_recipe(DistillRecipe, recipe, overrides, check)
    from karmma_pipeline.train import stages

    _train(stages.distill, resolved)


def _train(run: Callable[..., Any], recipe: Recipe) -> None:
    """Train; of several ranks under torchrun the first speaks for all that end alike."""
    from karmma_pipeline.errors import StoppedError
    from karmma_pipeline.jobs import StopFlag
    from karmma_pipeline.train.ranks import Ranks

    main = Ranks.from_environment().main
    try:
        with StopFlag() as stop:
            report = run(recipe, stop=stop)
    except StoppedError as error:
        if main:
            raise
        raise click.exceptions.Exit(error.exit_code) from None
    if main:
        click.echo(report.summary())
