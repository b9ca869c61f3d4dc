"""Decoding in processes that may hang, crash or be killed: each costs its clip, never the run."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

import cv2
import psutil
import torch
from pebble import ProcessExpired, ProcessFuture, ProcessPool
from tqdm import tqdm

from karmma_pipeline.data.manifest import Clip
from karmma_pipeline.extract.decode import Decoded, Settings, decode_clips, lost
from karmma_pipeline.extract.media import Decoder
from karmma_pipeline.jobs import StopFlag
from karmma_pipeline.modalities import Reason

_TASKS_PER_PROCESS = 200
"""A process is replaced after that many tasks: decord keeps memory of files it has closed."""

_GRACE_S = 0.3
"""A batch system signals workers and us together; wait that long to learn of it."""

_LOOK_S = 0.2
"""How often memory and the stop flag are looked at."""

_START_S = 60.0
"""How long a process may take to start."""

_GIGABYTE = 1e9
_SAVED = "finished batches are saved"

if TYPE_CHECKING:
    _Future = ProcessFuture[list[Decoded]]


class DecodePool:
    """Decodes batches of clips ahead of the consumer, in order.

    Args:
        settings: what to decode.
        workers: processes; each runs one video's clips at a time.
        timeout_s: a task is killed after that.
        stop: looked at while waiting; before a process's death is blamed on a clip, too.
        memory_gb: a process that takes more is killed.

    Raises:
        StoppedError: from `batches`, when a stop was asked for.
    """

    def __init__(
        self,
        settings: Settings,
        workers: int,
        timeout_s: float,
        stop: StopFlag,
        memory_gb: float = float("inf"),
    ) -> None:
        self.settings, self.timeout_s, self.stop = settings, timeout_s, stop
        self._workers, self._ahead = workers, 2 + workers
        self._pool = self._start()
        self._open: set[_Future] = set()
        self._watch = _MemoryWatch(memory_gb)

    def _start(self) -> ProcessPool:
        return ProcessPool(
            max_workers=self._workers,
            max_tasks=_TASKS_PER_PROCESS,
            initializer=_start_worker,
            context=get_context("spawn"),
        )

    def __enter__(self) -> Self:
        self._watch.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._watch.finished.set()
        self._stop()

    def batches(self, batches: Iterable[list[Clip]]) -> Iterator[list[Decoded]]:
        """Yield the decoded clips of each batch, in order, a few batches ahead of the consumer."""
        waiting: deque[list[tuple[list[Clip], _Future]]] = deque()
        source = iter(batches)
        for batch in source:
            waiting.append([(clips, self._submit(clips)) for clips in _by_video(batch)])
            if len(waiting) > self._ahead:
                yield self._collect(waiting.popleft())
        while waiting:
            yield self._collect(waiting.popleft())

    def _submit(self, clips: list[Clip], decoder: Decoder = "decord") -> _Future:
        try:
            return self._schedule(clips, decoder)
        except RuntimeError:  # a process died between tasks, which ends pebble's pool
            self._restart()
            return self._schedule(clips, decoder)

    def _schedule(self, clips: list[Clip], decoder: Decoder) -> _Future:
        future = self._pool.schedule(
            decode_clips, args=[clips, self.settings, decoder], timeout=self.timeout_s
        )
        self._open.add(future)
        future.add_done_callback(self._open.discard)
        return future

    def _restart(self) -> None:
        self._open.clear()  # the old pool will not finish them
        self._stop()
        self._pool = self._start()

    def _stop(self) -> None:
        self._pool.stop()  # type: ignore[no-untyped-call]
        self._pool.join()

    def _collect(self, tasks: list[tuple[list[Clip], _Future]]) -> list[Decoded]:
        return [decoded for clips, future in tasks for decoded in self._result(clips, future)]

    def _result(self, clips: list[Clip], future: _Future) -> list[Decoded]:
        """Wait for a task; if it fails, decode each of its clips by itself."""
        found = self._wait(future)
        if not isinstance(found, Reason):
            return found
        return [self._again(clip) for clip in clips]

    def _again(self, clip: Clip) -> Decoded:
        """Try a clip once more in another process, then with the second decoder."""
        found = self._wait(self._submit([clip]))
        if isinstance(found, Reason):
            found = self._wait(self._submit([clip], "pyav"))
        return lost(clip.clip_id, self.settings, found) if isinstance(found, Reason) else found[0]

    def _wait(self, future: _Future) -> list[Decoded] | Reason:
        if not self._is_done(future):
            return Reason.CRASHED
        try:
            decoded: list[Decoded] = future.result(0)
            return decoded
        except TimeoutError:
            return Reason.TIMEOUT
        except MemoryError:
            return Reason.OUT_OF_MEMORY
        except (ProcessExpired, BrokenProcessPool) as death:
            time.sleep(_GRACE_S)
            self.stop.check(_SAVED)
            too_big = getattr(death, "pid", None) in self._watch.killed
            return Reason.OUT_OF_MEMORY if too_big else Reason.CRASHED
        except Exception as error:  # whatever a decoder may raise
            tqdm.write(f"decoding failed: {type(error).__name__}: {error}", file=sys.stderr)
            return Reason.DECODE_ERROR

    def _is_done(self, future: _Future) -> bool:
        """Wait for a task; False if it was lost with its pool.

        A process killed while it sends its result leaves pebble waiting for the rest, for ever.
        """
        patience_s = (len(self._open) / self._workers + 2) * self.timeout_s + _START_S
        deadline = time.monotonic() + patience_s
        while not wait([future], _LOOK_S).done:
            self.stop.check(_SAVED)
            if future not in self._open:
                return future.done()
            if time.monotonic() > deadline:
                self._restart()
        return True


class _MemoryWatch(threading.Thread):
    """Kills decode processes that take too much memory; from outside, as decord may hang.

    Attributes:
        killed: their process ids.
    """

    def __init__(self, limit_gb: float) -> None:
        super().__init__(daemon=True)
        self._limit = limit_gb * _GIGABYTE
        self.killed: set[int] = set()
        self.finished = threading.Event()

    def run(self) -> None:
        """Look at all child processes until `finished` is set."""
        me = psutil.Process()
        while not self.finished.wait(_LOOK_S):
            for child in me.children():
                try:
                    if child.memory_info().rss > self._limit and _is_spawned(child):
                        self.killed.add(child.pid)
                        child.kill()
                except psutil.Error:
                    continue  # it has just ended


def _is_spawned(process: psutil.Process) -> bool:
    return "--multiprocessing-fork" in process.cmdline()


def _by_video(batch: list[Clip]) -> Iterator[list[Clip]]:
    group: list[Clip] = []
    for clip in batch:
        if group and _place(group[-1]) != _place(clip):
            yield group
            group = []
        group.append(clip)
    yield group


def _place(clip: Clip) -> Path | None:
    """Return where the clip's video lies; its clips have spans of their own."""
    source = clip.media.get("rgb") or next(iter(clip.media.values()), None)
    return None if source is None else source.path


def _start_worker() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # the main process decides
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
