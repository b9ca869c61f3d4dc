"""How far a mean over seeds and clips would move with other seeds and other clips.

Every seed of a method answers every clip: seeds and clips are crossed. The variance of the mean
has three parts, of seeds, of clips and of what is left, and each is estimated from its mean square
(two-way random effects without replication). Their sum has no exact distribution; Satterthwaite's
degrees of freedom give the t quantile of the interval. This is what reader studies do, with seeds
as readers and clips as cases.

The percentile bootstrap stands beside it. With five seeds it is not the interval to trust: it takes
the normal's quantile where t with 4 degrees of freedom belongs, and counts what is left three times
over, so that it covers too little where seeds differ much and too much where they do not. What
both cover on simulated logits is in docs/statistics.md.

Sources: Satterthwaite, Biometrics Bulletin 2 (1946); Hillis, Statistics in Medicine 26 (2007) and
33 (2014); Owen, Annals of Applied Statistics 1 (2007), the bootstrap of crossed data.

A block is an array [S, U], S seeds and U units: clips, or groups of clips.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import stdtrit

Floats = npt.NDArray[np.float64]

DRAWS = 10_000
LEAST_GROUPS = 10
"""From so many groups on these are resampled instead of clips."""

_CHUNK = 2**22  # counts that are drawn at once


@dataclass(frozen=True)
class Estimate:
    """A mean, and its 95 % interval.

    Attributes:
        value: the mean over seeds and units.
        low: lower end of the interval.
        high: upper end.
        df: degrees of freedom of its t quantile; infinite where nothing varies.
    """

    value: float
    low: float
    high: float
    df: float


def estimate(blocks: Sequence[Floats]) -> Estimate:
    """Return the sum of the blocks' means and its interval over seeds and units.

    One block is a method, or the difference of two methods that were paired by seed. Two are the
    difference of methods without a common seed, the second with its sign turned: units stay paired.
    Blocks of one seed say nothing of seeds: the interval is over units alone.

    Args:
        blocks: each [S, U], of the same units.
    """
    by_unit = np.sum([block.mean(axis=0) for block in blocks], axis=0)
    value, units = float(by_unit.mean()), len(by_unit)
    if units < 2:
        return Estimate(value, value, value, math.inf)
    # Each term: what it adds to the variance of the mean, how often it counts, its df.
    several = [_mean_squares(block) for block in blocks if len(block) > 1]
    left = sum(error for _, _, error, _ in several)
    of_units = float(by_unit.var(ddof=1)) / units
    over_units = int(of_units > left)
    terms = [(of_units, over_units, units - 1)]
    for of_seeds, seeds_df, error, error_df in several:
        # A negative estimate of a variance counts as 0.
        over_seeds = int(of_seeds > error)
        terms += [(of_seeds, over_seeds, seeds_df), (error, 1 - over_units - over_seeds, error_df)]
    variance = sum(part * times for part, times, _ in terms)
    if not variance > 0:
        return Estimate(value, value, value, math.inf)
    spread = sum((part * times) ** 2 / df for part, times, df in terms)
    # What is subtracted may leave fewer than any of the terms has.
    df = max(variance**2 / spread, min(df for _, times, df in terms if times > 0))
    half = float(stdtrit(df, 0.975)) * math.sqrt(variance)
    return Estimate(value, value - half, value + half, df)


def _mean_squares(block: Floats) -> tuple[float, int, float, int]:
    """Return the mean squares of seeds and of the rest over S U, with their df."""
    S, U = block.shape
    by_seed, by_unit = block.mean(axis=1), block.mean(axis=0)
    rest = block - by_seed[:, None] - by_unit + block.mean()
    error_df = (S - 1) * (U - 1)
    return (
        float(by_seed.var(ddof=1)) / S,
        S - 1,
        float((rest**2).sum()) / error_df / (S * U),
        error_df,
    )


def over_seeds(by_seed: Floats) -> tuple[float, float] | None:
    """Return the 95 % t interval of the mean over seeds, for these clips; None of one seed."""
    if len(by_seed) < 2:
        return None
    error = float(by_seed.std(ddof=1)) / math.sqrt(len(by_seed))
    half = float(stdtrit(len(by_seed) - 1, 0.975)) * error
    return float(by_seed.mean()) - half, float(by_seed.mean()) + half


def groups_of(
    groups: npt.NDArray[np.str_],
) -> tuple[npt.NDArray[np.str_], npt.NDArray[np.int64]]:
    """Return the names of the groups, and the number of each clip's group [N].

    There are no names where groups say nothing: a clip has none, all are in one, or each is in one
    of its own.

    Args:
        groups: name of each clip's group [N], empty where it has none.
    """
    names, numbers = np.unique(groups, return_inverse=True)
    if "" in names or not 1 < len(names) < len(groups):
        names = names[:0]
    return names, numbers


def by_group(values: Floats, groups: npt.NDArray[np.int64]) -> Floats:
    """Return one value [S, G] for each group, so that their mean is the mean over clips.

    Groups have more or fewer clips, and a mean over clips is then a ratio of two sums over groups.
    Its variance is that of the linearised values that this returns.

    Args:
        values: [S, N] of clips.
        groups: number of each clip's group [N], 0..G-1.
    """
    mean, clips, count = values.mean(), values.shape[1], int(groups.max()) + 1
    sums = np.stack([np.bincount(groups, row - mean, count) for row in values])
    return mean + sums * (count / clips)


class Resampled:
    """Means over units that were drawn again and again, the same ones for everything.

    Args:
        sums: [R, U], what each unit adds to each of R rows; a unit may be several clips.
        sizes: [U], how many clips a unit is.
        seed: of the draws.
        check: called before each of some steps, may raise.

    Attributes:
        means: float32 [draws, R].
    """

    def __init__(
        self,
        sums: npt.NDArray[np.floating],
        sizes: npt.NDArray[np.int64],
        seed: int,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self._seed = seed
        columns = np.concatenate([sums, sizes[None]]).astype(np.float32).T  # [U, R + 1]
        self.means = np.empty((DRAWS, len(sums)), np.float32)
        at = 0
        for counts in _counts(len(sizes), np.random.default_rng(seed)):
            check()
            drawn = counts.astype(np.float32) @ columns
            self.means[at : at + len(drawn)] = drawn[:, :-1] / drawn[:, -1:]
            at += len(drawn)

    def interval(
        self, first: npt.NDArray[np.int64], second: npt.NDArray[np.int64], paired: bool
    ) -> tuple[Floats, Floats]:
        """Return the 95 % percentile interval of Q differences; seeds are drawn along with units.

        Args:
            first: rows of ``sums``, [S, Q].
            second: those that are subtracted; of the same seeds in the same order if ``paired``.
            paired: draw the same seeds of both.
        """
        rng = np.random.default_rng([self._seed, 1])
        times = rng.multinomial(len(first), [1 / len(first)] * len(first), DRAWS)
        total = self._over_seeds(first, times)
        if not paired:
            times = rng.multinomial(len(second), [1 / len(second)] * len(second), DRAWS)
        low, high = np.quantile(total - self._over_seeds(second, times), [0.025, 0.975], axis=0)
        return low, high

    def _over_seeds(self, rows: npt.NDArray[np.int64], times: npt.NDArray[np.int64]) -> Floats:
        """Return means over drawn seeds, [draws, Q]."""
        total = np.zeros((DRAWS, rows.shape[1]))
        for of_seed, drawn in zip(rows, times.T, strict=True):
            total += self.means[:, of_seed] * (drawn / len(rows))[:, None]
        return total


def _counts(units: int, rng: np.random.Generator) -> Iterator[npt.NDArray[np.int64]]:
    """Yield how often each unit is drawn, [some of the draws, U]."""
    most = max(1, _CHUNK // units)
    for start in range(0, DRAWS, most):
        draws = min(most, DRAWS - start)
        drawn = rng.integers(units, size=(draws, units)) + units * np.arange(draws)[:, None]
        yield np.bincount(drawn.ravel(), minlength=draws * units).reshape(draws, units)
