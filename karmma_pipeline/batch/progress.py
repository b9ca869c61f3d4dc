"""How far each stage is, judged by what lies on disk, never by what a scheduler remembers."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from karmma_pipeline import config, files
from karmma_pipeline.batch.chain import ChainStage
from karmma_pipeline.config import Recipe
from karmma_pipeline.errors import StoreError, TooManyFailuresError
from karmma_pipeline.evaluation.recipe import EvaluateRecipe
from karmma_pipeline.extraction import parts
from karmma_pipeline.extraction.recipe import ExtractRecipe
from karmma_pipeline.extraction.tables import count_failed
from karmma_pipeline.jobs import Part
from karmma_pipeline.models.saved import WEIGHTS
from karmma_pipeline.store import Catalog
from karmma_pipeline.training.progress import TrainingProgress
from karmma_pipeline.training.recipe import TrainRecipe


@dataclass(frozen=True)
class StageProgress:
    """How far a stage is.

    Attributes:
        done: nothing is left to do.
        text: what is there, such as "3 of 8 shards".
        missing: parts of an array that have something to do.
        fault: why the stages after it must not start, though it is complete.
    """

    done: bool
    text: str
    missing: tuple[Part, ...] = ()
    fault: str = ""


def stage_progress(stage: ChainStage) -> StageProgress:
    """Look at the folders of a stage."""
    if isinstance(stage.recipe, ExtractRecipe):
        return _extraction(stage.recipe, stage.writes, stage.settings.array)
    if isinstance(stage.recipe, EvaluateRecipe):
        return _evaluation(stage.recipe)
    if isinstance(stage.recipe, TrainRecipe):
        return _training(stage.recipe)
    raise TypeError(type(stage.recipe).__name__)


def same_recipe(folder: Path, recipe: Recipe) -> bool:
    """Tell whether a folder holds the work of this recipe."""
    path = folder / "recipe.yaml"
    return path.is_file() and not config.saved_differences(path, recipe)


def _extraction(recipe: ExtractRecipe, stores: tuple[Path, ...], count: int) -> StageProgress:
    # All sets of a recipe are written shard by shard: the first one's catalog counts for all.
    everything = tuple(Part(index, count) for index in range(count))
    try:
        shards = Catalog(stores[0]).shards
        lacking = len(parts.missing_shards(stores))
        missing = tuple(parts.missing_parts(list(stores), count))
    except StoreError:
        return StageProgress(done=False, text="not begun", missing=everything)
    text = f"{shards - lacking} of {shards} shards"
    if missing:
        return StageProgress(done=False, text=text, missing=missing)
    if not all(parts.is_joined(store) for store in stores):
        return StageProgress(done=False, text=f"{text}, not joined")
    try:
        failed = count_failed(recipe.out)
        parts.check_failures(recipe, failed, Catalog(stores[0]).count)
    except TooManyFailuresError as error:
        return StageProgress(done=True, text=text, fault=str(error))
    return StageProgress(done=True, text=f"{text}, {failed} clips failed" if failed else text)


def _training(recipe: TrainRecipe) -> StageProgress:
    metrics = recipe.out / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.is_file() else []
    rows = [row for row in map(_json, lines) if {"epoch", "val_action_top1"} <= row.keys()]
    run = TrainingProgress(max((int(row["epoch"]) for row in rows), default=0), history=rows)
    there = all((recipe.out / name / WEIGHTS).is_file() for name in ("best", "last"))
    return StageProgress(there and run.finished(recipe), f"epoch {run.epoch} of {recipe.epochs}")


def _json(line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return {}  # the last line of a killed run
    return row if isinstance(row, dict) else {}


def _evaluation(recipe: EvaluateRecipe) -> StageProgress:
    """A report is done when its page was written for just these models."""
    results, page = recipe.out / "results.json", recipe.out / "index.html"
    if not (results.is_file() and page.is_file() and same_recipe(recipe.out, recipe)):
        return StageProgress(done=False, text="no report")
    # The page is written last: an older one is that of an evaluation before.
    if page.stat().st_mtime_ns < results.stat().st_mtime_ns:
        return StageProgress(done=False, text="half a report")
    evaluated = [run["model_digest"] for run in json.loads(results.read_text())["runs"]]
    there = [_digest(run / recipe.checkpoint / WEIGHTS) for run in recipe.runs]
    same = evaluated == there
    return StageProgress(same, "report" if same else "report of other models")


def _digest(path: Path) -> str:
    return files.sha256(path) if path.is_file() else ""
