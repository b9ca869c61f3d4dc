"""How far each stage is, judged by what lies on disk, never by what a scheduler remembers."""

import json
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from karmma_pipeline import config, files
from karmma_pipeline.batch.chain import ChainStage
from karmma_pipeline.config import Recipe
from karmma_pipeline.errors import CheckpointError, StoreError, TooManyFailuresError, counted
from karmma_pipeline.evaluation.recipe import EvaluateRecipe
from karmma_pipeline.extraction.progress import (
    check_failures,
    is_joined,
    missing_parts,
    missing_shards,
)
from karmma_pipeline.extraction.recipe import ExtractRecipe
from karmma_pipeline.extraction.tables import count_failed
from karmma_pipeline.jobs import Part
from karmma_pipeline.models.saved import WEIGHTS, read_card
from karmma_pipeline.runs import METRICS
from karmma_pipeline.store import Catalog, FeatureStore, find_joined
from karmma_pipeline.training.progress import TrainingProgress
from karmma_pipeline.training.recipe import DistillRecipe, TrainRecipe
from karmma_pipeline.training.stages import changed_sources


@dataclass(frozen=True)
class StageProgress:
    """How far a stage is.

    Attributes:
        done: nothing is left to do.
        text: what is there, such as "3 of 8 shards".
        missing: parts of an array that have something to do.
        fault: why the stages after it must not start, though it is complete.
        changed: keys of the recipe, and folders that it reads, which are not as they were when what
            is there was made.
    """

    done: bool
    text: str
    missing: tuple[Part, ...] = ()
    fault: str = ""
    changed: tuple[str, ...] = ()


def stage_progress(stage: ChainStage) -> StageProgress:
    """Look at the folders of a stage; what was made from something else than now is not done."""
    progress = _progress(stage)
    if not progress.changed:
        return progress
    text = f"{progress.text}, changed since: {', '.join(progress.changed)}"
    return replace(progress, done=False, text=text)


def _progress(stage: ChainStage) -> StageProgress:
    if isinstance(stage.recipe, ExtractRecipe):
        return _extraction(stage.recipe, stage.writes, stage.settings.array)
    if isinstance(stage.recipe, EvaluateRecipe):
        return _evaluation(stage.recipe)
    if isinstance(stage.recipe, TrainRecipe):
        return _training(stage.recipe)
    raise TypeError(type(stage.recipe).__name__)


def changed_keys(folder: Path, recipe: Recipe, free: Collection[str] = ()) -> tuple[str, ...]:
    """Return where the recipe of what a folder holds differs from this one, if it holds any."""
    path = folder / "recipe.yaml"
    if not path.is_file():
        return ()
    keys = config.changed_keys(path, recipe)
    return tuple(key for key in keys if key.partition(".")[0] not in free)


# Keys of an extraction that name a place or change no token.
_HOW = {"manifest", "dataset", "out", "decode", "device", "compile", "memory_gb", "max_failures"}


def _extraction(recipe: ExtractRecipe, stores: tuple[Path, ...], count: int) -> StageProgress:
    # All sets of a recipe are written shard by shard: the first one's catalog counts for all.
    everything = tuple(Part(index, count) for index in range(count))
    try:
        shards = Catalog(stores[0]).shards
        lacking = len(missing_shards(stores))
        missing = tuple(missing_parts(list(stores), count))
    except StoreError:
        return StageProgress(done=False, text="not started", missing=everything)
    text = f"{shards - lacking} of {counted(shards, 'shard')}"
    changed = changed_keys(recipe.out, recipe, _HOW)
    if missing:
        return StageProgress(done=False, text=text, missing=missing, changed=changed)
    if not all(is_joined(store) for store in stores):
        return StageProgress(done=False, text=f"{text}, not finalized", changed=changed)
    try:
        failed = count_failed(recipe.out)
        check_failures(recipe, failed, Catalog(stores[0]).count)
    except TooManyFailuresError as error:
        return StageProgress(done=True, text=text, fault=str(error), changed=changed)
    text = f"{text}, {counted(failed, 'clip')} failed" if failed else text
    return StageProgress(done=True, text=text, changed=changed)


def _training(recipe: TrainRecipe) -> StageProgress:
    run = TrainingProgress.read(recipe.out / METRICS)
    there = all((recipe.out / name / WEIGHTS).is_file() for name in ("best", "last"))
    return StageProgress(
        there and run.finished(recipe),
        f"epoch {run.epoch} of {recipe.epochs}",
        changed=(
            *changed_keys(recipe.out, recipe),
            *dict.fromkeys([*_changed_inputs(recipe), *changed_sources(recipe)]),
        ),
    )


def _changed_inputs(recipe: TrainRecipe) -> Iterator[str]:
    """Yield the folders that are there, but no longer what a run has learned from."""
    stores = [recipe.store] if isinstance(recipe.store, Path) else recipe.store
    with suppress(CheckpointError):
        card = read_card(recipe.out / "last")
        if not _hold(stores, card.store_digest, card.stores):
            yield str(stores[0])
    if isinstance(recipe, DistillRecipe):
        folder = recipe.teacher_table or recipe.out / "teacher_table"
        tables = [_json(path) for path in folder.glob("*/table.json")]
        learned_from = {table.get("teacher_weights") for table in tables}
        for teacher in recipe.teacher:
            with suppress(CheckpointError):
                if tables and read_card(teacher / "best").weights_sha256 not in learned_from:
                    yield str(teacher)


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _hold(paths: Iterable[Path], digest: str, parts: Sequence[str] = ()) -> bool:
    """Tell whether stores still have a digest, or several as one; of a lost one nobody knows."""
    with suppress(StoreError):
        stores = [FeatureStore.open(path) for path in paths]
        return find_joined(stores, digest, parts) is not None
    return True


def _evaluation(recipe: EvaluateRecipe) -> StageProgress:
    """A report is done when its page was written for just these models and clips."""
    results, page = recipe.out / "results.json", recipe.out / "index.html"
    saved = recipe.out / "recipe.yaml"
    if not (results.is_file() and page.is_file() and saved.is_file()):
        return StageProgress(done=False, text="no report")
    # The page is written last: an older one is that of an evaluation before.
    if page.stat().st_mtime_ns < results.stat().st_mtime_ns:
        return StageProgress(done=False, text="report incomplete")
    if changed := changed_keys(recipe.out, recipe):
        return StageProgress(done=False, text="report written", changed=changed)
    runs = json.loads(results.read_text(encoding="utf-8"))["runs"]
    others = [
        str(run)
        for run, evaluated in zip(recipe.runs, runs, strict=True)
        if _digest(run / recipe.checkpoint / WEIGHTS) != evaluated["model_digest"]
        or not _hold(recipe.stores, evaluated["store_digest"])
    ]
    return StageProgress(True, "report written", changed=tuple(others))


def _digest(path: Path) -> str:
    return files.sha256(path) if path.is_file() else ""
