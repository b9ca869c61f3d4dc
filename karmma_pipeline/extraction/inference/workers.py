"""Forward workers: concurrent batches, each on one CPU; a single worker for a GPU.

Threads inside of a pass wait for one another after every layer, longest where other work shares
the CPUs, as decoding does. Passes beside one another do not: they take whatever the decoders
leave, and their numbers do not depend on how many CPUs there are.
"""

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Self

import psutil
import torch

from karmma_pipeline import jobs
from karmma_pipeline.extraction.inference.networks import Computed, Networks, example
from karmma_pipeline.extraction.types import Batch

# A pass whose largest operation handles less than that has one thread: about what a core's own
# cache holds.
_SHARED_BYTES = 4_000_000


class ForwardWorkers:
    """Computes batches and gives them back in order; a context manager.

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
