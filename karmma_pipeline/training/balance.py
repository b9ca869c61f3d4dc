"""Class-balanced epochs: rare classes are drawn more often, the same clips on every machine.

N clips in the epoch.
"""

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from karmma_pipeline.data.loading.masks import ORDER, draws

_OFFSET, _LINE = 2**32 + 2, 2**32 + 3
"""Streams of `draws` that are ours."""


def balanced_order(
    keys: npt.NDArray[np.uint64],
    labels: Mapping[str, npt.NDArray[np.integer]],
    power: float,
    seed: int,
) -> Callable[[int], npt.NDArray[np.int64]]:
    """Return the function that draws an epoch: its number to the N places of clips.

    A clip weighs w = mean over heads of n(y)^-power, n(y) being how many of the N clips have its
    label y (heads without a label are left out). It comes N * w / sum(w) times on average: in
    each epoch that number rounded down or up (systematic sampling), so that chance adds as
    little as it can. A pure function of (seed, epoch, clips), as masks are.

    Args:
        keys: uint64 [N] from `clip_keys`.
        labels: head to int [N], -1 where unknown.
        power: 0 (each clip once) to 1 (classes equally frequent).
        seed: of the run.
    """
    share = _weights(labels, power, len(keys))
    share *= len(keys) / share.sum()

    def order(epoch: int) -> npt.NDArray[np.int64]:
        line = np.argsort(draws(seed, epoch, keys, _LINE), kind="stable")
        offset = float(draws(seed, epoch, keys[:1], _OFFSET)[0] >> np.uint64(11)) * 2.0**-53
        ends = np.cumsum(share[line])
        points = np.arange(len(keys)) + offset
        drawn = np.searchsorted(ends, points, side="right").clip(max=len(keys) - 1)
        places = np.sort(line[drawn])
        copy = np.arange(len(places)) - np.searchsorted(places, places)
        words = draws(seed, epoch, keys[places] + copy.astype(np.uint64), ORDER)
        return places[np.argsort(words, kind="stable")]

    return order


def _weights(
    labels: Mapping[str, npt.NDArray[np.integer]], power: float, count: int
) -> npt.NDArray[np.float64]:
    total, heads = np.zeros(count), np.zeros(count)
    for of in labels.values():
        known = of >= 0
        n = np.bincount(of[known], minlength=1)
        total[known] += n[of[known]].astype(np.float64) ** -power
        heads += known
    weights = np.divide(total, heads, out=np.zeros(count), where=heads > 0)
    labelled = heads > 0
    weights[~labelled] = weights[labelled].mean() if labelled.any() else 1.0
    return weights
