"""What is shown to differ between methods, in words and as tables; see docs/statistics.md."""

from collections.abc import Iterator

from karmma_pipeline.evaluation.report.tables import Cells, Table
from karmma_pipeline.evaluation.results import Difference, Results
from karmma_pipeline.modalities import label


def sentences(results: Results) -> Iterator[str]:
    """Yield what is shown, and what is not, of the headline: over the drop curve, with everything.

    Every pair of methods has one sentence for each.
    """
    for modalities in ((), results.subsets[0]):
        for one in results.differences:
            if one.head == results.main and one.modalities == modalities:
                yield _sentence(one, results)


def _sentence(one: Difference, results: Results) -> str:
    # In the order in which the difference is positive.
    better, other, sign = one.first, one.second, 1
    if one.value < 0:
        better, other, sign = one.second, one.first, -1
    low, high = sorted((sign * one.low, sign * one.high))
    numbers = f"{sign * one.value:.1f} points [{low:.1f}, {high:.1f}] ({one.covers})"
    where = "over the drop curve"
    if one.modalities:
        where = "with all modalities"
    if one.low == one.high == 0:
        return f"{better} and {other} predict the same {where} ({one.covers})."
    verdict = f"{better} is better than {other} {where} by {numbers}."
    if low <= 0:
        verdict = (
            f"The difference between {better} and {other} {where} is not significant: {numbers}."
        )
    return f"{verdict} {_of_groups(one, sign)}".rstrip()


def _of_groups(one: Difference, sign: int) -> str:
    if not one.by_group or one.units == "groups":
        return ""
    each = ", ".join(f"{name} {sign * value + 0.0:+.1f}" for name, value in one.by_group.items())
    agreeing = _agreeing(one, "positive")
    return f"By group: {agreeing} ({each})." if agreeing else f"By group: {each}."


def _agreeing(one: Difference, how: str) -> str:
    count = one.groups_agree
    return "" if count is None else f"{count} of {len(one.by_group)} {how}"


def difference_table(results: Results) -> Table:
    """Return all differences as numbers."""
    header = ["difference", "head", "modalities", "points", "low", "high", "seeds low"]
    header += ["seeds high", "bootstrap low", "bootstrap high", "each seed", "groups", "covers"]
    rows: list[Cells] = []
    for one in results.differences:
        ends = (one.low, one.high, one.seeds_low, one.seeds_high)
        numbers = (one.value, *ends, one.bootstrap_low, one.bootstrap_high)
        cells = ("" if number is None else f"{number:.2f}" for number in numbers)
        rows.append([_pair(one), one.head, _subset(one, results), *cells, *_details(one)])
    return header, rows


def headline_table(results: Results) -> Table:
    """Return the headline's differences for people: intervals in one cell each."""
    header = ["difference", "modalities", "points", "over seeds", "bootstrap"]
    header += ["per seed", "groups", "sample"]
    rows: list[Cells] = []
    for one in results.differences:
        if one.head == results.main:
            seeds = _ends(one.seeds_low, one.seeds_high)
            drawn = _ends(one.bootstrap_low, one.bootstrap_high)
            points = f"{one.value:+.1f} {_ends(one.low, one.high)}"
            rows.append([_pair(one), _subset(one, results), points, seeds, drawn, *_details(one)])
    return header, rows


def _pair(one: Difference) -> str:
    return f"{one.first} - {one.second}"


def _subset(one: Difference, results: Results) -> str:
    return label(one.modalities, results.modalities) if one.modalities else "drop curve"


def _ends(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f"[{low:.1f}, {high:.1f}]"


def _details(one: Difference) -> Cells:
    seeds = " ".join(f"{value:+.1f}" for value in one.by_seed)
    return seeds, _agreeing(one, "same sign"), one.covers


def group_table(results: Results) -> Table:
    """Return the headline's difference over the drop curve in every group."""
    chosen = [d for d in results.differences if d.head == results.main and not d.modalities]
    names = list(chosen[0].by_group) if chosen else []
    rows: list[Cells] = [
        [_pair(d), *(f"{d.by_group[name]:+.1f}" for name in names)] for d in chosen
    ]
    return ["difference", *names], rows if names else []


def seed_table(results: Results) -> Table:
    """Return the headline of each seed: with every modality, and the mean over the drop curve."""
    header = ["model", "seed", f"{results.main} top-1", "mean over the drop curve"]
    rows: list[Cells] = []
    for method in results.methods:
        whole = results.score(method, results.subsets[0], "all", f"{results.main}_top1")
        curve = results.curve(method, results.main, "all")
        means = curve.mean.by_seed if curve else [None] * len(method.seeds)
        for seed, top1, mean in zip(method.seeds, whole.by_seed, means, strict=True):
            numbers = ("" if value is None else f"{value:.1f}" for value in (top1, mean))
            rows.append([method.name, "" if seed is None else str(seed), *numbers])
    return header, rows if len(rows) > len(results.methods) else []
