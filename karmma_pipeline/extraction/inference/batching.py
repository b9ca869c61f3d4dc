"""Batches of clips: planned from a shard's clips alone, and collated once they are decoded.

B clips in a batch. Where a clip lies in its shard decides with which others it is computed,
so that a run that was killed and goes on writes the same bytes as one that was not.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from karmma_pipeline.data.manifest import Clip
from karmma_pipeline.extraction.types import NATURAL, BatchPlan, DecodedClip, InputSpec


@dataclass(frozen=True)
class Batch:
    """A decoded batch; ``clips`` without their arrays, which lie in ``inputs`` [B, ...].

    Clips that lack an input have zeros there.
    """

    plan: BatchPlan
    clips: list[DecodedClip]
    inputs: dict[InputSpec, Tensor]

    def rows(self, spec: InputSpec, first: int, count: int) -> list[int]:
        """Return which of some clips are computed together; none if all of them lack it.

        A clip lost to a transient error keeps a row of zeros, so that the batches of other
        clips do not change.
        """
        some = range(first, min(first + count, len(self.clips)))
        if all(spec in self.clips[i].reasons for i in some):
            return []
        return [i for i in some if self.clips[i].reasons.get(spec) not in NATURAL]


def plan_batches(
    shard: int, clips: Sequence[Clip], stores: Sequence[str], size: int, done: int
) -> Iterator[BatchPlan]:
    """Yield the batches of a shard.

    Args:
        shard: its number.
        clips: all of the shard.
        stores: names of those that lack it.
        size: clips of a batch.
        done: clips at its beginning that all of these stores hold already.
    """
    # Batches begin at multiples of their size, wherever an earlier run ended: a clip is
    # computed with the same others as if nothing had happened. A shard that has all of its
    # clips and was not committed gets its last batch again, which commits it.
    begin = min(done, len(clips) - 1) // size * size
    for first in range(begin, len(clips), size):
        yield BatchPlan(
            shard,
            clips[first : first + size],
            stores,
            last=first + size >= len(clips),
            skipped=begin if first == begin else 0,
        )


def collate(plan: BatchPlan, clips: Sequence[DecodedClip], pin: bool) -> Batch:
    """Copy the arrays of a batch together; ``pin``: into memory that GPUs copy from.

    This is the only copy between a decode process and the networks: the batch holds no view of
    shared memory, so that the slots of its clips may be used again.
    """
    specs = dict.fromkeys(spec for clip in clips for spec in clip.arrays)
    inputs = {spec: _collated([clip.arrays.get(spec) for clip in clips], pin) for spec in specs}
    return Batch(plan, [replace(clip, arrays={}) for clip in clips], inputs)


def _collated(arrays: Sequence[npt.NDArray[Any] | None], pin: bool) -> Tensor:
    like = next(array for array in arrays if array is not None)
    dtype = torch.from_numpy(np.empty(0, like.dtype)).dtype
    together = torch.empty((len(arrays), *like.shape), dtype=dtype, pin_memory=pin)
    for row, array in zip(together.numpy(), arrays, strict=True):
        row[...] = 0 if array is None else array
    return together
