"""Batches of clips on their way: planned, collated, prefetched, computed, written.

Where a clip lies in its shard decides with which others it is computed, so that a run that was
killed and goes on writes the same bytes as one that was not.
"""

import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Generic, Self, TypeVar

import numpy as np
import numpy.typing as npt
import psutil
import torch
from torch import Tensor

from karmma_pipeline import jobs
from karmma_pipeline.data.manifest import Clip
from karmma_pipeline.extraction.inference.networks import Computed, Networks, example
from karmma_pipeline.extraction.types import Batch, BatchPlan, DecodedClip

T = TypeVar("T")

# How often a thread that cannot hand over an item looks whether anybody still wants it.
_POLL_INTERVAL_S = 0.2

# A pass whose largest operation handles less than that has one thread: about what a core's own
# cache holds.
_SHARED_BYTES = 4_000_000


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


class ForwardWorkers:
    """Computes batches, each on one CPU, and gives them back in order; a context manager.

    Threads inside of a pass wait for one another after every layer, longest where other work shares
    the CPUs, as decoding does. Passes beside one another do not: they take whatever the decoders
    leave, and their numbers do not depend on how many CPUs there are. On a GPU there is one.

    Args:
        networks: what is run on them.
        count: batches at a time.
    """

    def __init__(self, networks: Networks, count: int) -> None:
        self._networks, self.count = networks, count
        self._running: deque[Future[Computed]] = deque()
        networks.serve(count)
        # The number of threads of a pass is a setting of the thread that starts it.
        self._pool = ThreadPoolExecutor(count, "forward", lambda: torch.set_num_threads(1))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def __len__(self) -> int:
        return len(self._running)

    @property
    def full(self) -> bool:
        """Whether one more batch is waiting than can be computed."""
        return len(self._running) > self.count

    @property
    def idle(self) -> float:
        """Share of the workers that have nothing to do."""
        working = sum(not (f.done() and f.result().is_done) for f in self._running)
        return max(0, self.count - working) / self.count

    def put(self, batch: Batch) -> None:
        """Hand over a batch."""
        self._running.append(self._pool.submit(self._networks.compute, batch))

    def take(self) -> Computed:
        """Wait for the batch that was handed over first."""
        return self._running.popleft().result()


@contextmanager
def one_thread(device: torch.device) -> Iterator[None]:
    """Let a pass on the CPU have one thread."""
    with threads_of_pass(1 if device.type == "cpu" else torch.get_num_threads()):
        yield


@contextmanager
def threads_of_pass(count: int) -> Iterator[None]:
    """Let passes that this thread starts have so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def fastest_threads(networks: Networks) -> int:
    """Return how many threads a pass should have that runs by itself: all, or one.

    Sharing the operations of a small network gains little, and where other processes share the
    CPUs too, most of the time goes into waiting for the thread that has none.
    """
    largest = max(
        (n.clip_bytes(example(networks.inputs[key], 1)) for key, n in networks.all.items()),
        default=0,
    )
    return torch.get_num_threads() if largest > _SHARED_BYTES else 1


def worker_count(networks: Networks) -> int:
    """Return how many passes may run at once: one per CPU, as memory allows; beside a GPU one.

    Free memory may be looked at here: how many passes run at once changes no token.
    """
    most = max_workers(networks.device)
    if most == 1:
        return 1
    stated = networks.recipe.memory_gb
    room = stated * 1e9 if stated else 0.5 * psutil.virtual_memory().available
    return max(1, min(most, int(room / _pass_bytes(networks))))


def max_workers(device: torch.device) -> int:
    """Return how many workers there are where memory is no concern."""
    if device.type != "cpu":
        return 1
    cpus, asked = jobs.cpu_count(), os.environ.get("OMP_NUM_THREADS", "")
    return max(1, min(cpus, int(asked))) if asked.isdigit() else cpus


def _pass_bytes(networks: Networks) -> int:
    """Return the memory of a pass of the network with the largest memory use."""
    return max(
        network.config.batch_size * network.clip_bytes(example(networks.inputs[key], 1))
        for key, network in networks.all.items()
    )
