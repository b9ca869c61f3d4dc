"""Which clips a run answers rightly, and how its accuracy falls while modalities drop out.

Up to 6 modalities every subset is evaluated once, and a drop curve follows from them exactly,
because a mask is a subset: its expected value needs no sampling. With more modalities it is
estimated. Given how many of a clip's modalities are left, all its subsets of that size are as
likely; the mean over those of one modality and over those that lack one is known, since all of them
were evaluated, and subsets drawn for each clip stand for the sizes between. One set of draws serves
all drop rates: each is weighted by how likely its size is.

S subsets, D draws for each clip, N clips, M modalities.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from karmma_pipeline.data.loading.masks import clip_keys, modality_mask
from karmma_pipeline.evaluation.predict import SubsetLogits, drawn_sizes
from karmma_pipeline.evaluation.recipe import EvaluateRecipe
from karmma_pipeline.evaluation.results import (
    DropCurve,
    DropPoint,
    Protocol,
    Sampled,
    metric_names,
)
from karmma_pipeline.logs import progress_bar
from karmma_pipeline.metrics import (
    ACTION,
    drop_distribution,
    kept_distribution,
    metric_correct,
)
from karmma_pipeline.modalities import ALL_SUBSETS_UP_TO

Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]
SubsetsOfADraw = tuple[npt.NDArray[np.uint8], Bools]
TOP = (1, 5)
_Z = 1.959964


class Correct:
    """Right or wrong for every pass and clip, per head and `action`: bool [S + D, N], top-5 [S, N].

    A clip that has none of a pass's modalities is wrong there, whatever the model says.

    Args:
        run: what it answers.
        check: called before each of many steps, may raise.
    """

    def __init__(self, run: SubsetLogits, check: Callable[[], None] = lambda: None) -> None:
        self.run, self._check = run, check
        # All heads and protocols see the same draws, and those of a clip depend on it alone.
        self._sampled: dict[float, list[SubsetsOfADraw]] = {}
        heads = list(run.logits)
        self.metrics = metric_names(heads)
        modalities = run.store.modalities
        columns = np.array([[m in subset for m in modalities] for subset in run.subsets])
        subsets = (run.present & columns[:, None]).any(axis=2)
        self.seen = np.concatenate([subsets, run.drawn.any(axis=2)])
        self.every_subset = len(modalities) <= ALL_SUBSETS_UP_TO
        if self.every_subset:
            # A mask read as a binary number finds its subset without a search. That of no modality
            # is no subset: it finds 0, and whoever asks must look at the mask too.
            self._bits = 1 << np.arange(len(modalities))
            self._number_of = np.zeros(2 ** len(modalities), np.int64)
            self._number_of[columns @ self._bits] = np.arange(len(columns))
        known = np.stack([run.labels[h] >= 0 for h in heads]).all(axis=0)
        self.known = {**{h: run.labels[h] >= 0 for h in heads}, ACTION: known}
        steps = [(metric, k) for metric in self.metrics for k in TOP]
        bar = progress_bar(steps, f"score {run.name}", unit="table")
        self.table = {(metric, k): self._table(metric, k) for metric, k in bar}

    def _table(self, metric: str, k: int) -> Bools:
        run = self.run
        rows = []
        for number in range(len(self.seen) if k == 1 else len(run.subsets)):
            self._check()
            logits = {h: v[number] for h, v in run.logits.items()}
            rows.append(metric_correct(metric, logits, run.labels, k))
        return np.stack(rows) & self.seen[: len(rows)]

    def sampled_subsets(self, rate: float, recipe: EvaluateRecipe) -> Iterator[SubsetsOfADraw]:
        """Yield for each draw which subset each clip has at a drop rate, and whether it has any."""
        if rate not in self._sampled:
            run, keys = self.run, clip_keys(self.run.clip_ids)
            self._sampled[rate] = []
            for draw in range(recipe.draws):
                mask = modality_mask(recipe.seed, draw, keys, run.present, rate)
                seen: Bools = np.asarray(mask.any(axis=1))
                self._sampled[rate].append((self.subset_number(mask).astype(np.uint8), seen))
        yield from self._sampled[rate]

    @property
    def has_curve(self) -> bool:
        """Whether every size of subset was evaluated, so that a drop curve can be told."""
        low, high = drawn_sizes(self.run.present, self.run.subsets)
        return self.every_subset or len(self.run.drawn) > 0 or not (low <= high).any()

    def subset_number(self, masks: Bools) -> npt.NDArray[np.int64]:
        """Return which subset each mask [..., M] is."""
        return self._number_of[masks @ self._bits]

    def clips(self, protocol: Protocol) -> Bools:
        """Return which clips a protocol counts, bool [N]."""
        present = self.run.present
        every: Bools = np.asarray(present.all(axis=1), bool)
        return every if protocol == "complete" else np.ones(len(present), bool)


def drop_curves(correct: Correct, recipe: EvaluateRecipe) -> Iterator[DropCurve]:
    """Yield the drop curve of every metric under both protocols; none if it cannot be known."""
    if not correct.has_curve:
        return
    for protocol in ("all", "complete"):
        counted = correct.clips(protocol)
        for metric in correct.metrics:
            rows = counted & correct.known[metric]
            if not rows.any():
                continue
            points = tuple(
                _point(correct, metric, rows, rate, recipe) for rate in recipe.drop_rates
            )
            yield DropCurve(head=metric, protocol=protocol, points=points)


def _point(
    correct: Correct, metric: str, rows: Bools, rate: float, recipe: EvaluateRecipe
) -> DropPoint:
    table = correct.table[metric, 1][:, rows].astype(np.float64)  # [S + D, rows]
    if not correct.every_subset:
        return _estimate(correct.run, table, rows, rate)
    present = correct.run.present[rows]
    per_clip = (_chances(correct, present, rate) * table).sum(axis=0)
    # The mean over masks is exact, so the interval is over clips alone: how far the mean would
    # move with other clips of the kind (normal approximation).
    expected = float(per_clip.mean())
    spread = _Z * float(per_clip.std()) / len(per_clip) ** 0.5
    return DropPoint(
        rate=rate,
        expected=_percent(expected),
        low=_percent(expected - spread),
        high=_percent(expected + spread),
        sampled=_sampled(correct, table, rows, rate, recipe) if recipe.draws else None,
    )


def expected_per_clip(correct: Correct, metric: str, rows: Bools, rates: Sequence[float]) -> Floats:
    """Return each clip's part in a drop curve, [R, rows]: the mean over clips is the curve.

    Up to 6 modalities it is the probability that the clip is answered rightly. With more it is an
    estimate, which may lie outside 0 to 1: the curve is then a ratio of two sums over clips, and
    this is its linearisation.
    """
    table = correct.table[metric, 1][:, rows].astype(np.float64)
    if correct.every_subset:
        present = correct.run.present[rows]
        chances = (_chances(correct, present, rate) for rate in rates)
        return np.stack([(of * table).sum(axis=0) for of in chances])
    parts = []
    for weights in (_weights(correct.run, rows, rate) for rate in rates):
        value, total = (weights * table).sum(axis=0), weights.sum(axis=0)
        share = value.sum() / total.sum()
        parts.append(share + (value - share * total) / total.mean())
    return np.stack(parts)


def _percent(share: float) -> float:
    return min(100.0, max(0.0, 100 * share))


def _chances(correct: Correct, present: Bools, rate: float) -> Floats:
    """Return the probability of each subset for each clip, [S, N]."""
    chances = np.zeros((len(correct.seen), len(present)))
    patterns, which = np.unique(present, axis=0, return_inverse=True)
    for i, pattern in enumerate(patterns):
        for mask, chance in drop_distribution(tuple(pattern.tolist()), rate).items():
            if any(mask):  # nothing present: wrong with any mask
                chances[correct.subset_number(np.array(mask)), which == i] = chance
    return chances


def _sampled(
    correct: Correct, table: Floats, rows: Bools, rate: float, recipe: EvaluateRecipe
) -> Sampled:
    clips, values = np.arange(table.shape[1]), []
    for number, seen in correct.sampled_subsets(rate, recipe):
        values.append(float((table[number[rows], clips] * seen[rows]).mean()))
    low, high = np.quantile(values, [0.025, 0.975])
    return Sampled(
        mean=_percent(float(np.mean(values))), low=_percent(float(low)), high=_percent(float(high))
    )


def _estimate(run: SubsetLogits, table: Floats, rows: Bools, rate: float) -> DropPoint:
    """Return the estimated point of a curve.

    Its interval is over clips and draws, that of ``sampled`` what the draws alone leave open.
    """
    weights = _weights(run, rows, rate)  # [S + D, N]; a clip's sum is 1 in expectation
    value, total = (weights * table).sum(axis=0), weights.sum(axis=0)
    # A ratio, so that a model that is always right has 100 % whatever was drawn.
    share = float(value.sum() / total.sum())
    off = value - share * total
    error = float(off.std()) / len(off) ** 0.5
    drawn = (weights * (table - share))[len(run.subsets) :]
    own = error
    if len(drawn) > 1:
        own = float((drawn.var(axis=0, ddof=1) * len(drawn)).sum()) ** 0.5 / len(off)
    return DropPoint(
        rate=rate,
        expected=_percent(share),
        low=_percent(share - _Z * error),
        high=_percent(share + _Z * error),
        sampled=Sampled(
            mean=_percent(share), low=_percent(share - _Z * own), high=_percent(share + _Z * own)
        ),
    )


def _weights(run: SubsetLogits, rows: Bools, rate: float) -> Floats:
    """Return what each pass of each clip counts for at a drop rate, [S + D, N]."""
    present, drawn = run.present[rows], run.drawn[:, rows]
    clips, count = np.arange(len(present)), present.sum(axis=1)
    most = present.shape[1]
    by_count = np.zeros((most + 1, most + 1))
    for number in np.unique(count):
        by_count[number, : number + 1] = kept_distribution(int(number), rate)
    chances = by_count[count]  # [N, M + 1], of how many modalities are left
    low, high = drawn_sizes(present, run.subsets)
    weights = np.zeros((len(run.subsets) + len(drawn), len(present)))
    weights[0] = chances[clips, count]
    for number, subset in enumerate(run.subsets[1:], 1):
        columns = np.array([m in subset for m in run.store.modalities])
        single = len(subset) == 1
        # A single modality that a clip has, or the lack of one that it has: one of ``count`` ways.
        counts = present[:, columns if single else ~columns][:, 0]
        left = np.ones_like(count) if single else count - 1
        # Of two modalities each alone is a single and a lack; it counts as the former.
        counts &= (count > 1) & ((left < low) if single else (left > high) & (left >= low))
        weights[number] = counts * chances[clips, left] / np.maximum(count, 1)
    sizes = drawn.sum(axis=2)  # [D, N]
    between = (sizes >= low) & (sizes <= high)
    share = np.maximum(high - low + 1, 0) / max(1, len(drawn))
    weights[len(run.subsets) :] = between * np.take_along_axis(chances.T, sizes, axis=0) * share
    return weights
