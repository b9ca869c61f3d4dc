"""The three trainings: teacher, baseline, distilled student; they differ in one objective."""

import hashlib
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from karmma_pipeline.data.loading.clips import clips_of_split, excluded_ids
from karmma_pipeline.data.loading.open import open_source
from karmma_pipeline.errors import CheckpointError, KarmmaError, StoreError
from karmma_pipeline.jobs import StopFlag
from karmma_pipeline.models.device import pick_device
from karmma_pipeline.models.saved import ModelCard
from karmma_pipeline.runs import RunFolder
from karmma_pipeline.store import TokenSource, joined_digests
from karmma_pipeline.training.clips import describe, make_loaders, standardise, usable_clips
from karmma_pipeline.training.loop import Trainer, TrainingSetup
from karmma_pipeline.training.objective import DistillationObjective, LabelObjective, Objective
from karmma_pipeline.training.progress import TrainingProgress, TrainReport
from karmma_pipeline.training.ranks import Ranks, joined
from karmma_pipeline.training.recipe import (
    BaselineRecipe,
    DistillRecipe,
    TeacherRecipe,
    TrainRecipe,
)
from karmma_pipeline.training.state import load_state
from karmma_pipeline.training.teacher_logits import TeacherLogitsCache

RunKind = Literal["teacher", "student", "baseline"]

# Keys that a run may resume with other values of: a job's own disk has another name each time.
_WHERE_TOKENS_LIE = ("loader.cache", "loader.stage", "loader.threads", "loader.ahead")


def train_teacher(recipe: TeacherRecipe, stop: StopFlag | None = None) -> TrainReport:
    """Train a teacher with cross-entropy under modality dropout."""
    return _run(recipe, "teacher", stop or StopFlag())


def train_baseline(recipe: BaselineRecipe, stop: StopFlag | None = None) -> TrainReport:
    """Train the student's architecture with cross-entropy alone."""
    return _run(recipe, "baseline", stop or StopFlag())


def distill(recipe: DistillRecipe, stop: StopFlag | None = None) -> TrainReport:
    """Train a student with the paper's combination of distillation and cross-entropy."""
    return _run(recipe, "student", stop or StopFlag())


def _run(recipe: TrainRecipe, kind: RunKind, stop: StopFlag) -> TrainReport:
    device = pick_device(recipe.device, Ranks.from_environment().local_rank)
    with (
        joined(device) as ranks,
        RunFolder(recipe.out, recipe, writes=ranks.main, free=_WHERE_TOKENS_LIE) as run,
    ):
        ranks.agree_to_stop(stop)  # nobody looks into the folder before the first rank has made it
        try:
            return _resume_or_start(recipe, kind, run, device, ranks, stop)
        except KarmmaError as error:
            with suppress(KarmmaError, OSError):  # the disk may be what is wrong
                run.log(f"ended: {error}")
            raise


def _resume_or_start(
    recipe: TrainRecipe,
    kind: RunKind,
    run: RunFolder,
    device: torch.device,
    ranks: Ranks,
    stop: StopFlag,
) -> TrainReport:
    state, faults = load_state(recipe.out / "state")
    for fault in faults:
        run.note(f"{fault} The training state before it is used.")
    if state is not None and TrainingProgress(**state["progress"]).finished(recipe):
        return _finished(recipe, state)
    return _train(recipe, kind, run, state, device, ranks, stop)


def _finished(recipe: TrainRecipe, state: dict[str, Any]) -> TrainReport:
    """Return the report of a run that needs neither its store nor its teacher any more."""
    try:
        where_it_lies = recipe.loader.model_copy(update={"stage": None, "cache": "map"})
        sources = {"store": open_source(recipe.store, where_it_lies, torch.device("cpu")).digest}
    except StoreError:
        sources = {}
    _check_sources(recipe, state, sources)
    done = TrainingProgress(**state["progress"])
    early = done.epoch < recipe.epochs
    return TrainReport(recipe.out, done.best, done.epoch, already_done=True, early=early)


def _check_sources(recipe: TrainRecipe, state: dict[str, Any], sources: dict[str, str]) -> None:
    """Refuse to resume with other data than a run began with."""
    for name, digest in sources.items():
        before = state["sources"].get(name)
        if before != digest:
            where = recipe.store if name == "store" else name
            raise CheckpointError(
                f"{recipe.out}: the run began with {where} of digest {str(before)[:12]}, there is "
                f"now one of digest {digest[:12]}; put the old one back, or choose another folder "
                "with --set out=FOLDER."
            )


def _train(
    recipe: TrainRecipe,
    kind: RunKind,
    run: RunFolder,
    state: dict[str, Any] | None,
    device: torch.device,
    ranks: Ranks,
    stop: StopFlag,
) -> TrainReport:
    store = open_source(recipe.store, recipe.loader, device, stop)
    splits = (recipe.train_split, recipe.val_split)
    train, val = (usable_clips(recipe, store, name) for name in splits)
    caches = _teacher_caches(recipe, store, train)
    sources = _sources(recipe, store, caches)
    if state is not None:
        _check_sources(recipe, state, sources)
    if recipe.exclude is not None:
        run.note(f"exclude: the clips that {recipe.exclude} lists are left out")
    run.note(f"{'resuming' if state else 'starting'}: {ranks.size} x {device}, {store.path}")
    for name, clips in zip(splits, (train, val), strict=True):
        run.note(f"{name}: {describe(store, clips_of_split(store, name, recipe.exclude), clips)}")
    card = _card(recipe, kind, store)
    torch.manual_seed(recipe.seed)  # of the initial weights; steps seed themselves
    model = card.build()
    if recipe.standardise and state is None:
        standardise(model, store, train)
    loaders = make_loaders(recipe, store, train, val, device, ranks)
    setup = TrainingSetup(recipe, run, store, model, card, *loaders, device, ranks, sources)
    objective: Objective = LabelObjective(tuple(store.heads), recipe.label_smoothing)
    if isinstance(recipe, DistillRecipe):
        objective = _distillation(recipe, objective, caches, setup, stop)
    return Trainer(setup, state).fit(objective, stop)


def _sources(
    recipe: TrainRecipe, store: TokenSource, caches: list[TeacherLogitsCache]
) -> dict[str, str]:
    """Return the digests of all that a run learns from, by name: it keeps to them."""
    sources = {"store": store.digest}
    sources |= {f"teacher {cache.teacher.parent}": cache.digest for cache in caches}
    if recipe.exclude is not None:  # its content decides, as that of a store does
        ids = excluded_ids(store, recipe.exclude)
        sources[f"exclude {recipe.exclude}"] = hashlib.sha256(ids.tobytes()).hexdigest()
    return sources


def _card(recipe: TrainRecipe, kind: RunKind, store: TokenSource) -> ModelCard:
    return ModelCard(
        kind=kind,
        name=recipe.name or recipe.out.name,
        size=recipe.size,
        modalities={m: store.shape(m) for m in store.modalities},
        heads=store.heads,
        provenance=store.provenance,
        dtypes={m: str(store.parts(m)[0].dtype).removeprefix("torch.") for m in store.modalities},
        store_digest=store.digest,
        stores=joined_digests(store),
        training=recipe.model_dump(mode="json"),
    )


def _teacher_caches(
    recipe: TrainRecipe, store: TokenSource, clips: np.ndarray
) -> list[TeacherLogitsCache]:
    if not isinstance(recipe, DistillRecipe):
        return []
    stores = recipe.teacher_store * (len(recipe.teacher) // len(recipe.teacher_store))
    pairs = zip(recipe.teacher, stores, strict=True)
    return [TeacherLogitsCache(teacher / "best", its, store, clips) for teacher, its in pairs]


def _distillation(
    recipe: DistillRecipe,
    labels: Objective,
    caches: list[TeacherLogitsCache],
    setup: TrainingSetup,
    stop: StopFlag,
) -> DistillationObjective:
    folder: Path = recipe.teacher_table or recipe.out / "teacher_table"
    draws = (setup.train, recipe.epochs)
    return DistillationObjective(
        labels,
        [one.load(folder, setup.device, setup.ranks, stop, draws) for one in caches],
        recipe.alpha,
        recipe.temperature,
        recipe.teacher_weights,
        recipe.teacher_average,
    )
