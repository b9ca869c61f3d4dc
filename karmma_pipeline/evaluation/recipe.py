"""The recipe of an evaluation: which models, on which clips, and what is measured."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from karmma_pipeline import config
from karmma_pipeline.config import Line, Recipe
from karmma_pipeline.errors import ConfigError

Name = Annotated[Line, Field(max_length=60, pattern=r"\S")]
Rate = Annotated[float, Field(ge=0, lt=1)]


class GroupFiles(Recipe):
    """Lists of EPIC-KITCHENS-100 that define groups of clips."""

    unseen: Path | None = Field(
        None, description="CSV of participants not in the training split; adds unseen_* metrics."
    )
    tail: dict[str, Path] = Field(
        default_factory=dict,
        description="Head -> CSV of its tail classes; adds tail_* metrics. An action counts "
        "as tail if any of its classes does.",
    )


Level = Annotated[int, Field(ge=0, le=5)]


class EpicSubmission(Recipe):
    """Supervision levels that an EPIC-KITCHENS-100 submission states (github epic-kitchens/sls)."""

    pretraining: Level = Field(
        2,
        description="Supervision level, pretraining (SLS-PT): 0 none, 1 public images, 2 "
        "public images and videos, ... 5 private data.",
    )
    labels: Level = Field(
        3,
        description="Supervision level, training labels (SLS-TL): 0 none, 1-2 weak, 3 "
        "start and stop times, 4-5 more.",
    )
    data: Level = Field(
        3,
        description="Supervision level, training data (SLS-TD): 0-2 part of it, 3 the "
        "training split, 4 train and val, 5 more.",
    )


Share = Annotated[float, Field(ge=0, le=1)]


class RobustnessTests(Recipe):
    """How sensors fail other than by independent drops."""

    missing: list[Share] = Field(
        default_factory=lambda: [0.0, 0.25, 0.5, 0.75, 1.0],
        description="Shares of clips that lack one modality, for each modality in turn (MiDl).",
    )
    patterns: dict[Name, Path] = Field(
        default_factory=dict,
        description="Name -> CSV of missing modalities per clip: clip_id, missing (such as "
        "rgb+audio).",
    )
    stale: list[Share] = Field(
        default_factory=list,
        description="Shares of clips in which one modality repeats the tokens of the previous "
        "clip of the same group; one additional pass per modality.",
    )


class EvaluateRecipe(Recipe):
    """``karmma evaluate``: accuracy on every subset, drop curves, costs, and a report."""

    FREE = frozenset({"out", "device"})

    runs: Annotated[list[Path], Field(min_length=1)] = Field(
        description="Run folders of train-teacher, train-baseline or distill, in legend order.",
        examples=[["runs/teacher", "runs/student"]],
    )
    stores: list[Path] = Field(
        default_factory=list,
        description="Feature stores; each run is evaluated on those with the features it was "
        "trained on. Empty: the stores of the runs' recipes.",
        examples=[["features/teacher", "features/student"]],
    )
    out: Path = Field(Path("report"), description="Folder of the report.")
    names: dict[str, Name] = Field(
        default_factory=dict,
        description="Run folder as written in `runs` -> name in the legend; "
        "default: the name in the saved model.",
    )
    checkpoint: Literal["best", "last"] = Field("best", description="Model of a run to evaluate.")
    title: Annotated[str, Field(max_length=120)] = Field(
        "", description="Name of the data in titles; default: that of the manifest or data set."
    )
    split: str = Field("val", description="Split to evaluate; empty: all clips.")
    exclude: Path | None = Field(
        None, description="Text file with ids of clips to exclude, one per line."
    )
    official_clips: Annotated[int, Field(ge=1)] | None = Field(
        None,
        description="Number of clips of the official split (EPIC-KITCHENS-100 val: "
        "9668), printed in the report.",
    )
    batch_size: Annotated[int, Field(ge=1)] = Field(64, description="Clips per forward pass.")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N.")
    drop_rates: Annotated[list[Rate], Field(min_length=1)] = Field(
        default_factory=lambda: [round(0.1 * i, 1) for i in range(10)],
        description="Probabilities with which each modality is dropped, for the drop curve.",
    )
    draws: Annotated[int, Field(ge=0)] = Field(
        20,
        description="Random draws of the sampled drop curve; 0: only the exact expected "
        "curve. With more than 6 modalities, the curve is estimated from this many random "
        "subsets per clip (at most 60 forward passes per clip, fixed subsets included); 0: no "
        "curve.",
    )
    seed: Annotated[int, Field(ge=0)] = Field(
        0, description="Seed of the random draws; all runs use the same masks."
    )
    costs: bool = Field(True, description="Count FLOPs and parameters, backbones included.")
    memory: bool = Field(
        False, description="Also measure peak memory, in one subprocess per subset (slow)."
    )
    classes: bool = Field(
        True, description="Report per-class accuracy, confusions and calibration."
    )
    probe: bool = Field(
        False,
        description="Also train linear probes on the tokens of each modality and of all "
        "modalities. Tokens must fit into memory; the store must contain the first run's "
        "train and val splits.",
    )
    groups: GroupFiles = Field(
        default_factory=GroupFiles, description="Groups of clips with separate metrics."
    )

    robustness: RobustnessTests | None = Field(
        None,
        description="Further robustness tests: `robustness: {}` for one missing "
        "modality, `{stale: [0.5, 1]}` for a sensor that repeats old data; null: none.",
    )
    submission: EpicSubmission | None = Field(
        None,
        description="Also write files for the EPIC-KITCHENS-100 server and the official "
        "evaluator; `submission: {}` uses the default supervision levels. For the test "
        "server, set split: test.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if sorted(set(self.drop_rates)) != list(self.drop_rates):
            raise ValueError("drop_rates must be strictly increasing")
        known = {str(run) for run in self.runs}
        if unknown := [name for name in self.names if str(Path(name)) not in known]:
            raise ValueError(f"names: {unknown[0]!r} is not one of the runs")
        return self


def with_stores(recipe: EvaluateRecipe) -> EvaluateRecipe:
    """Return a recipe that names stores: its own, or else those that its runs were trained on.

    Raises:
        ConfigError: a run's recipe is not there to tell them.
    """
    if recipe.stores:
        return recipe
    stores = dict.fromkeys(store for run in recipe.runs for store in _trained_on(run))
    return recipe.model_copy(update={"stores": list(stores)})


def _trained_on(run: Path) -> list[Path]:
    """Return the stores in the recipe of a run, given its folder or that of a checkpoint in it."""
    for folder in (run, run.parent):
        path = folder / "recipe.yaml"
        if path.is_file():
            stores = config.read(path).get("store", [])
            return [Path(store) for store in (stores if isinstance(stores, list) else [stores])]
    raise ConfigError(f"{run}: no recipe.yaml with a store; pass the store with --store.")


_DATA_SETS = {
    "epic_kitchens_100": "EPIC-KITCHENS-100",
    "something_something_v2": "Something-Something V2",
    "ego4d_fho_lta": "Ego4D",
    "ego_exo4d_keysteps": "Ego-Exo4D",
}


def data_name(store: Path) -> str:
    """Return what the clips of a store are called: the data set, the list, else the folder."""
    folder = store.resolve().parent
    try:
        tree = config.read(folder / "recipe.yaml")
    except ConfigError:  # a store that no extraction of ours made
        return folder.name
    dataset = tree.get("dataset") or {}
    if (kind := dataset.get("kind")) in _DATA_SETS:
        return _DATA_SETS[kind]
    listed = Path(tree.get("manifest") or dataset.get("path") or dataset.get("root") or folder)
    return listed.parent.name or folder.name if listed.stem == "manifest" else listed.stem
