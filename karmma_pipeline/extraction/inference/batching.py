"""Batches on their way: planned, decoded and laid out for the networks.

B clips in a batch. Where a clip lies in its shard decides with which others it is computed,
so that a run that was killed and goes on writes the same bytes as one that was not.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from karmma_pipeline.data.manifest import Clip
from karmma_pipeline.extraction.inference.raft import Raft
from karmma_pipeline.extraction.parts import NATURAL
from karmma_pipeline.extraction.types import DecodedClip, FramePairs, InputSpec
from karmma_pipeline.store import Catalog, ShardWriter


@dataclass(frozen=True)
class Work:
    """One batch of one shard: its clips, and the writers of the stores that lack the shard.

    last: the shard is whole after it. skipped: clips before it that an earlier run has done.
    """

    clips: list[Clip]
    writers: dict[str, ShardWriter]
    last: bool
    skipped: int = 0


@dataclass(frozen=True)
class Staged:
    """A decoded batch; ``clips`` without their arrays, which lie in ``inputs`` [B, ...].

    Flow that is yet to be computed has its place there, and its pairs in ``clips``.
    """

    work: Work
    clips: list[DecodedClip]
    inputs: dict[InputSpec, Tensor]

    def complete(self, raft: Raft) -> None:
        """Lay out flow that is still pairs of frames, computed where the networks are."""
        raft.complete(self.clips)
        for place, clip in enumerate(self.clips):
            for spec, pictures in clip.arrays.items():
                self.inputs[spec][place] = torch.from_numpy(pictures)
            clip.arrays.clear()

    def rows(self, spec: InputSpec, first: int, count: int) -> list[int]:
        """Return which of some clips are computed together; none if all of them lack it.

        A clip that lost its input to an error keeps its row, of zeros: errors may be the
        day's, and the others' company must not be.
        """
        some = range(first, min(first + count, len(self.clips)))
        if all(spec in self.clips[i].reasons for i in some):
            return []
        return [i for i in some if self.clips[i].reasons.get(spec) not in NATURAL]


class Writers:
    """The shard writers that are open; those that are left are closed on leaving.

    Args:
        catalogs: of the stores, by name.
    """

    def __init__(self, catalogs: Mapping[str, Catalog]) -> None:
        self._catalogs = catalogs
        self._open: set[ShardWriter] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for writer in list(self._open):
            self._close(writer)

    def open(self, shard: int, names: Iterable[str]) -> dict[str, ShardWriter]:
        """Open a shard of some stores."""
        writers = {}
        for name in names:
            writers[name] = ShardWriter(self._catalogs[name].root, shard)
            writers[name].__enter__()
            self._open.add(writers[name])
        return writers

    def commit(self, writers: Mapping[str, ShardWriter]) -> None:
        """Commit a shard to its stores and forget it."""
        for writer in writers.values():
            writer.commit()
            self._close(writer)

    def _close(self, writer: ShardWriter) -> None:
        writer.__exit__(None, None, None)
        self._open.discard(writer)


def plan(
    clips: Sequence[Clip],
    shards: Mapping[int, tuple[range, list[str]]],
    size: int,
    opened: Writers,
) -> Iterator[Work]:
    """Yield the batches of all shards, one after another; writers are opened on the way.

    Args:
        clips: of the manifest.
        shards: shard to the numbers of its clips and the names of the stores that lack it.
        size: clips of a batch.
        opened: gets the writers.
    """
    for shard, (numbers, names) in shards.items():
        writers = opened.open(shard, names)
        done = min(writer.next for writer in writers.values())
        begin = min(done, len(numbers) - 1) // size * size
        for first in range(begin, len(numbers), size):
            yield Work(
                [clips[i] for i in numbers[first : first + size]],
                writers,
                last=first + size >= len(numbers),
                skipped=begin if first == begin else 0,
            )


def stage(work: Work, clips: list[DecodedClip], pin: bool) -> Staged:
    """Copy the arrays of a batch together; ``pin``: into memory that GPUs copy from."""
    inputs = {}
    for spec in dict.fromkeys(spec for clip in clips for spec in clip.arrays):
        arrays = [clip.arrays.get(spec) for clip in clips]
        inputs[spec] = _together(arrays, pin)
    for spec in dict.fromkeys(spec for clip in clips for spec in clip.pairs):
        one = next(clip.pairs[spec].frames[0] for clip in clips if spec in clip.pairs)
        inputs[spec] = _empty(len(clips), one, pin).zero_()
    return Staged(work, [_without_arrays(clip) for clip in clips], inputs)


def _without_arrays(clip: DecodedClip) -> DecodedClip:
    """Return a clip that no longer needs the memory that its process wrote to."""
    pairs = {spec: FramePairs(some.frames.copy(), some.scale) for spec, some in clip.pairs.items()}
    return replace(clip, arrays={}, pairs=pairs)


def _empty(count: int, one: npt.NDArray[Any], pin: bool) -> Tensor:
    dtype = torch.from_numpy(np.empty(0, one.dtype)).dtype
    return torch.empty((count, *one.shape), dtype=dtype, pin_memory=pin)


def _together(arrays: list[npt.NDArray[Any] | None], pin: bool) -> Tensor:
    one = next(array for array in arrays if array is not None)
    together = _empty(len(arrays), one, pin)
    for row, array in zip(together.numpy(), arrays, strict=True):
        row[...] = 0 if array is None else array
    return together
