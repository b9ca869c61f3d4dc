"""A chain with its recipes read: what each stage reads and writes, so what it waits for."""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

from karmma_pipeline import config
from karmma_pipeline.batch.recipe import Chain, Stage, Sweep
from karmma_pipeline.config import Recipe
from karmma_pipeline.errors import ConfigError
from karmma_pipeline.evaluation.recipe import EvaluateRecipe
from karmma_pipeline.extraction.recipe import ExtractRecipe
from karmma_pipeline.recipes import recipe_model
from karmma_pipeline.runs import MODELS
from karmma_pipeline.training.recipe import DistillRecipe, TrainRecipe


@dataclass(frozen=True)
class ChainStage:
    """One stage, ready to be sent off.

    Attributes:
        name: of the stage.
        settings: what the chain says of it.
        recipe: the stage's own recipe, overrides applied.
        reads: folders that must be complete before it starts.
        writes: folders that it makes.
        waits: stages of the chain that make what it reads.
    """

    name: str
    settings: Stage
    recipe: Recipe
    reads: tuple[Path, ...]
    writes: tuple[Path, ...]
    waits: tuple[str, ...] = ()

    @property
    def arguments(self) -> list[str]:
        """The words after ``karmma``."""
        recipe = ["--recipe"] if self.settings.command == "evaluate" else []
        words = [self.settings.command, *recipe, str(self.settings.recipe)]
        for override in self.settings.overrides:
            words += ["--set", override]
        return words

    @property
    def finish_arguments(self) -> list[str]:
        """The words after ``karmma`` that join what the tasks of an array have made."""
        stores = [str(path) for path in self.writes]
        return ["store", "finalize", *stores, "--parts", str(self.settings.array)]


def load_chain(path: Path) -> tuple[Chain, list[ChainStage]]:
    """Read a chain and all its recipes; paths are relative to the current folder.

    Raises:
        ConfigError: the chain or a recipe is wrong, or a stage stands before one it needs.
    """
    chain = config.load(Chain, path)
    stages: list[ChainStage] = []
    for name, settings in chain.stages.items():
        recipe = config.load(recipe_model(settings.command), settings.recipe, settings.overrides)
        reads, writes = folders(recipe)
        stages.append(ChainStage(name, settings, recipe, reads, writes))
    return chain, [with_waits(path, stage, stages) for stage in stages]


def with_waits(path: Path, stage: ChainStage, stages: list[ChainStage]) -> ChainStage:
    """Return a stage with the names of those that make what it reads; they must stand before it."""
    makers = {w.absolute(): other.name for other in stages for w in other.writes}
    if len(makers) < sum(len(other.writes) for other in stages):
        raise ConfigError(f"{path}: two stages write to the same folder; give each its own `out`.")
    names = [other.name for other in stages]
    waits = {makers[read.absolute()] for read in stage.reads if read.absolute() in makers}
    late = sorted(w for w in waits if names.index(w) >= names.index(stage.name))
    if late:
        raise ConfigError(
            f"{path}: stages.{stage.name} reads the output of {late[0]}; put {late[0]} before it."
        )
    ordered = tuple(name for name in names if name in waits)
    return replace(stage, waits=ordered)


def folders(recipe: Recipe) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    """Return what a recipe reads and writes, as far as stages are concerned."""
    if isinstance(recipe, ExtractRecipe):
        return (), tuple(recipe.out / name for name in recipe.sets)
    if isinstance(recipe, EvaluateRecipe):
        return (*map(_run_of, recipe.runs), *recipe.stores), (recipe.out,)
    if isinstance(recipe, TrainRecipe):
        reads = [*paths(recipe.store)]
        if isinstance(recipe, DistillRecipe):
            reads += [*recipe.teacher, *(path for s in recipe.teacher_store for path in paths(s))]
        if recipe.init_from is not None and not (recipe.out / "state").is_dir():
            reads.append(_run_of(recipe.init_from))  # one that has begun needs it no more
        return tuple(reads), (recipe.out,)
    raise TypeError(type(recipe).__name__)


def _run_of(path: Path) -> Path:
    """Return the run, given its folder or that of a model in it."""
    return path.parent if path.name in MODELS else path


def paths(one_or_more: Path | tuple[Path, ...]) -> tuple[Path, ...]:
    """Return the paths of a key that takes one or several."""
    return (one_or_more,) if isinstance(one_or_more, Path) else one_or_more


def job_name(chain: Chain | Sweep, *parts: str) -> str:
    """Return a job's name, by which it is found in the queue again.

    It ends with a digest of the chain's folder: another folder is another chain.
    """
    digest = hashlib.sha256(str(chain.folder.absolute()).encode()).hexdigest()
    return ".".join((chain.name, *parts, digest[:6]))
