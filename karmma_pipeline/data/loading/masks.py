"""Modality dropout as a pure function: the same clip in the same epoch always loses the same.

There is no generator with a state. Every draw is a hash (splitmix64) of
(seed, epoch, clip, what it is for), so masks do not depend on the order of clips, the size
of a batch, the number of threads or ranks, or on where a killed run was resumed; teacher
and student that ask for the same clip get the same mask.

B clips in a batch, M modalities, N clips in all.
"""

import numpy as np
from numpy.typing import NDArray

from karmma_pipeline.errors import ConfigError

_GOLDEN = 0x9E3779B97F4A7C15
_FNV_OFFSET, _FNV_PRIME = 0xCBF29CE484222325, 0x100000001B3
_WORD = 2**64 - 1

# Streams of draws for one clip and epoch; the columns of a mask are 0, 1, 2...
_REPAIR = 2**32
#: Stream of `draws` that shuffles the clips of an epoch.
ORDER = 2**32 + 1
_SIZE = 2**32 + 5
#: Stream of `draws` that chooses a clip's view in an epoch.
VIEW = 2**32 + 7
#: Stream of `draws` that chooses which of a clip's stored frames an epoch takes.
FRAMES = 2**32 + 8


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Finish splitmix64: a bijection that scatters its input over all 64 bits."""
    # Constants of splitmix64 (Steele et al. 2014); a seed's masks are part of what a run is, so
    # none of them may ever change. Products wrap at 64 bits, which numpy does for arrays.
    x = x ^ (x >> np.uint64(30))
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def clip_keys(clip_ids: NDArray[np.bytes_]) -> NDArray[np.uint64]:
    """Hash clip ids (fixed-width bytes [N]) to keys, uint64 [N].

    A key depends on the id alone, not on the width of the array (FNV-1a, then mixed).
    """
    ids = np.ascontiguousarray(clip_ids, dtype=np.bytes_)
    letters = ids.view(np.uint8).reshape(len(ids), ids.dtype.itemsize)
    keys = np.full(len(ids), _FNV_OFFSET, dtype=np.uint64)
    # Byte by byte over all ids at once. Padding (0) is skipped and not hashed, so that a key does
    # not depend on the longest id of the store; ids never hold a zero byte.
    for column in letters.T:
        keys = np.where(column == 0, keys, (keys ^ column) * np.uint64(_FNV_PRIME))
    return _mix(keys)


def draws(seed: int, epoch: int, keys: NDArray[np.uint64], stream: int) -> NDArray[np.uint64]:
    """Return one random word per clip, uint64 [B]; streams are independent of one another."""
    return _stream(_base(seed, epoch, keys), stream)


def _base(seed: int, epoch: int, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return what all streams of these clips and this epoch begin with."""
    # An array of one and not a scalar: numpy warns when a scalar wraps.
    word = np.zeros(1, dtype=np.uint64)
    for part in (seed, epoch):
        word = _mix(word + np.uint64(part & _WORD) + np.uint64(_GOLDEN))
    return _mix(word ^ keys)


def _stream(base: NDArray[np.uint64], stream: int) -> NDArray[np.uint64]:
    return _mix(base + np.uint64((stream + 1) * _GOLDEN & _WORD))


def _uniform(words: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Map words to [0, 1) with 53 bits."""
    # A float64 holds 53 bits: all 64 could round to 1.0, which no comparison with p expects.
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def modality_mask(
    seed: int,
    epoch: int,
    keys: NDArray[np.uint64],
    present: NDArray[np.bool_],
    p: float | NDArray[np.float64],
) -> NDArray[np.bool_]:
    """Draw which of the present modalities a model may see (modality dropout).

    Each present modality drops with probability p, independently. If none is left, one of
    the present ones, drawn uniformly, is restored: the rule that fits the paper's curves.

    Args:
        seed: seed of the run.
        epoch: number of the epoch, from 0.
        keys: uint64 [B] from `clip_keys`.
        present: bool [B, M], what each clip natively has.
        p: probability in 0..1, or one for each modality [M]; 0 keeps everything.

    Returns:
        bool [B, M], within ``present``. Only a clip with nothing present gets an empty row.

    Raises:
        ConfigError: p is no probability.
    """
    rates = np.broadcast_to(p, present.shape[1:])
    if not ((rates >= 0) & (rates <= 1)).all():
        raise ConfigError(f"modality_dropout={p}: must be a probability between 0 and 1.")
    if not rates.any():
        return present.copy()
    # A stream per column: adding a modality at the end leaves the draws of the others as they were.
    base = _base(seed, epoch, keys)
    mask = present.copy()
    for m in range(present.shape[1]):
        mask[:, m] &= _uniform(_stream(base, m)) >= rates[m]
    return _restore(base, present, mask)


def restored(
    seed: int,
    epoch: int,
    keys: NDArray[np.uint64],
    present: NDArray[np.bool_],
    mask: NDArray[np.bool_],
) -> NDArray[np.bool_]:
    """Return masks of any origin in which clips of which nothing was left have one modality."""
    return _restore(_base(seed, epoch, keys), present, mask.copy())


def _restore(
    base: NDArray[np.uint64], present: NDArray[np.bool_], mask: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    empty = np.flatnonzero(~mask.any(axis=1) & present.any(axis=1))
    mask[empty] = _one_of(present[empty], _uniform(_stream(base[empty], _REPAIR)))
    return mask


def sized_masks(
    seed: int,
    count: int,
    keys: NDArray[np.uint64],
    present: NDArray[np.bool_],
    low: NDArray[np.int64],
    high: NDArray[np.int64],
) -> NDArray[np.bool_]:
    """Draw subsets of what each clip has: each size about equally often, each subset of a size too.

    Args:
        seed: of the draws.
        count: subsets of each clip.
        keys: uint64 [N] from `clip_keys`.
        present: bool [N, M], what each clip natively has.
        low: smallest size [N].
        high: largest size [N]; below ``low``: the clip keeps what it has.

    Returns:
        bool [count, N, M]. The size of each is uniform over low..high; of one clip the sizes are
        spread as evenly as ``count`` allows (systematic sampling).
    """
    start = _uniform(draws(seed, 0, keys, _SIZE))
    sizes = np.maximum(high - low + 1, 0)
    masks = np.empty((count, *present.shape), np.bool_)
    for draw in range(count):
        size = low + ((start + draw / count) % 1 * sizes).astype(np.int64)
        base = _base(seed, draw, keys)
        words = np.stack([_uniform(_stream(base, m)) for m in range(present.shape[1])], axis=1)
        rank = np.where(present, words, 2.0).argsort(axis=1).argsort(axis=1)
        masks[draw] = present & (rank < np.where(sizes > 0, size, present.shape[1])[:, None])
    return masks


def _one_of(present: NDArray[np.bool_], where: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return masks [B, M] of one of the present modalities, chosen by a number in [0, 1)."""
    chosen = (where * present.sum(axis=1)).astype(np.int64)
    order = np.asarray(present.cumsum(axis=1), np.int64)
    return present & np.equal(order, chosen[:, None] + 1)
