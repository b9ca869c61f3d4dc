"""Batches of clips: planned, collated, prefetched, and written in the background.

B clips in a batch. Where a clip lies in its shard decides with which others it is computed,
so that a run that was killed and goes on writes the same bytes as one that was not.
"""

import queue
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Generic, Self, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from karmma_pipeline.data.manifest import Clip
from karmma_pipeline.extraction.types import Batch, BatchPlan, DecodedClip

T = TypeVar("T")

# How often a thread that cannot hand over an item looks whether anybody still wants it.
_POLL_INTERVAL_S = 0.2


def plan_batches(
    shard: int, clips: Sequence[Clip], stores: Sequence[str], size: int, wanted: Collection[int]
) -> Iterator[BatchPlan]:
    """Yield the batches of a shard of which some store lacks a clip.

    Args:
        shard: its number.
        clips: all of the shard.
        stores: names of those that lack some.
        size: clips of a batch.
        wanted: places of the clips that one of these stores lacks.
    """
    # Batches begin at multiples of their size, whatever an earlier run has done: a clip is
    # computed with the same others as if nothing had happened. A shard that has all of its
    # clips and was not committed gets its last batch again, which commits it.
    firsts = sorted({place // size * size for place in wanted or (len(clips) - 1,)})
    for first, before in zip(firsts, [-size, *firsts], strict=False):
        yield BatchPlan(
            shard,
            clips[first : first + size],
            stores,
            last=first == firsts[-1],
            skipped=first - before - size,
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


class Prefetcher(Generic[T]):
    """Runs an iterable in a thread, at most ``depth`` items ahead of whoever iterates over it.

    A context manager; an error of the iterable is raised where it is iterated over.
    """

    def __init__(self, source: Iterable[T], depth: int = 1) -> None:
        self._source = source
        # None is the end, whether the source is exhausted or has failed.
        self._queue: queue.Queue[T | None] = queue.Queue(depth)
        self._closed = threading.Event()
        self._error: BaseException | None = None
        # A daemon, as is the writer: after a second Ctrl-C the interpreter ends without waiting
        # for a thread that waits for a decoder; what was appended until then counts.
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        # The pool that the source reads from is closed next, and must not be in use then.
        self._closed.set()
        self._thread.join()

    def __iter__(self) -> Iterator[T]:
        while (item := self._queue.get()) is not None:
            yield item
        if self._error:
            raise self._error

    def _run(self) -> None:
        try:
            for item in self._source:
                if not self._put(item):
                    return
        except BaseException as error:
            self._error = error
        self._put(None)

    def _put(self, item: T | None) -> bool:
        """Hand over an item; False if nobody will come for it.

        A put without a timeout would wait for ever for a consumer that has left with an error,
        and `__exit__` for this thread.
        """
        while not self._closed.is_set():
            try:
                self._queue.put(item, timeout=_POLL_INTERVAL_S)
            except queue.Full:
                continue
            return True
        return False


class BackgroundWriter(Generic[T]):
    """Hands items to a function that runs in a thread, in order, at most ``depth`` behind.

    A context manager; leaving it without an error waits until all items are done. An error of
    the function is raised from `put`, or on leaving.
    """

    def __init__(self, write: Callable[[T], None], depth: int = 2) -> None:
        self._write = write
        self._queue: queue.Queue[T | None] = queue.Queue(depth)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        # Also after an error: what the networks have computed is written, not lost.
        self._queue.put(None)
        self._thread.join()
        if self._error and kind is None:
            raise self._error

    def put(self, item: T) -> None:
        """Hand over one item; waits while the function is too far behind."""
        if self._error:
            raise self._error
        self._queue.put(item)

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            # After an error the queue is still emptied, or `put` would wait for ever for room.
            if self._error is None:
                try:
                    self._write(item)
                except BaseException as error:
                    self._error = error
