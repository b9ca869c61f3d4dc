"""`karmma train-teacher`, `train-baseline` and `distill`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from karmma_pipeline.cli.options import (
    check_option,
    finish,
    load_recipe,
    next_command,
    recipe_argument,
    set_option,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from karmma_pipeline.config import Recipe

_stage_option = click.option(
    "--stage",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Copy the store to this folder on a local disk first; overrides loader.stage.",
)


@click.command("train-teacher")
@recipe_argument
@set_option
@_stage_option
@check_option
def train_teacher(
    recipe: Path, overrides: tuple[str, ...], stage: Path | None, check: bool
) -> None:
    """Train the multimodal teacher on cached tokens."""
    resolved = load_recipe("train-teacher", recipe, _with_stage(overrides, stage), check)
    from karmma_pipeline.training import stages

    _train(stages.train_teacher, resolved, next_command(recipe, "student", "distill"))


@click.command("train-baseline")
@recipe_argument
@set_option
@_stage_option
@check_option
def train_baseline(
    recipe: Path, overrides: tuple[str, ...], stage: Path | None, check: bool
) -> None:
    """Train the student's architecture without a teacher.

    modality_dropout 0 gives the paper's Baseline; above 0, its Baseline w/ delta.
    """
    resolved = load_recipe("train-baseline", recipe, _with_stage(overrides, stage), check)
    from karmma_pipeline.training import stages

    _train(stages.train_baseline, resolved, f"karmma evaluate {resolved.out}")


@click.command()
@recipe_argument
@set_option
@_stage_option
@check_option
def distill(recipe: Path, overrides: tuple[str, ...], stage: Path | None, check: bool) -> None:
    """Distill the teacher into a student.

    Modality dropout removes the same modalities for teacher and student.
    """
    resolved = load_recipe("distill", recipe, _with_stage(overrides, stage), check)
    from karmma_pipeline.training import stages

    runs = " ".join(str(run) for run in (*resolved.teacher, resolved.out))
    _train(stages.distill, resolved, f"karmma evaluate {runs}")


def _with_stage(overrides: tuple[str, ...], stage: Path | None) -> tuple[str, ...]:
    return overrides if stage is None else (*overrides, f"loader.stage={json.dumps(str(stage))}")


def _train(run: Callable[..., Any], recipe: Recipe, then: str) -> None:
    """Train; of several ranks under torchrun the first speaks for all that end alike."""
    from karmma_pipeline.errors import StoppedError
    from karmma_pipeline.jobs import StopFlag
    from karmma_pipeline.training.ranks import Ranks

    main = Ranks.from_environment().main
    try:
        with StopFlag() as stop:
            report = run(recipe, stop=stop)
    except StoppedError as error:
        if main:
            raise
        raise click.exceptions.Exit(error.exit_code) from None
    if main:
        finish(report.summary(), then=then)
