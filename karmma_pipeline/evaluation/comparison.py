"""Runs of one name are one method, and what is between methods: paired by clip and by seed.

R runs, S seeds, N clips that count, Q quantities: top-1 on each subset, on the drop curve at each
rate, and the mean over that curve.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
import numpy.typing as npt

from karmma_pipeline import config
from karmma_pipeline.errors import ConfigError
from karmma_pipeline.evaluation import statistics
from karmma_pipeline.evaluation.drop_curve import Correct, expected_per_clip
from karmma_pipeline.evaluation.recipe import EvaluateRecipe
from karmma_pipeline.evaluation.results import (
    Difference,
    Method,
    MethodDrop,
    MethodSubset,
    OverSeeds,
    Protocol,
    RunResult,
)
from karmma_pipeline.logs import progress_bar
from karmma_pipeline.models.saved import ModelCard

Floats = npt.NDArray[np.float64]
Key = tuple[Protocol, str]
PROTOCOLS: tuple[Protocol, ...] = ("all", "complete")

# What tells the runs of one method apart and is no setting of it.
_OF_A_SEED = {"seed", "out", "name", "store", "teacher", "teacher_store", "teacher_table", "device"}


def group_by_name(cards: Sequence[tuple[Path, str, ModelCard]]) -> dict[str, list[int]]:
    """Return the places of the runs of each name, in the order in which they were given.

    Raises:
        ConfigError: two runs of a name have one seed too, or are of another kind.
    """
    methods: dict[str, list[int]] = {}
    seen: dict[tuple[str, int | None], int] = {}
    for number, (path, name, card) in enumerate(cards):
        seed = card.training.get("seed")
        first, _, other = cards[methods.setdefault(name, [number])[0]]
        if other.kind != card.kind:
            raise ConfigError(
                f"runs {first} and {path} both have the name {name!r}, but one is a "
                f"{other.kind} and one a {card.kind}; rename one with `names`."
            )
        if (there := seen.setdefault((name, seed), number)) != number:
            same = cards[there][2].weights_sha256 == card.weights_sha256
            what = "are the same model" if same else "are not the same model"
            which = "no recorded seed" if seed is None else f"seed {seed}"
            raise ConfigError(
                f"runs {cards[there][0]} and {path} {what}, and both are called {name!r} and "
                f"have {which}: runs with the same name are one method and must differ in their "
                "seed; remove one, or rename it with `names`."
            )
        if number not in methods[name]:
            methods[name].append(number)
    return methods


def warn_of_runs(cards: Sequence[tuple[Path, str, ModelCard]]) -> Iterator[str]:
    """Yield what makes the runs of a name less than one method over several seeds."""
    for name, numbers in group_by_name(cards).items():
        first, *others = [cards[n][2].training for n in numbers]
        changed = {
            f"{one.path}: {one.there!r}, {one.here!r}": None
            for other in others
            for one in config.differences(first, other)
            if one.path.partition(".")[0] not in _OF_A_SEED
        }
        if changed:
            how = ", ".join([*changed][:3])
            yield (
                f"The runs of {name!r} differ in more than their seed ({how}); they are shown "
                "as one method, so its spread is not due to the seed alone."
            )
        if others and "teacher" in first and all(o["teacher"] == first["teacher"] for o in others):
            yield (
                f"All seeds of {name!r} were distilled from the same teacher; the intervals do "
                "not cover variation of the teacher."
            )


@dataclass(frozen=True)
class Answers:
    """How rightly one run answers each clip, for every quantity.

    Attributes:
        rows: which clips count under a protocol and have a label of the metric, bool.
        values: [Q, N], 0 to 1 each.
        subsets: quantities that are subsets; the rest are drop rates and, last, their mean.
    """

    rows: dict[Key, npt.NDArray[np.bool_]]
    values: dict[Key, Floats]
    subsets: int

    @classmethod
    def of(cls, correct: Correct, rates: Sequence[float]) -> "Answers":
        """Take them from what a run answers rightly."""
        rows = {
            (protocol, metric): correct.clips(protocol) & correct.known[metric]
            for protocol in PROTOCOLS
            for metric in correct.metrics
        }
        rows = {key: of for key, of in rows.items() if of.any()}
        count, values = len(correct.run.subsets), {}
        for (protocol, metric), chosen in rows.items():
            values[protocol, metric] = correct.table[metric, 1][:count, chosen].astype(np.float64)
            if correct.has_curve:
                curve = expected_per_clip(correct, metric, chosen, rates)
                parts = (values[protocol, metric], curve, curve.mean(axis=0, keepdims=True))
                values[protocol, metric] = np.concatenate(parts)
        return cls(rows, values, count)


def summarise(
    name: str, numbers: Sequence[int], runs: Sequence[RunResult], answers: Sequence[Answers]
) -> Method:
    """Return a method; what it is over its seeds only if it has several."""
    of = [runs[n] for n in numbers]
    method = Method(
        name=name, kind=of[0].kind, runs=tuple(numbers), seeds=tuple(run.seed for run in of)
    )
    if len(of) == 1:
        return method
    intervals = _intervals([answers[n] for n in numbers])
    subsets = []
    for place, one in enumerate(of[0].subsets):
        scores = {
            score: _over_seeds([run.subsets[place].scores[score].value for run in of])
            for score in one.scores
        }
        number = place % (len(of[0].subsets) // len(PROTOCOLS))
        for metric in (m for protocol, m in intervals if protocol == one.protocol):
            value = scores[f"{metric}_top1"]
            scores[f"{metric}_top1"] = _within(value, intervals[one.protocol, metric][number])
        subsets.append(
            MethodSubset(modalities=one.modalities, protocol=one.protocol, scores=scores)
        )
    drop = tuple(_curve(place, of, intervals) for place in range(len(of[0].drop)))
    return method.model_copy(update={"subsets": tuple(subsets), "drop": drop})


def _curve(
    place: int, of: Sequence[RunResult], intervals: dict[Key, list[statistics.Estimate]]
) -> MethodDrop:
    curves = [run.drop[place] for run in of]
    key = (curves[0].protocol, curves[0].head)
    *at, mean = intervals[key][-len(curves[0].points) - 1 :]
    points = zip(*(curve.points for curve in curves), strict=True)
    return MethodDrop(
        head=key[1],
        protocol=key[0],
        points=tuple(
            _within(_over_seeds([p.expected for p in point]), interval)
            for point, interval in zip(points, at, strict=True)
        ),
        mean=_within(_over_seeds([curve.mean for curve in curves]), mean),
    )


def _intervals(answers: Sequence[Answers]) -> dict[Key, list[statistics.Estimate]]:
    return {
        key: [
            statistics.estimate([block])
            for block in np.stack([of.values[key] for of in answers], axis=1)
        ]
        for key in answers[0].values
    }


def _over_seeds(values: Sequence[float | None]) -> OverSeeds:
    known = [v for v in values if v is not None]
    whole = len(known) == len(values)  # labels are the runs': all have a value or none
    return OverSeeds(
        mean=fmean(known) if whole else None,
        sd=stdev(known) if whole and len(known) > 1 else None,
        by_seed=tuple(values),
    )


def _within(value: OverSeeds, interval: statistics.Estimate) -> OverSeeds:
    ends = {"low": max(0.0, 100 * interval.low), "high": min(100.0, 100 * interval.high)}
    return value.model_copy(update=ends)


def compare(
    methods: Sequence[Method],
    answers: Sequence[Answers],
    subsets: Sequence[tuple[str, ...]],
    groups: npt.NDArray[np.str_],
    recipe: EvaluateRecipe,
    check: Callable[[], None],
) -> Iterator[Difference]:
    """Yield every difference between two methods: the later one of two minus the earlier.

    Args:
        methods: two or more.
        answers: of each run.
        subsets: that were evaluated, as `Answers` has them.
        groups: of each clip, empty where unknown; of clips that do not count too.
        recipe: gives the seed of the bootstrap.
        check: called before each of many steps, may raise.
    """
    for (protocol, head), rows in answers[0].rows.items():
        if protocol != "all":
            continue
        values = np.stack([of.values[protocol, head] for of in answers])  # [R, Q, N]
        curve = values.shape[1] > len(subsets)
        # Of the drop curve its mean alone is compared.
        chosen = [*range(len(subsets)), *([values.shape[1] - 1] if curve else [])]
        comparison = _Comparison(values[:, chosen], groups[rows], recipe.seed, check)
        names = [*subsets, *([()] if curve else [])]
        pairs = [*combinations(methods, 2)]
        for earlier, later in progress_bar(pairs, f"compare {head}", unit="pair"):
            yield from comparison.of(later, earlier, head, names)


class _Comparison:
    """Differences of one head.

    Args:
        values: of each run, [R, Q, N].
        groups: of the clips, [N].
        seed: of the bootstrap.
        check: see `compare`.
    """

    def __init__(
        self,
        values: Floats,
        groups: npt.NDArray[np.str_],
        seed: int,
        check: Callable[[], None],
    ) -> None:
        self.values, self._check = values, check
        R, Q, N = values.shape
        self._names, self._group = statistics.groups_of(groups)
        self.grouped = len(self._names) >= statistics.LEAST_GROUPS
        sums, sizes = values.reshape(R * Q, N), np.ones(N, np.int64)
        if self.grouped:
            sizes = np.bincount(self._group)
            sums = np.stack([np.bincount(self._group, row, len(sizes)) for row in sums])
        self._resampled = statistics.Resampled(sums, sizes, seed, check)

    def of(
        self, first: Method, second: Method, head: str, names: Sequence[tuple[str, ...]]
    ) -> Iterator[Difference]:
        """Yield the differences between two methods in every quantity."""
        self._check()
        common = [seed for seed in first.seeds if seed in second.seeds]
        rows = [
            np.array([m.runs[m.seeds.index(seed)] for seed in common or m.seeds])
            for m in (first, second)
        ]
        Q = self.values.shape[1]
        places = [of[:, None] * Q + np.arange(Q) for of in rows]
        low, high = self._resampled.interval(places[0], places[1], paired=bool(common))
        covers = self._covers(len(common), [len(m.seeds) for m in (first, second)])
        for number, modalities in enumerate(names):
            ours, theirs = (self.values[of, number] for of in rows)  # [S, N]
            blocks = [ours - theirs] if common else [ours, -theirs]
            yield Difference(
                first=first.name,
                second=second.name,
                head=head,
                modalities=modalities,
                covers=covers,
                paired=bool(common),
                seeds=tuple(common),
                bootstrap_low=100 * float(low[number]),
                bootstrap_high=100 * float(high[number]),
                **self._numbers(blocks, bool(common)),
            )

    def _numbers(self, blocks: list[Floats], paired: bool) -> dict[str, object]:
        units = [statistics.by_group(b, self._group) for b in blocks] if self.grouped else blocks
        found = statistics.estimate(units)
        by_clip = np.sum([block.mean(axis=0) for block in blocks], axis=0)
        by_seed = blocks[0].mean(axis=1) if paired else np.zeros(0)
        seeds = statistics.over_seeds(by_seed)
        of_group = {
            str(name): 100 * float(by_clip[self._group == number].mean())
            for number, name in enumerate(self._names)
        }
        agree = sum(np.sign(of) == np.sign(found.value) for of in of_group.values())
        return {
            "value": 100 * found.value,
            "low": 100 * found.low,
            "high": 100 * found.high,
            "df": found.df if np.isfinite(found.df) else None,
            "by_seed": tuple((100 * by_seed).tolist()),
            "seeds_low": 100 * seeds[0] if seeds else None,
            "seeds_high": 100 * seeds[1] if seeds else None,
            "units": "groups" if self.grouped else "clips",
            "clips": len(by_clip),
            "by_group": of_group,
            "groups_agree": int(agree) if of_group and found.value else None,  # with no difference
        }

    def _covers(self, common: int, counts: Sequence[int]) -> str:
        clips = self.values.shape[2]
        units = f"{clips} clips"
        if self.grouped:
            units = f"{clips} clips in {len(self._names)} groups"
        one, other = counts
        if not common:
            return f"{units}, {_count(one)} and {_count(other)}, unpaired"
        of = "" if common == one == other else " in common"
        return f"{units}, {_count(common)}{of}"


def _count(seeds: int) -> str:
    return "one seed" if seeds == 1 else f"{seeds} seeds"
