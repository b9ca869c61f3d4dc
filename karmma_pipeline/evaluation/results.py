"""What an evaluation found: the one file (``results.json``) that tables, figures and pages show.

Accuracies are percentages. Subsets stand in the order of
`karmma_pipeline.modalities.evaluated_subsets`, classes in the order of their ids.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, ValidationError, model_validator

from karmma_pipeline import files
from karmma_pipeline.config import Recipe
from karmma_pipeline.errors import KarmmaError
from karmma_pipeline.metrics import ACTION

Protocol = Literal["all", "complete"]
Kind = Literal["teacher", "student", "baseline"]
Percent = Annotated[float, Field(ge=0, le=100)]


def metric_names(heads: Iterable[str]) -> tuple[str, ...]:
    """Return what is scored: the heads in order, then `action` if there are several."""
    names = tuple(heads)
    return (*names, ACTION) if ACTION not in names and len(names) > 1 else names


class Score(Recipe):
    """An accuracy and its 95 % Wilson interval over clips."""

    correct: int = Field(description="Correctly classified clips.")
    n: int = Field(description="Clips with a known label.")
    value: Percent | None = Field(description="100 * correct / n; null if n is 0.")
    low: Percent | None = Field(description="Lower end of the interval; null if n is 0.")
    high: Percent | None = Field(description="Upper end of the interval; null if n is 0.")


class SubsetScores(Recipe):
    """Accuracy when only some modalities are used."""

    modalities: tuple[str, ...] = Field(description="The modalities used.")
    protocol: Protocol = Field(
        description="all: every clip, natively absent modalities are absent; "
        "complete: only clips that natively have all modalities."
    )
    clips: int = Field(description="Clips evaluated.")
    without: int = Field(
        description="Of these, clips with none of the modalities; counted as wrong."
    )
    scores: dict[str, Score] = Field(
        description="`HEAD_top1`, `HEAD_top5`, and `tail_HEAD`, `unseen_HEAD` if requested; "
        "HEAD may be `action`."
    )
    mean_class: dict[str, Percent | None] = Field(
        description="Mean top-1 accuracy over the classes that occur; null if none does."
    )


class Sampled(Recipe):
    """Accuracy under drawn masks."""

    mean: Percent = Field(description="Mean over the draws.")
    low: Percent = Field(
        description="2.5 % quantile over the draws; if the curve itself is an estimate, the "
        "lower end of its 95 % interval over draws alone."
    )
    high: Percent = Field(
        description="97.5 % quantile over the draws, or the upper end of that interval."
    )


class DropPoint(Recipe):
    """Top-1 accuracy when each present modality drops with one probability."""

    rate: Annotated[float, Field(ge=0, lt=1)] = Field(description="The probability.")
    expected: Percent = Field(
        description="Mean over all masks: exact up to 6 modalities, else an estimate."
    )
    low: Percent = Field(description="Lower end of the 95 % interval over clips.")
    high: Percent = Field(description="Upper end of the 95 % interval over clips.")
    sampled: Sampled | None = Field(None, description="The same, with sampled masks.")


class DropCurve(Recipe):
    """A drop curve of one head."""

    head: str = Field(description="A head, or `action`.")
    protocol: Protocol = Field(description="Which clips count; see SubsetScores.")
    points: tuple[DropPoint, ...] = Field(description="By increasing drop rate.")

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
        None, description="The same, with absent modalities treated as by this model."
    )
    parameters: int | None = Field(None, description="Parameters of the networks that run.")
    memory_mib: float | None = Field(None, description="Peak memory of one forward pass.")


class Bin(Recipe):
    """Clips whose prediction has about the same probability."""

    clips: int = Field(description="Number of clips; 15 bins of equal width cover 0 to 1.")
    confidence: float = Field(description="Mean probability of the predictions.")
    accuracy: float = Field(description="Share of correct predictions.")


class Calibration(Recipe):
    """How well probabilities match accuracy, with every modality."""

    ece: float = Field(
        description="Expected calibration error: mean |accuracy - confidence| of bins, by clips."
    )
    bins: tuple[Bin, ...] = Field(description="By increasing probability.")


class RobustnessPoint(Recipe):
    """Accuracy if some clips are affected."""

    share: Annotated[float, Field(ge=0, le=1)] = Field(description="Share of clips affected.")
    hit: int = Field(description="Number of clips affected.")
    scores: dict[str, Score] = Field(description="`HEAD_top1` over all clips, affected or not.")


class Robustness(Recipe):
    """One test beyond independent drops."""

    kind: Literal["missing", "pattern", "stale"] = Field(
        description="missing: one modality is absent; pattern: modalities listed in a CSV are "
        "absent; stale: one modality repeats the tokens of the previous clip of the same "
        "group."
    )
    what: str = Field(description="The modality, or the name of the list.")
    points: tuple[RobustnessPoint, ...] = Field(description="In the order of the recipe.")


class RunResult(Recipe):
    """One model."""

    name: str = Field(description="Name in legends and tables.")
    kind: Kind = Field(description="How it was trained.")
    seed: int | None = Field(None, description="Seed of its training, if recorded.")
    weights: dict[str, str] = Field(
        description="Weights of each modality's backbone; of one that is trained too, the first."
    )
    size: dict[str, str | int | float] = Field(description="Size of the fusion block.")
    paper_size: bool = Field(
        False, description="Whether its costs are comparable with the paper's."
    )
    trained_on: str | None = Field(None, description="Split it was trained on, if recorded.")
    chosen_on: str | None = Field(
        None, description="Split on which its epoch was chosen; null: none, or not recorded."
    )
    model_digest: str = Field(description="sha256 of the saved model.")
    store_digest: str = Field(description="Digest of the feature store it was evaluated on.")
    subsets: tuple[SubsetScores, ...] = Field(
        description="Every subset that was evaluated, under both protocols."
    )
    drop: tuple[DropCurve, ...] = Field(description="Drop curves per head and protocol.")
    robustness: tuple[Robustness, ...] = Field((), description="Further tests, if requested.")
    costs: tuple[Cost, ...] = Field((), description="Costs per subset; empty if not requested.")
    cost_note: str = Field("", description="How the costs were measured.")
    class_correct: dict[str, tuple[int, ...]] = Field(
        description="Correct predictions per class with all modalities, protocol `all`."
    )
    confusion: dict[str, tuple[tuple[int, int, int], ...]] = Field(
        {},
        description="Per head: class, prediction, number of clips (if any), with all "
        "modalities; prediction -1: no modality present.",
    )
    calibration: dict[str, Calibration] = Field(
        {}, description="Per head, and of `action` by the product of the heads' probabilities."
    )

    def subset(self, modalities: tuple[str, ...], protocol: Protocol) -> SubsetScores:
        """Return the scores of one subset."""
        return next(
            s for s in self.subsets if s.modalities == modalities and s.protocol == protocol
        )

    def curve(self, head: str, protocol: Protocol) -> DropCurve | None:
        """Return a drop curve; a protocol without clips that have a label has none."""
        return next((c for c in self.drop if c.head == head and c.protocol == protocol), None)


class OverSeeds(Recipe):
    """A percentage of one method over the seeds that it was trained with."""

    mean: Percent | None = Field(description="Plain mean over the seeds; null without a clip.")
    sd: float | None = Field(description="Their standard deviation, n - 1; null for one seed.")
    by_seed: tuple[Percent | None, ...] = Field(description="In the order of the method's seeds.")
    low: Percent | None = Field(
        None, description="Lower end of the 95 % interval over clips and seeds, if computed."
    )
    high: Percent | None = Field(None, description="Upper end of that interval.")


class MethodSubset(Recipe):
    """Accuracy of a method when only some modalities are used."""

    modalities: tuple[str, ...] = Field(description="The modalities used.")
    protocol: Protocol = Field(description="Which clips count; see SubsetScores.")
    scores: dict[str, OverSeeds] = Field(description="As in SubsetScores.")


class MethodDrop(Recipe):
    """Drop curve of a method."""

    head: str = Field(description="A head, or `action`.")
    protocol: Protocol = Field(description="Which clips count; see SubsetScores.")
    points: tuple[OverSeeds, ...] = Field(description="Expected top-1 by increasing drop rate.")
    mean: OverSeeds = Field(description="Plain mean of the expected top-1 over all drop rates.")


class Method(Recipe):
    """Runs of one name, each with a seed of its own."""

    name: str = Field(description="Name in legends and tables.")
    kind: Kind = Field(description="How they were trained.")
    runs: tuple[int, ...] = Field(description="Indices of its runs in `runs`.")
    seeds: tuple[int | None, ...] = Field(description="Their seeds; null if not recorded.")
    subsets: tuple[MethodSubset, ...] = Field(
        (), description="Over the seeds; empty for a single seed, see `runs`."
    )
    drop: tuple[MethodDrop, ...] = Field((), description="Likewise.")


class Difference(Recipe):
    """First minus second method in top-1, in points; clips are paired. Protocol `all`."""

    first: str = Field(description="Method.")
    second: str = Field(description="Method to subtract.")
    head: str = Field(description="A head, or `action`.")
    modalities: tuple[str, ...] = Field(
        description="The modalities used; empty: the plain mean over all drop rates."
    )
    value: float = Field(description="Mean difference over clips and seeds.")
    low: float = Field(
        description="Lower end of the 95 % interval: t, with the variance of crossed seeds and "
        "units and Satterthwaite's degrees of freedom."
    )
    high: float = Field(description="Upper end.")
    df: float | None = Field(description="Degrees of freedom; null if nothing varies.")
    covers: str = Field(description="What that interval covers.")
    paired: bool = Field(description="Whether seeds are paired; if not, no seed is in common.")
    seeds: tuple[int | None, ...] = Field(description="The seeds in common; empty: not paired.")
    by_seed: tuple[float, ...] = Field(description="Difference for each of `seeds`.")
    seeds_low: float | None = Field(
        None, description="Lower end of the 95 % t interval over seeds, with the clips fixed."
    )
    seeds_high: float | None = Field(None, description="Upper end.")
    bootstrap_low: float = Field(
        description="2.5 % quantile of 10,000 bootstrap draws of seeds and units together."
    )
    bootstrap_high: float = Field(description="97.5 % quantile.")
    units: Literal["clips", "groups"] = Field(description="What is resampled in addition to seeds.")
    clips: int = Field(description="Clips with a known label.")
    by_group: dict[str, float] = Field(
        {}, description="Difference in every group, if there are at least two."
    )
    groups_agree: int | None = Field(
        None, description="Groups whose difference has the sign of `value`; null if that is 0."
    )


class Probe(Recipe):
    """A linear classifier of one head on the tokens themselves: ridge, one against the rest."""

    store_digest: str = Field(description="The features.")
    modalities: tuple[str, ...] = Field(
        description="Modalities whose flattened tokens are its input."
    )
    head: str = Field(description="A head, or `action`: all heads correct.")
    clips: int = Field(description="Clips it was trained on: those that have a modality of it.")
    features: int = Field(description="Width of its input.")
    penalty: float | None = Field(
        description="Lambda, in units of `features`; null for `action`, which has one per head."
    )
    trained_on: str = Field(description="Split.")
    chosen_on: str = Field(description="Split on which the penalty was chosen.")
    score: Score = Field(description="Top-1 on the clips of the report, protocol `all`.")


class Data(Recipe):
    """The clips on which every run was evaluated."""

    name: str = Field(description="Name of the data in titles.")
    split: str = Field(description="Split; empty means all clips of the store.")
    clips: int = Field(description="Clips evaluated.")
    official_clips: int | None = Field(None, description="Size of the official split, if stated.")
    complete: int = Field(description="Clips that natively have all modalities.")
    empty: int = Field(description="Clips that natively have none.")
    present: dict[str, int] = Field(description="Clips that natively have each modality.")
    reasons: dict[str, dict[str, int]] = Field(
        description="Number of clips per reason for a missing modality."
    )
    heads: dict[str, tuple[str, ...]] = Field(description="Class names per head.")
    class_clips: dict[str, tuple[int, ...]] = Field(description="Clips per class and head.")
    constant: dict[str, Percent | None] = Field(
        description="Accuracy of always predicting the majority class, per head and for "
        "`action`; null if no clip has a label."
    )
    notes: tuple[str, ...] = Field((), description="Further notes.")


class Results(Recipe):
    """Everything an evaluation found."""

    version: Literal[1] = Field(1, description="Version of this schema.")
    software: dict[str, str] = Field(
        description="Versions of the software that computed the results."
    )
    commit: str = Field(description="Commit of the code; empty if unknown.")
    modalities: tuple[str, ...] = Field(description="Modalities in canonical order.")
    rates: tuple[float, ...] = Field(description="Drop rates.")
    draws: int = Field(description="Draws of the sampled curve, for each clip.")
    seed: int = Field(description="Seed of the draws; all runs see the same masks.")
    data: Data = Field(description="The clips.")
    runs: tuple[RunResult, ...] = Field(description="The models.")
    methods: tuple[Method, ...] = Field(
        (), description="The runs by name; results of earlier versions have none."
    )
    differences: tuple[Difference, ...] = Field(
        (),
        description="Between all pairs of methods, of every head and `action`: on each subset "
        "and over the drop curve.",
    )
    probes: tuple[Probe, ...] = Field((), description="Linear probes, if requested.")
    probe_notes: tuple[str, ...] = Field((), description="Probes that were not trained, and why.")
    warnings: tuple[str, ...] = Field((), description="Warnings about the validity of the numbers.")

    @model_validator(mode="after")
    def _each_run_a_method(self) -> Self:
        if not self.methods:
            single = tuple(
                Method(name=run.name, kind=run.kind, runs=(number,), seeds=(run.seed,))
                for number, run in enumerate(self.runs)
            )
            object.__setattr__(self, "methods", single)
        return self

    def score(
        self, method: Method, modalities: tuple[str, ...], protocol: Protocol, name: str
    ) -> OverSeeds:
        """Return a score of a method on a subset."""
        for of in method.subsets:
            if (of.modalities, of.protocol) == (modalities, protocol):
                return of.scores[name]
        one = self.runs[method.runs[0]].subset(modalities, protocol).scores[name]
        return OverSeeds(mean=one.value, sd=None, by_seed=(one.value,), low=one.low, high=one.high)

    def curve(self, method: Method, head: str, protocol: Protocol) -> MethodDrop | None:
        """Return the drop curve of a method; see `RunResult.curve`."""
        if len(method.runs) > 1:
            found = (c for c in method.drop if (c.head, c.protocol) == (head, protocol))
            return next(found, None)
        one = self.runs[method.runs[0]].curve(head, protocol)
        if one is None:
            return None
        points = tuple(
            OverSeeds(mean=p.expected, sd=None, by_seed=(p.expected,), low=p.low, high=p.high)
            for p in one.points
        )
        mean = OverSeeds(mean=one.mean, sd=None, by_seed=(one.mean,))
        return MethodDrop(head=head, protocol=protocol, points=points, mean=mean)

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
        """Names of the random weights that any run began with; empty if all were pretrained."""
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
            f"{path}: not readable as results of this version ({reason}); run `karmma evaluate` "
            "again."
        ) from None
