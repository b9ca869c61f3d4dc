"""The three trainings: teacher, baseline, distilled student; they differ in one objective."""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from karmma_pipeline import own_code
from karmma_pipeline.data.loading.clips import clips_of_split, excluded_ids
from karmma_pipeline.data.loading.dropout import DropoutSchedule, patterns_digest
from karmma_pipeline.data.loading.open import open_source
from karmma_pipeline.errors import CheckpointError, ConfigError, KarmmaError, StoreError, counted
from karmma_pipeline.jobs import StopFlag
from karmma_pipeline.models.device import pick_device
from karmma_pipeline.models.fusion import FusionModel, TokenModel
from karmma_pipeline.models.saved import ModelCard, begin_from, check_whole, read_card
from karmma_pipeline.runs import METRICS, MODELS, RunFolder, saved_folder
from karmma_pipeline.store import TokenSource, joined_digests
from karmma_pipeline.store.format import layout
from karmma_pipeline.training import suffixes
from karmma_pipeline.training.clips import (
    check_labels,
    describe,
    make_loaders,
    set_means,
    standardise,
    unseen_labels,
    usable_clips,
)
from karmma_pipeline.training.first_batch import check_start, first_batch
from karmma_pipeline.training.kept_clips import as_it_began, learned_from, note_clips
from karmma_pipeline.training.loop import Trainer, TrainingSetup
from karmma_pipeline.training.objective import (
    DistillationObjective,
    LabelObjective,
    MaskedLogits,
    Objective,
    OwnObjective,
    Unseen,
)
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
    layout.check_outside(recipe.out)
    device = pick_device(recipe.device, Ranks.from_environment().local_rank)
    with joined(device) as ranks, RunFolder(recipe.out, recipe, writes=ranks.main) as run:
        ranks.agree_to_stop(stop)  # nobody looks into the folder before the first rank has it
        try:
            return _resume_or_start(_settled(run, device), kind, run, device, ranks, stop)
        except KarmmaError as error:
            with suppress(KarmmaError, OSError):  # the disk may be what is wrong
                run.log(f"ended: {error}")
            raise


def _settled(run: RunFolder, device: torch.device) -> Any:
    """Return the recipe with which a run goes on, or begins, with nothing left open."""
    recipe: Any = run.recipe
    if recipe.precision != "auto":
        return recipe
    precision = "bfloat16" if device.type == "cuda" else "float32"
    return recipe.model_copy(update={"precision": precision})


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
        run.note(f"{fault} Using the previous training state instead.")
    if state is not None:
        progress, sources = TrainingProgress(**state["progress"]), state["sources"]
    else:
        progress, sources = _without_state(recipe)
    if progress.finished(recipe):
        return _finished(recipe, progress, sources)
    return _train(recipe, kind, run, state, device, ranks, stop)


def _without_state(recipe: TrainRecipe) -> tuple[TrainingProgress, dict[str, str]]:
    """Return how far a run is whose training states are gone, and what its model was made of.

    Raises:
        CheckpointError: there are models and the run is not finished: to train from the first
            step would write over them.
    """
    models = [recipe.out / name for name in MODELS if (recipe.out / name).exists()]
    if not models:
        return TrainingProgress(), {}
    progress = TrainingProgress.read(recipe.out / METRICS)
    if progress.finished(recipe) and len(models) == len(MODELS):
        card = read_card(models[0])
        code = {f"{k} 0": card.code[name] for k, name in recipe.own.items() if name in card.code}
        return progress, {"store": card.store_digest, **code}
    raise CheckpointError(
        f"{recipe.out}: its training states (state/) are missing after epoch {progress.epoch} "
        f"of {recipe.epochs}, so it cannot resume. Restore them, or choose another folder with "
        f"--set out=FOLDER; init_from={models[-1]} starts from its weights."
    )


def _finished(recipe: TrainRecipe, done: TrainingProgress, began: dict[str, str]) -> TrainReport:
    """Return the report of a run that needs neither its store nor its teacher any more.

    Raises:
        CheckpointError: a model of it is missing or damaged: to say that it is done would be wrong.
    """
    for name in MODELS:
        check_whole(recipe.out / name)
    if now := _sources_now(recipe, began):
        _check_sources(recipe, began, now)
    early = done.epoch < recipe.epochs
    return TrainReport(recipe.out, done.best, done.epoch, already_done=True, early=early)


def _sources_now(recipe: TrainRecipe, began: dict[str, str]) -> dict[str, str]:
    """Return the digests of what a finished run has learned from, as far as it is still there."""
    now: dict[str, str] = {}
    store = _still_there(recipe)
    if store is not None:
        store = as_it_began(recipe.out, store)
        now = _sources(recipe, store, [], began)
        with suppress(StoreError, CheckpointError):  # a teacher that is gone is not another one
            clips = usable_clips(recipe, store, recipe.train_split)
            now = _sources(recipe, store, _teacher_caches(recipe, store, clips), began)
    return now


def _still_there(recipe: TrainRecipe) -> TokenSource | None:
    """Return the store of a finished run; None if it is gone, which no longer matters."""
    where_it_lies = recipe.loader.model_copy(update={"stage": None, "cache": "map"})
    with suppress(StoreError):
        return open_source(recipe.store, where_it_lies, torch.device("cpu"))
    return None


def _check_sources(recipe: TrainRecipe, began: dict[str, str], now: dict[str, str]) -> None:
    """Refuse to go on with other data than a run began with; where they lie does not matter."""
    for kind, path, before, there in _changed_sources(recipe, began, now):
        raise CheckpointError(
            f"{recipe.out}: the run started with {kind} {_digest(before)}, but now uses {path} "
            f"{_digest(there)}; restore the old one, or choose another folder with --set "
            "out=FOLDER."
        )


def _changed_sources(
    recipe: TrainRecipe, began: dict[str, str], now: dict[str, str]
) -> Iterator[tuple[str, Any, str | None, str | None]]:
    """Yield what is another than when a run began: kind, place, digests then and now."""
    before, there = _numbered(began), _numbered(now)
    for name in dict.fromkeys(
        [*there, *(n for n in before if n.startswith(("exclude", "init", "patterns")))]
    ):
        if before.get(name) != there.get(name):
            kind, number = name.split()
            yield kind, _named(recipe, kind, int(number)), before.get(name), there.get(name)


def changed_sources(recipe: TrainRecipe) -> list[str]:
    """Return what a run learns from and is no longer what it was when the run began.

    What is gone is not another one; of a run without a training state nothing is known.
    """
    with suppress(CheckpointError):
        state, _ = load_state(recipe.out / "state")
        if state is not None:
            began = state["sources"]
            changed = _changed_sources(recipe, began, _sources_now(recipe, began))
            return [str(path or kind) for kind, path, _, _ in changed]
    return []


def _named(recipe: TrainRecipe, kind: str, number: int) -> Any:
    """Return what a recipe names as a source: a path, or code of one's own."""
    if kind in recipe.own:
        return recipe.own[kind]
    if kind == "patterns":
        return _patterns(recipe)
    paths = getattr(recipe, kind)
    return paths[number] if kind == "teacher" else paths


def _patterns(recipe: TrainRecipe) -> Path | None:
    dropout = recipe.modality_dropout
    return dropout.patterns if isinstance(dropout, DropoutSchedule) else None


def _digest(digest: str | None) -> str:
    return f"of digest {digest[:12]}" if digest else "not set"


def _numbered(sources: dict[str, str]) -> dict[str, str]:
    """Name sources by kind and number; up to version 1 their names held paths."""
    numbered: dict[str, str] = {}
    for name, digest in sources.items():
        kind = name.split()[0]
        numbered[f"{kind} {sum(n.startswith(kind) for n in numbered)}"] = digest
    return numbered


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
    if state is not None:
        store = as_it_began(recipe.out, store)
    train = usable_clips(recipe, store, recipe.train_split)
    val = usable_clips(recipe, store, recipe.val_split, middle=True)
    notes = [*check_labels(recipe, store, train, val), *_trained_on(recipe, train, val)]
    caches = _teacher_caches(recipe, store, train)
    learned = _learned(recipe, store, caches)
    notes += _check_cross_fitted(store, learned, train)
    began = None if state is None else state["sources"]
    sources = _sources(recipe, store, caches, began)
    if began is not None:
        _check_sources(recipe, began, sources)
    card = _card(recipe, kind, store, sources)
    torch.manual_seed(recipe.seed)  # of the initial weights; steps seed themselves
    model = card.build()
    for part in model.modules():  # late fusion has several
        if isinstance(part, FusionModel):
            part.scale_positions(recipe.position_std)
    notes += suffixes.adapt(recipe, model, ranks)
    if state is None:
        notes += _begin(recipe, model, card, store, train, device)
    loaders = make_loaders(recipe, store, train, val, device, ranks)
    own = _try_out(recipe, model, store, train, ranks)
    run.claim(recipe)
    if run.writes and state is None:
        note_clips(recipe.out, store, np.concatenate([train, val]))
    _describe_start(recipe, run, store, (train, val), state is not None, device, ranks)
    for note in notes:
        run.note(note)
    unseen = unseen_labels(store, clips_of_split(store, recipe.val_split, recipe.exclude))
    parts = (*loaders, device, ranks, sources, unseen)
    setup = TrainingSetup(recipe, run, store, model, card, *parts)
    objective: Objective = LabelObjective(tuple(store.heads), recipe.label_smoothing)
    if isinstance(recipe, DistillRecipe):
        objective = _distillation(recipe, objective, caches, learned, setup, stop)
    if own is not None:
        own.teachers = objective if isinstance(objective, DistillationObjective) else None
        objective = own
    return Trainer(setup, state).fit(objective, stop)


def _trained_on(recipe: TrainRecipe, train: np.ndarray, val: np.ndarray) -> Iterator[str]:
    """Say how many clips are trained on and choose the best epoch, too."""
    if both := len(np.intersect1d(train, val)):
        yield (
            f"val_split={recipe.val_split!r}: {both} of its {counted(len(val), 'clip')} are "
            "also trained on; its accuracy does not measure generalisation"
        )


def _try_out(
    recipe: TrainRecipe, model: TokenModel, store: TokenSource, train: np.ndarray, ranks: Ranks
) -> OwnObjective | None:
    """Try code of one's own on a few clips, before anything is written; return its objective."""
    if not recipe.own:
        return None
    check_start(recipe, model, ranks)
    batch, logits = first_batch(recipe.model, model, store, train)
    if not recipe.objective:
        return None
    function = own_code.find(recipe.objective, "objective")
    taught = isinstance(recipe, DistillRecipe)
    return OwnObjective(recipe.objective, function, recipe.objective_args, batch, logits, taught)


def _begin(
    recipe: TrainRecipe,
    model: TokenModel,
    card: ModelCard,
    store: TokenSource,
    train: np.ndarray,
    device: torch.device,
) -> list[str]:
    """Give a model all that it has before the first step; say what a reader should know."""
    suffixes.begin(recipe, model, card)
    if card.cut:  # whose tokens take long to compute
        model.to(device)
    if recipe.standardise:
        standardise(model, store, train)
    if model.needs_means:
        set_means(model, store, train)
    return _begin_from(recipe, model.cpu(), card)


def _begin_from(recipe: TrainRecipe, model: TokenModel, card: ModelCard) -> list[str]:
    """Give a model the weights of another run, as far as they fit; say what began anew."""
    if recipe.init_from is None:
        return []
    anew = begin_from(model, card, saved_folder(recipe.init_from))
    return [f"init_from {recipe.init_from}: newly initialised weights: {', '.join(anew) or 'none'}"]


def _describe_start(
    recipe: TrainRecipe,
    run: RunFolder,
    store: TokenSource,
    chosen: tuple[np.ndarray, np.ndarray],
    resuming: bool,
    device: torch.device,
    ranks: Ranks,
) -> None:
    if recipe.exclude is not None:
        run.note(f"exclude: the clips listed in {recipe.exclude} are not used")
    how = f"{ranks.size} x {device}, {recipe.precision}, {torch.get_num_threads()} threads"
    run.note(f"{'resuming' if resuming else 'starting'}: {how}, {store.path}")
    for split, clips in zip((recipe.train_split, recipe.val_split), chosen, strict=True):
        every = clips_of_split(store, split, recipe.exclude)
        run.note(f"{split}: {describe(store, every, clips)}")


def _sources(
    recipe: TrainRecipe,
    store: TokenSource,
    caches: list[TeacherLogitsCache],
    began: dict[str, str] | None,
) -> dict[str, str]:
    """Return the digests of all that a run learns from: it keeps to them, wherever they lie.

    ``began``: those of the run that goes on, which does not need `init_from` any more.
    """

    def kept(name: str, find: Callable[[], str], error: type[KarmmaError]) -> dict[str, str]:
        try:
            return {name: find()}
        except error:
            if began is None:
                raise
            return {k: v for k, v in began.items() if k == name}

    sources = {"store 0": store.digest}
    sources |= {f"teacher {number}": cache.digest for number, cache in enumerate(caches)}
    if recipe.exclude is not None:  # its content decides, as that of a store does
        ids = excluded_ids(store, recipe.exclude)
        sources["exclude 0"] = hashlib.sha256(ids.tobytes()).hexdigest()
    if recipe.init_from is not None:
        folder = recipe.init_from
        sources |= kept(
            "init_from 0", lambda: read_card(saved_folder(folder)).weights_sha256, CheckpointError
        )
    if (listed := _patterns(recipe)) is not None:
        sources |= kept("patterns 0", lambda: patterns_digest(listed, store), ConfigError)
    for key, name in recipe.own.items():
        sources |= kept(f"{key} 0", partial(own_code.digest, name, key), ConfigError)
    return sources


def _card(
    recipe: TrainRecipe, kind: RunKind, store: TokenSource, sources: dict[str, str]
) -> ModelCard:
    return ModelCard(
        kind=kind,
        name=recipe.name or recipe.out.name,
        model=recipe.model,
        model_args=recipe.model_args,
        code={name: sources[f"{key} 0"] for key, name in recipe.own.items()},
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
    if not recipe.allow_unfinished:
        for teacher in recipe.teacher:
            _check_teacher(teacher)
    return [TeacherLogitsCache(teacher / "best", its, store, clips) for teacher, its in pairs]


def _check_teacher(teacher: Path) -> None:
    """Refuse a teacher that is still to train; one without metrics was copied, and is taken."""
    if not (teacher / METRICS).is_file():
        return
    trained = read_card(teacher / "best").training
    wanted = {key: trained[key] for key in ("epochs", "patience") if key in trained}
    progress = TrainingProgress.read(teacher / METRICS)
    if "epochs" in wanted and not progress.finished(TrainRecipe.model_construct(**wanted)):
        raise CheckpointError(
            f"teacher={str(teacher)!r}: trained for {progress.epoch} of {wanted['epochs']} "
            "epochs; finish its training, or set allow_unfinished: true to use its best epoch "
            "so far."
        )


def _distillation(
    recipe: DistillRecipe,
    labels: Objective,
    caches: list[TeacherLogitsCache],
    learned: list[torch.Tensor],
    setup: TrainingSetup,
    stop: StopFlag,
) -> DistillationObjective:
    folder: Path = recipe.teacher_table or recipe.out / "teacher_table"
    draws = (setup.train, recipe.epochs)
    teachers: list[MaskedLogits] = [
        one.load(folder, setup.device, setup.ranks, stop, draws) for one in caches
    ]
    if learned:
        teachers = [Unseen(*of) for of in zip(teachers, learned, strict=True)]
    return DistillationObjective(
        labels,
        teachers,
        recipe.alpha,
        recipe.temperature,
        recipe.teacher_weights,
        recipe.teacher_average,
        recipe.kl_clips,
    )


def _check_cross_fitted(
    store: TokenSource, learned: list[torch.Tensor], clips: np.ndarray
) -> Iterator[str]:
    """Yield how many clips are taught by a teacher that was not trained on them.

    Raises:
        ConfigError: none is.
    """
    if not learned:
        return
    clips = store.view_rows(clips)
    taught = int((~torch.stack(learned)[:, clips].all(dim=0)).sum())
    if not taught:
        raise ConfigError(
            "cross_fitted=True: every teacher was trained on all training clips; train several "
            "teachers, each without a part of the clips (`exclude: FILE`)."
        )
    yield f"{taught} of {counted(len(clips), 'clip')} with a teacher that was not trained on them"


def _learned(
    recipe: TrainRecipe, student: TokenSource, caches: list[TeacherLogitsCache]
) -> list[torch.Tensor]:
    """Return which clips of the student's store each cross-fitted teacher was trained on, bool."""
    if not isinstance(recipe, DistillRecipe) or not recipe.cross_fitted:
        return []
    of_teachers = (
        learned_from(teacher, cache.store, cache.card.training["train_split"])
        for teacher, cache in zip(recipe.teacher, caches, strict=True)
    )
    known = student.clip_ids
    return [torch.from_numpy(np.isin(known, ids.astype(known.dtype))) for ids in of_teachers]
