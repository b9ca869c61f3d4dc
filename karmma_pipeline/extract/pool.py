"""Decoding in processes that may hang, crash or be killed: each costs its clip, never the run."""

from __future__ import annotations

import signal
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import TimeoutError as FutureTimeout
from multiprocessing import get_context
from types import TracebackType
from typing import TYPE_CHECKING, Self

import cv2
import torch
from pebble import ProcessExpired, ProcessFuture, ProcessPool

from karmma_pipeline.data.manifest import Clip
from karmma_pipeline.extract.decode import Decoded, Settings, decode_clips, lost
from karmma_pipeline.jobs import StopFlag
from karmma_pipeline.modalities import Reason

_TASKS_PER_PROCESS = 200
"""A process is replaced after that many tasks: decord keeps memory of files it has closed."""

_GRACE_S = 0.3
"""A batch system signals workers and us together; wait that long to learn of it."""


if TYPE_CHECKING:
    _Future = ProcessFuture[list[Decoded]]


class DecodePool:
    """Decodes batches of clips ahead of the consumer, in order.

    Args:
        settings: what to decode.
        workers: processes; each runs one video's clips at a time.
        timeout_s: a task is killed after that.
        stop: looked at before a worker's death is blamed on a clip.
    """

    def __init__(self, settings: Settings, workers: int, timeout_s: float, stop: StopFlag) -> None:
        self.settings, self.timeout_s, self.stop = settings, timeout_s, stop
        self._ahead = 2 + workers
        self._pool = ProcessPool(
            max_workers=workers,
            max_tasks=_TASKS_PER_PROCESS,
            initializer=_start_worker,
            context=get_context("spawn"),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pool.stop()  # type: ignore[no-untyped-call]
        self._pool.join()

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

    def _submit(self, clips: list[Clip]) -> _Future:
        return self._pool.schedule(
            decode_clips, args=[clips, self.settings], timeout=self.timeout_s
        )

    def _collect(self, tasks: list[tuple[list[Clip], _Future]]) -> list[Decoded]:
        return [decoded for clips, future in tasks for decoded in self._result(clips, future)]

    def _result(self, clips: list[Clip], future: _Future) -> list[Decoded]:
        """Wait for a task; if it fails, give each of its clips a process of its own, once."""
        reason = self._wait(future)
        if not isinstance(reason, Reason):
            return reason
        retried = []
        for clip in clips:
            again = self._wait(self._submit([clip]))
            retried += (
                [lost(clip.clip_id, self.settings, again)] if isinstance(again, Reason) else again
            )
        return retried

    def _wait(self, future: _Future) -> list[Decoded] | Reason:
        try:
            decoded: list[Decoded] = future.result()
            return decoded
        except (FutureTimeout, TimeoutError):
            return Reason.TIMEOUT
        except MemoryError:
            return Reason.OUT_OF_MEMORY
        except ProcessExpired:
            time.sleep(_GRACE_S)
            self.stop.check("finished batches are saved")
            return Reason.CRASHED


def _by_video(batch: list[Clip]) -> Iterator[list[Clip]]:
    group: list[Clip] = []
    for clip in batch:
        if group and group[-1].media.get("rgb") != clip.media.get("rgb"):
            yield group
            group = []
        group.append(clip)
    yield group


def _start_worker() -> None:
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # the main process decides
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
