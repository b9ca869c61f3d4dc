"""What can be seen to be wrong before a job waits in a queue for hours."""

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from karmma_pipeline import own_code
from karmma_pipeline.batch.chain import ChainStage, paths
from karmma_pipeline.batch.progress import StageProgress
from karmma_pipeline.errors import ConfigError, KarmmaError, StoreError
from karmma_pipeline.evaluation.preconditions import check_settings, named_files
from karmma_pipeline.evaluation.recipe import EvaluateRecipe
from karmma_pipeline.extraction.recipe import ExtractRecipe, read_clips
from karmma_pipeline.models.backbones import BackboneChoice
from karmma_pipeline.models.backbones.state_dicts import cached_file, enum_member
from karmma_pipeline.store import TokenSource
from karmma_pipeline.store.joined import open_joined
from karmma_pipeline.training.clips import check_recipe
from karmma_pipeline.training.recipe import TrainRecipe


def check(stages: Sequence[ChainStage], progresses: Sequence[StageProgress], folder: Path) -> None:
    """Look at everything that the stages still to run will need.

    Args:
        stages: the chain's stages.
        progresses: how far each is; a stage that is done is not looked at.
        folder: where scripts and logs will lie.

    Raises:
        ConfigError: all faults in one message.
    """
    made = {path.absolute() for stage in stages for path in stage.writes}
    found, stores = [("", fault) for fault in _writable(folder)], _Stores()
    for stage, progress in zip(stages, progresses, strict=True):
        if not progress.done:
            faults = (*_faults(stage, made), *_settings(stage, stages, stores))
            found += [(stage.name, fault) for fault in (*faults, *_changed(stage, progress))]
    _refuse("nothing was started", found)


def check_stores(stages: Sequence[ChainStage]) -> None:
    """Look at what the stages ask of stores, once these are there.

    Raises:
        ConfigError: all faults in one message.
    """
    stores = _Stores()
    found = [(stage.name, fault) for stage in stages for fault in _settings(stage, stages, stores)]
    _refuse("cannot train on the extracted stores", found)


def _refuse(what: str, found: Sequence[tuple[str, str]]) -> None:
    """Raise an error that tells each fault once, given stages and what is wrong with them."""
    faults: dict[str, list[str]] = {}
    for stage, fault in dict.fromkeys(found):
        faults.setdefault(fault, []).append(stage)
    if faults:
        told = (f"{_names(stages)}{fault}" for fault, stages in faults.items())
        raise ConfigError(f"{what}: {'; '.join(told)}.")


def _names(stages: list[str]) -> str:
    """Name the stages that a fault is in: of a sweep it may be in every run."""
    more = f" and {len(stages) - 3} more" if len(stages) > 3 else ""
    return f"{', '.join(stages[:3])}{more}: " if stages[0] else ""


def _faults(stage: ChainStage, made: set[Path]) -> Iterator[str]:
    for path in stage.reads:
        if path.absolute() not in made and not path.is_dir():
            yield f"{path} does not exist, and no stage of the chain writes it"
    for path in stage.writes:
        yield from _writable(path)
    if isinstance(stage.recipe, ExtractRecipe):
        yield from _extraction(stage.recipe)
    if isinstance(stage.recipe, EvaluateRecipe):
        files = named_files(stage.recipe)
        yield from (f"{path} does not exist" for path in files if not path.is_file())


class _Stores:
    """The stores that are complete, each opened once: a sweep's runs share theirs."""

    def __init__(self) -> None:
        self._opened: dict[tuple[tuple[Path, ...], str], list[TokenSource]] = {}

    def of(self, recipe: TrainRecipe) -> list[TokenSource]:
        """Return the store of a training; none where another stage may be making it."""
        key = paths(recipe.store), recipe.loader.label_spaces
        if key not in self._opened:
            self._opened[key] = []
            with suppress(StoreError):
                self._opened[key].append(open_joined(*key))
        return self._opened[key]


def _settings(stage: ChainStage, stages: Sequence[ChainStage], stores: _Stores) -> Iterator[str]:
    """Say what the stores that are there already do not fit, hours before it is its turn."""
    recipe = stage.recipe
    try:
        if isinstance(recipe, TrainRecipe):
            for key, name in recipe.own.items():
                own_code.find(name, key)
            for store in stores.of(recipe):
                check_recipe(recipe, store)
        if isinstance(recipe, EvaluateRecipe) and all(p.is_file() for p in named_files(recipe)):
            for store in _evaluated(recipe, stages, stores):
                check_settings(recipe, store)
    except KarmmaError as error:
        yield str(error).rstrip(".")


def _evaluated(
    recipe: EvaluateRecipe, stages: Sequence[ChainStage], stores: _Stores
) -> Iterator[TokenSource]:
    """Yield the stores that runs of the chain are trained on, if they are evaluated on these."""
    trained = {s.recipe.out: s.recipe for s in stages if isinstance(s.recipe, TrainRecipe)}
    of_runs = [trained[run] for run in recipe.runs if run in trained]
    once = {paths(one.store): one for one in of_runs}
    for folders, one in once.items():
        if not recipe.stores or {*folders} <= {*recipe.stores}:
            yield from stores.of(one)


def _changed(stage: ChainStage, progress: StageProgress) -> Iterator[str]:
    """Say that a folder holds what its command will not go on with; a report is written anew."""
    if progress.changed and isinstance(stage.recipe, ExtractRecipe | TrainRecipe):
        kind = "a run" if isinstance(stage.recipe, TrainRecipe) else "features"
        yield (
            f"{stage.recipe.out} contains {kind} of a different recipe; changed: "
            f"{', '.join(progress.changed)}; choose another `out` or remove it"
        )


def _extraction(recipe: ExtractRecipe) -> Iterator[str]:
    try:
        read_clips(recipe)
    except KarmmaError as error:
        yield str(error).rstrip(".")
    for choices in recipe.sets.values():
        for choice in choices.values():
            yield from _weights(choice)


def _weights(choice: BackboneChoice) -> Iterator[str]:
    try:
        source = choice.source
    except KarmmaError as error:
        yield str(error).rstrip(".")
        return
    if source == "file" and not Path(choice.weights).is_file():
        yield f"weights={choice.weights!r}: no such file"
    if source == "published":
        path = cached_file(enum_member(choice.architecture, choice.weights))
        if not path.is_file():
            yield (
                f"{path}: the weights are missing; on a node with internet access, run `karmma "
                f"backbones fetch {choice.name} {choice.weights}` with TORCH_HOME set to a "
                "folder that the compute nodes can read, and add it to the site's env"
            )


def _writable(path: Path) -> Iterator[str]:
    there = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        yield f"{path} cannot be written: {there} is not writable"
