"""What an evaluation found: the one file (``results.json``) that tables, figures and pages show.

Accuracies are percentages. Subsets stand in the order of
`karmma_pipeline.modalities.evaluated_subsets`, classes in the order of their ids.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from karmma_pipeline import files
from karmma_pipeline.config import Recipe
from karmma_pipeline.errors import KarmmaError
from karmma_pipeline.metrics import ACTION

Protocol = Literal["all", "complete"]
Percent = Annotated[float, Field(ge=0, le=100)]


def metric_names(heads: Iterable[str]) -> tuple[str, ...]:
    """Return what is scored: the heads in order, then `action` if there are several."""
    names = tuple(heads)
    return (*names, ACTION) if ACTION not in names and len(names) > 1 else names


class Score(Recipe):
    """A share of right answers and its 95 % Wilson interval over clips."""

    correct: int = Field(description="Clips answered rightly.")
    n: int = Field(description="Clips with a known label.")
    value: Percent | None = Field(description="100 * correct / n; null if n is 0.")
    low: Percent | None = Field(description="Lower end of the interval; null if n is 0.")
    high: Percent | None = Field(description="Upper end of the interval; null if n is 0.")


class SubsetScores(Recipe):
    """Accuracy when only some modalities are used."""

    modalities: tuple[str, ...] = Field(description="The modalities used.")
    protocol: Protocol = Field(
        description="all: every clip, natively absent modalities are absent; "
        "complete: only clips that natively have every modality."
    )
    clips: int = Field(description="Clips evaluated.")
    without: int = Field(description="Of these, clips with none of the modalities: counted wrong.")
    scores: dict[str, Score] = Field(
        description="`HEAD_top1`, `HEAD_top5`, and `tail_HEAD`, `unseen_HEAD` where asked for; "
        "HEAD may be `action`."
    )
    mean_class: dict[str, Percent | None] = Field(
        description="Mean over the classes that occur of the top-1 accuracy; null if none does."
    )


class Sampled(Recipe):
    """Accuracy under drawn masks."""

    mean: Percent = Field(description="Mean over the draws.")
    low: Percent = Field(
        description="2.5 % quantile over the draws; where the curve itself is an estimate, the "
        "lower end of the 95 % interval that the draws alone leave open."
    )
    high: Percent = Field(description="97.5 % quantile over the draws, or that interval's end.")


class DropPoint(Recipe):
    """Top-1 accuracy when each present modality drops with one probability."""

    rate: Annotated[float, Field(ge=0, lt=1)] = Field(description="The probability.")
    expected: Percent = Field(
        description="Mean over all masks: exact up to 6 modalities, else an estimate."
    )
    low: Percent = Field(description="Lower end of the 95 % interval over clips.")
    high: Percent = Field(description="Upper end of the 95 % interval over clips.")
    sampled: Sampled | None = Field(None, description="The same, with drawn masks.")


class DropCurve(Recipe):
    """A drop curve of one head."""

    head: str = Field(description="A head, or `action`.")
    protocol: Protocol = Field(description="Which clips count; see SubsetScores.")
    points: tuple[DropPoint, ...] = Field(description="By rising drop rate.")

    def at(self, rate: float) -> DropPoint | None:
        """Return the point at a drop rate, if it was evaluated."""
        return next((p for p in self.points if abs(p.rate - rate) < 1e-9), None)

    @property
    def mean(self) -> float:
        """Mean of the expected accuracy over all drop rates."""
        return sum(p.expected for p in self.points) / len(self.points)


class Cost(Recipe):
    """What one clip costs with some modalities, backbones included."""

    modalities: tuple[str, ...] = Field(description="The modalities used.")
    gflops: float | None = Field(
        None,
        description="1e9 operations, 2 per multiply-add, absent modalities left out (the paper's).",
    )
    gflops_as_run: float | None = Field(
        None, description="The same with absent modalities as this model treats them."
    )
    parameters: int | None = Field(None, description="Weights of the networks that run.")
    memory_mib: float | None = Field(None, description="Peak memory of one forward pass.")


class RunResult(Recipe):
    """One model."""

    name: str = Field(description="Name in legends and tables.")
    kind: Literal["teacher", "student", "baseline"] = Field(description="How it was trained.")
    seed: int | None = Field(None, description="Seed of its training, if recorded.")
    weights: dict[str, str] = Field(description="Weights of each modality's frozen backbone.")
    size: dict[str, str | int | float] = Field(description="Size of the fusion block.")
    paper_size: bool = Field(False, description="Whether its costs compare with the paper's.")
    model_digest: str = Field(description="sha256 of the saved model.")
    store_digest: str = Field(description="Digest of the feature store it was evaluated on.")
    subsets: tuple[SubsetScores, ...] = Field(
        description="Every subset that was evaluated, under both protocols."
    )
    drop: tuple[DropCurve, ...] = Field(description="Drop curves per head and protocol.")
    costs: tuple[Cost, ...] = Field((), description="Costs per subset; empty if not asked for.")
    cost_note: str = Field("", description="How the costs were measured.")
    class_correct: dict[str, tuple[int, ...]] = Field(
        description="Right answers per class with every modality, protocol `all`."
    )

    def subset(self, modalities: tuple[str, ...], protocol: Protocol) -> SubsetScores:
        """Return the scores of one subset."""
        return next(
            s for s in self.subsets if s.modalities == modalities and s.protocol == protocol
        )

    def curve(self, head: str, protocol: Protocol) -> DropCurve | None:
        """Return a drop curve; a protocol without clips that have a label has none."""
        return next((c for c in self.drop if c.head == head and c.protocol == protocol), None)


class Data(Recipe):
    """The clips that every run answered."""

    name: str = Field(description="What the clips are called in titles.")
    split: str = Field(description="Split; empty means every clip of the store.")
    clips: int = Field(description="Clips evaluated.")
    official_clips: int | None = Field(None, description="Size of the official split, if stated.")
    complete: int = Field(description="Clips that natively have every modality.")
    empty: int = Field(description="Clips that natively have none.")
    present: dict[str, int] = Field(description="Clips that natively have each modality.")
    reasons: dict[str, dict[str, int]] = Field(description="Why clips lack a modality, counted.")
    heads: dict[str, tuple[str, ...]] = Field(description="Class names per head.")
    class_clips: dict[str, tuple[int, ...]] = Field(description="Clips per class and head.")
    constant: dict[str, Percent | None] = Field(
        description="Accuracy of always naming the majority class, per head and `action`; null "
        "where no clip has a label."
    )
    notes: tuple[str, ...] = Field((), description="What else a reader must know.")


class Results(Recipe):
    """Everything an evaluation found."""

    version: Literal[1] = Field(1, description="Version of this schema.")
    software: dict[str, str] = Field(description="Versions of what computed it.")
    commit: str = Field(description="Commit of the code; empty if unknown.")
    modalities: tuple[str, ...] = Field(description="Modalities in canonical order.")
    rates: tuple[float, ...] = Field(description="Drop rates.")
    draws: int = Field(description="Draws of the sampled curve, for each clip.")
    seed: int = Field(description="Seed of the draws; all runs see the same masks.")
    data: Data = Field(description="The clips.")
    runs: tuple[RunResult, ...] = Field(description="The models.")

    @property
    def metrics(self) -> tuple[str, ...]:
        """Heads in order, then `action`; a single head is the action itself."""
        return metric_names(self.data.heads)

    @property
    def subsets(self) -> tuple[tuple[str, ...], ...]:
        """The subsets of modalities that were evaluated."""
        return tuple(s.modalities for s in self.runs[0].subsets if s.protocol == "all")

    @property
    def every_subset(self) -> bool:
        """Whether those are all, so that drop curves are exact."""
        return len(self.subsets) == 2 ** len(self.modalities) - 1

    @property
    def main(self) -> str:
        """The head whose accuracy is the headline."""
        return self.metrics[-1] if ACTION not in self.metrics else ACTION

    @property
    def weights(self) -> tuple[str, ...]:
        """Names of the random weights that any run stands on; empty if all were trained."""
        return tuple(
            sorted({w for r in self.runs for w in r.weights.values() if w.startswith("random:")})
        )


def write(results: Results, path: Path) -> None:
    """Write results as JSON; equal results are equal bytes."""
    files.write_json(path, results.model_dump(mode="json"))


def read(path: Path) -> Results:
    """Read results, so that tables, figures and pages can be made again without a model.

    Raises:
        KarmmaError: the file cannot be read, or another version wrote it.
    """
    try:
        return Results.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise KarmmaError(f"{path}: the results cannot be read ({error.strerror}).") from None
    except (UnicodeDecodeError, json.JSONDecodeError, ValidationError) as error:
        reason = str(error).splitlines()[0]
        raise KarmmaError(
            f"{path}: not results of this version ({reason}); run `karmma evaluate` again."
        ) from None
