"""Sweeps: methods x settings x seeds become ordinary runs, and one report over all of them."""

import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from karmma_pipeline import config, locks
from karmma_pipeline.batch import checks
from karmma_pipeline.batch.chain import ChainStage, folders, paths, with_waits
from karmma_pipeline.batch.progress import StageProgress, stage_progress
from karmma_pipeline.batch.recipe import Method, Stage, Sweep
from karmma_pipeline.batch.slurm import threads
from karmma_pipeline.errors import ConfigError, KarmmaError, TooManyFailuresError
from karmma_pipeline.evaluation.recipe import EvaluateRecipe
from karmma_pipeline.extraction.recipe import ExtractRecipe
from karmma_pipeline.jobs import StopFlag
from karmma_pipeline.recipes import recipe_model
from karmma_pipeline.runs import METRICS
from karmma_pipeline.training.progress import TrainingProgress
from karmma_pipeline.training.recipe import TrainRecipe

EXTRACT, REPORT, SUPERSEDED = "extract", "report", "superseded"


@dataclass(frozen=True)
class Point:
    """A method with one combination of the settings in its grid.

    name: of its folder. label: in the report.
    """

    name: str
    label: str
    method: Method
    settings: dict[str, Any]


@dataclass(frozen=True)
class LoadedSweep:
    """A sweep with its recipes read.

    Attributes:
        path: of the sweep.
        overrides: of it, as ``--set``.
        settings: the sweep.
        points: its methods, one for each combination of settings.
        stages: the extraction if there is one, the runs as ``METHOD/seedS``, the report; each
            after what it waits for.
    """

    path: Path
    overrides: tuple[str, ...]
    settings: Sweep
    points: tuple[Point, ...]
    stages: tuple[ChainStage, ...]

    def stage(self, name: str) -> ChainStage:
        """Return a stage by name.

        Raises:
            ConfigError: there is none.
        """
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise ConfigError(
            f"--run {name}: {self.path} has no such run; its runs start with {self.stages[0].name}."
        )

    @property
    def words(self) -> list[str]:
        """The words after ``karmma`` that name the sweep."""
        sets = (word for override in self.overrides for word in ("--set", override))
        return ["sweep", str(self.path), *sets]


def load_sweep(path: Path, overrides: Sequence[str] = ()) -> LoadedSweep:
    """Read a sweep and all its recipes; paths are relative to the current folder.

    Raises:
        ConfigError: the sweep, a recipe or a setting is wrong.
    """
    sweep = config.load(Sweep, path, overrides)
    points = tuple(_points(sweep))
    stages: list[ChainStage] = []
    if sweep.extract is not None:
        stages.append(_stage(sweep, EXTRACT, "extract", sweep.extract, {}))
    for point, seed in itertools.product(points, sweep.seeds):
        try:
            stages.append(_run(sweep, point, seed, stages))
        except ConfigError as error:
            raise ConfigError(f"{path}: methods.{point.name}: {error}") from None
    stages.append(_report(path, sweep, points, stages))
    waiting = (with_waits(path, stage, stages) for stage in stages)
    return LoadedSweep(path, tuple(overrides), sweep, points, tuple(waiting))


def _points(sweep: Sweep) -> Iterator[Point]:
    """Yield the methods, one for each combination of their grid's values.

    The first method on a recipe takes its name; others that would be called the same go by their
    key.
    """
    names, labels = set[str](), set[str]()
    for key, method in sweep.methods.items():
        of_recipe = method.name or config.read(method.recipe).get("name") or key
        for values in itertools.product(*method.grid.values()):
            settings = dict(zip(method.grid, values, strict=True))
            said = [f"{k.rpartition('.')[2]}={_text(v)}" for k, v in settings.items()]
            name = re.sub(r"[^A-Za-z0-9_.,=+-]", "_", ",".join((key, *said)))
            if name in names:
                raise ConfigError(
                    f"methods.{key}.grid: two combinations would have the name {name}; define "
                    "them as separate methods without a grid."
                )
            names.add(name)
            label = ", ".join((of_recipe, *said))
            if label in labels and not method.name:
                label = ", ".join((key, *said))
            if label in labels:
                raise ConfigError(
                    f"methods.{key}: another method is named {label!r}; change its name."
                )
            labels.add(label)
            yield Point(name, label, method, settings)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _run(sweep: Sweep, point: Point, seed: int, before: Sequence[ChainStage]) -> ChainStage:
    """Return a run of a method; a student learns from the runs of the same seed."""
    name, method = f"{point.name}/seed{seed}", point.method
    changes = {**method.set, **point.settings}
    changes |= {"seed": seed, "out": str(sweep.out / name), "name": point.label}
    if method.teacher:
        made = {stage.name: stage.recipe for stage in before}
        teachers = [_teacher(made, teacher, seed) for teacher in method.teacher]
        changes["teacher"] = [str(teacher.out) for teacher in teachers]
        changes["teacher_store"] = [[*map(str, paths(teacher.store))] for teacher in teachers]
        # Tables lie there by what they were made from: students of one teacher share its table.
        changes["teacher_table"] = str(sweep.out / "teacher_logits")
    return _stage(sweep, name, method.command, method.recipe, changes)


def _teacher(made: dict[str, Any], name: str, seed: int) -> TrainRecipe:
    recipe = made.get(f"{name}/seed{seed}")
    if not isinstance(recipe, TrainRecipe):
        known = dict.fromkeys(stage.partition("/")[0] for stage in made if "/" in stage)
        raise ConfigError(
            f"teacher={name!r}: no method of this name is defined before it; defined: "
            f"{', '.join(known)}."
        )
    return recipe


def _stage(
    sweep: Sweep, name: str, command: Any, path: Path, changes: dict[str, Any]
) -> ChainStage:
    overrides = [f"{key}={json.dumps(value)}" for key, value in changes.items()]
    settings = Stage(command=command, recipe=path, overrides=overrides, resources=sweep.resources)
    recipe = config.load(recipe_model(command), path, overrides)
    return ChainStage(name, settings, recipe, *folders(recipe))


def _report(
    path: Path, sweep: Sweep, points: Sequence[Point], stages: Sequence[ChainStage]
) -> ChainStage:
    trained = [stage.recipe for stage in stages if isinstance(stage.recipe, TrainRecipe)]
    labels = [point.label for point in points for _ in sweep.seeds]
    given = sweep.evaluate
    tree: dict[str, Any] = config.read(given.recipe) if given.recipe else {}
    runs = [str(recipe.out) for recipe in trained]
    stores = dict.fromkeys(str(store) for recipe in trained for store in paths(recipe.store))
    changes = {
        "stores": [*stores],
        **given.set,
        "runs": runs,
        "names": dict(zip(runs, labels, strict=True)),
        "out": str(sweep.out / REPORT),
    }
    # One key each: a dot in a path is no section.
    for key in ("runs", "names", "out"):
        tree[key] = changes.pop(key)
    overrides = [f"{key}={json.dumps(value)}" for key, value in changes.items()]
    recipe = config.build(EvaluateRecipe, tree, f"{path}: evaluate", overrides)
    settings = Stage(command="evaluate", recipe=given.recipe or path, resources=sweep.resources)
    return ChainStage(REPORT, settings, recipe, *folders(recipe))


def progress_of(sweep: LoadedSweep) -> dict[str, StageProgress]:
    """Look at the folders of all stages; what has to wait for others is not done."""
    found: dict[str, StageProgress] = {}
    for stage in sweep.stages:
        progress = stage_progress(stage)
        waits = any(not found[name].done for name in stage.waits)
        found[stage.name] = replace(progress, done=False) if waits else progress
    return found


def check(sweep: LoadedSweep, progresses: dict[str, StageProgress]) -> None:
    """See that what the sweep needs is there; runs of other recipes are put aside, not refused.

    Raises:
        ConfigError: all faults in one message.
        TooManyFailuresError: the extraction lost more clips than its recipe allows.
    """
    _check_extraction(progresses.values())
    free = [
        replace(progresses[stage.name], changed=())
        if isinstance(stage.recipe, TrainRecipe)
        else progresses[stage.name]
        for stage in sweep.stages
    ]
    checks.check(sweep.stages, free, sweep.settings.folder)


def _check_extraction(progresses: Iterable[StageProgress]) -> None:
    """Refuse to learn from stores that lack more than their recipe allows."""
    for progress in progresses:
        if progress.fault:
            raise TooManyFailuresError(progress.fault)


def run_one(sweep: LoadedSweep, name: str, stop: StopFlag) -> str:
    """Bring one stage to its end; return what to say of it.

    A run of another recipe or other inputs that lies in its folder is put aside.

    Raises:
        StoppedError: a stop was asked for; run again, and it goes on.
        KarmmaError: what it waits for is not done, or it fails.
    """
    stage = sweep.stage(name)
    before = {other: stage_progress(sweep.stage(other)) for other in stage.waits}
    if lacking := [other for other, found in before.items() if not found.done]:
        raise KarmmaError(f"{name}: depends on runs that are not done: {', '.join(lacking)}.")
    progress = stage_progress(stage)
    _check_extraction([*before.values(), progress])
    if progress.done:
        return f"{name}: done ({progress.text})"
    if progress.changed and isinstance(stage.recipe, TrainRecipe):
        _put_aside(stage.recipe.out, sweep.settings.out)
    with _threads_of(stage):
        said = _execute(stage, stop)
    if stage.name == EXTRACT:  # before it nobody knew what lies in the stores
        checks.check_stores(sweep.stages)
    return said


@contextmanager
def _threads_of(stage: ChainStage) -> Iterator[None]:
    """Compute with the threads of a job of the sweep, for sums depend on them.

    A launcher has said how many there are; whoever runs a stage by hand gets the same numbers.
    """
    if "OMP_NUM_THREADS" in os.environ:
        yield
        return
    before, count = torch.get_num_threads(), threads(stage.settings.resources, 1)
    os.environ["OMP_NUM_THREADS"] = str(count)  # of the processes that it starts
    torch.set_num_threads(count)
    try:
        yield
    finally:
        del os.environ["OMP_NUM_THREADS"]
        torch.set_num_threads(before)


def _put_aside(run: Path, out: Path) -> None:
    """Move a run that is no longer asked for out of the way: weights are not removed unasked."""
    name = str(run.relative_to(out))
    numbers = itertools.count(1)
    place = next(p for n in numbers if not (p := out / SUPERSEDED / f"{name}.{n}").exists())
    with locks.locked(run / ".lock", "is training in this folder", "wait until it finishes"):
        place.parent.mkdir(parents=True, exist_ok=True)
        run.rename(place)
    (place / ".lock").unlink(missing_ok=True)


def _execute(stage: ChainStage, stop: StopFlag) -> str:
    recipe: Any = stage.recipe
    if isinstance(recipe, ExtractRecipe):
        from karmma_pipeline.extraction.pipeline import extract

        return extract(recipe, stop=stop).summary()
    if isinstance(recipe, EvaluateRecipe):
        from karmma_pipeline.evaluation.evaluate import evaluate

        return evaluate(recipe, stop).summary()
    from karmma_pipeline.training import stages

    train: Any = {
        "train-teacher": stages.train_teacher,
        "train-baseline": stages.train_baseline,
        "distill": stages.distill,
    }
    return str(train[stage.settings.command](recipe, stop).summary())


def describe(stage: ChainStage) -> str:
    """Return how a stage that has just ended came out."""
    if not isinstance(stage.recipe, TrainRecipe):
        return stage_progress(stage).text
    done = TrainingProgress.read(stage.recipe.out / METRICS)
    best = done.best
    said = f"epoch {best.get('epoch', 0)} of {done.epoch}"
    top1 = best.get("val_action_top1")
    return said if top1 is None else f"{said}, {stage.recipe.val_split} top-1 {top1:.1f} %"
