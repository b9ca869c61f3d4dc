"""How often the intervals between two methods hold a difference that is known.

``PYTHONPATH=.:tests python -m support.coverage`` prints the table of docs/statistics.md.
"""

from typing import NamedTuple

import numpy as np
from scipy.special import ndtr

from karmma_pipeline.evaluation import statistics
from karmma_pipeline.metrics import topk_correct

# Standard deviations of what makes up a logit; the known difference follows from their sum.
CLIP, OF_METHOD, SEED, SKILL = 1.0, 0.5, 0.1, 0.15
# Seeds, clips, what a seed is worth to one method alone, what is left. In the first line the seeds'
# accuracies have a sd of 3 points and their differences one of 1.8, about as measured on UTD-MHAD.
MEASURED = (5, 200, 0.02, 0.1)
SETTINGS = (
    MEASURED,
    (5, 200, 0.0, 0.5),
    (5, 200, 0.04, 0.5),
    (5, 200, 0.1, 0.5),
    (5, 200, 0.2, 0.3),
    (3, 430, 0.04, 0.5),
    (3, 430, 0.1, 0.5),
    (10, 200, 0.1, 0.5),
)


class Coverage(NamedTuple):
    """Shares of intervals that held the truth, and the mean sd of the seeds' differences."""

    t: float
    bootstrap: float
    sd: float


def coverage(
    seeds: int,
    clips: int,
    apart: float,
    rest: float,
    draws: int = 1000,
    bootstrap: bool = False,
) -> Coverage:
    """Make logits of two methods again and again, and compare the intervals with the truth.

    Args:
        seeds: of each method; both share what a seed is worth, and differ by ``apart``.
        clips: that both answer.
        apart: standard deviation of what a seed is worth to one method alone.
        rest: standard deviation of what seed and clip leave open.
        draws: how often.
        bootstrap: look at the percentile bootstrap too.
    """
    rng = np.random.default_rng(1)
    known = ndtr(SKILL / (CLIP**2 + OF_METHOD**2 + SEED**2 + apart**2 + rest**2) ** 0.5) - 0.5
    inside, spread = np.zeros(2), 0.0
    for _ in range(draws):
        shared = rng.normal(0, CLIP, clips) + rng.normal(0, SEED, (seeds, 1))
        strong, weak = (_right(rng, skill + shared, apart, rest) for skill in (SKILL, 0.0))
        found = statistics.estimate([strong - weak])
        spread += (strong - weak).mean(axis=1).std(ddof=1) / draws
        inside[0] += found.low <= known <= found.high
        if bootstrap:
            both, rows = np.concatenate([strong, weak]), np.arange(2 * seeds)[:, None]
            drawn = statistics.Resampled(both, np.ones(clips, np.int64), int(rng.integers(2**31)))
            low, high = drawn.interval(rows[:seeds], rows[seeds:], paired=True)
            inside[1] += low[0] <= known <= high[0]
    return Coverage(float(inside[0]) / draws, float(inside[1]) / draws, float(spread))


def _right(
    rng: np.random.Generator, margin: statistics.Floats, apart: float, rest: float
) -> statistics.Floats:
    """Return which clips a method answers rightly, [S, N], by the rule of the evaluation."""
    seeds, clips = margin.shape
    margin = margin + rng.normal(0, OF_METHOD, clips) + rng.normal(0, apart, (seeds, 1))
    margin += rng.normal(0, rest, (seeds, clips))
    logits = np.stack([np.zeros_like(margin), margin], axis=-1).reshape(-1, 2)
    right = topk_correct(logits, np.ones(len(logits), np.int64), 1)
    return right.reshape(seeds, clips).astype(np.float64)


if __name__ == "__main__":
    for setting in SETTINGS:
        found = coverage(*setting, bootstrap=True)
        seeds, clips, *_ = setting
        print(
            f"| {seeds}, {clips} | {100 * found.sd:.1f} | {found.t:.1%} | {found.bootstrap:.1%} |",
            flush=True,
        )
