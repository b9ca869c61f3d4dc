"""Pools of worker processes that can be stopped at any time, even during their start.

A spawned process is Python's own before it is ours: until it has unpickled what it is to do, it
dies of a signal, or of a semaphore that is gone, with a traceback on the terminal, which looks like
a fault of a run that went well.
"""

import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker, spawn
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import Any

from pebble import CONSTS, ProcessPool

from karmma_pipeline.jobs.batch_system import STOP_SIGNALS

CONSTS.term_timeout = 0.0  # our processes ignore SIGTERM: SIGKILL at once


@contextmanager
def _blocked() -> Iterator[None]:
    """Block the stop signals in what is spawned; here they come a moment later."""
    # A mask is inherited by what is spawned; a handler is not.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# Python imports the main module in every process that it spawns: a script that calls us without
# `if __name__ == "__main__":` would start over in each, fail there, and never end. Our processes
# need nothing of it, so they are spawned without; those of others as before.
_here = threading.local()
_preparation_data = spawn.get_preparation_data


def _without_main(name: str) -> dict[str, Any]:
    data = _preparation_data(name)
    if getattr(_here, "starting", False):
        for key in ("init_main_from_path", "init_main_from_name"):
            data.pop(key, None)
    return data


spawn.get_preparation_data = _without_main


class _Process(SpawnProcess):
    """Starts with the stop signals blocked, until `become_worker` ignores them."""

    def start(self) -> None:
        """Start it."""
        _here.starting = True
        try:
            with _blocked():
                super().start()
        finally:
            _here.starting = False


class _Context(SpawnContext):
    # A fork of a process with threads (torch, tqdm, the memory watch) may hang on a lock that was
    # held at that moment, and CUDA does not survive one.
    Process = _Process


class WorkerPool(ProcessPool):
    """pebble's pool of spawned processes.

    Args:
        workers: how many processes.
        initializer: called in each, first of all; it must call `become_worker`.
        initargs: its arguments.
        max_tasks: a process is replaced after so many tasks; 0: never.
    """

    def __init__(
        self,
        workers: int,
        initializer: Callable[..., object],
        initargs: Iterable[Any] = (),
        max_tasks: int = 0,
    ) -> None:
        # Python's tracker of semaphores ignores SIGINT and SIGTERM alone. Of a SIGUSR1 to the whole
        # job, as Slurm sends it, it would die, and its successor would print tracebacks.
        with _blocked():
            resource_tracker.ensure_running()
        super().__init__(workers, max_tasks, initializer, initargs, _Context())

    def _stop_pool(self) -> None:
        # pebble unlinks its semaphores and then ends its processes. One that is just starting
        # would look for them in between: so processes come first, when the thread that starts
        # them has ended.
        if self._pool_manager_loop is not None:
            self._pool_manager_loop.join()
        self._pool_manager.worker_manager.force_stop_workers()  # type: ignore[no-untyped-call]
        super()._stop_pool()  # type: ignore[no-untyped-call]
