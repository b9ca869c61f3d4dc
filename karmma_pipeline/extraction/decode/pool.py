"""Pool of decode processes: one that hangs or crashes loses its clip, never the run."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import islice, tee
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

import cv2
import numpy as np
import psutil
from pebble import ProcessExpired, ProcessFuture
from threadpoolctl import threadpool_limits

from karmma_pipeline import files, jobs
from karmma_pipeline.data.manifest import Clip
from karmma_pipeline.data.sources import SensorSource
from karmma_pipeline.extraction.decode.spectrogram import log_mel
from karmma_pipeline.extraction.decode.worker import (
    AT_WORK,
    SharedBuffer,
    SlotRefs,
    clip_bytes,
    decode_clips,
    decode_into,
    lost,
)
from karmma_pipeline.extraction.media.interface import MediaFaultError, first_line
from karmma_pipeline.extraction.recipe import Decode
from karmma_pipeline.extraction.types import BatchPlan, DecodedClip, DecodeSettings, InputSpec
from karmma_pipeline.jobs import StopFlag
from karmma_pipeline.jobs.processes import WorkerPool
from karmma_pipeline.modalities import Reason

# Memory that the job must have for each decode process.
_WORKER_BYTES = 2 << 30

# A process is replaced after that many tasks: decoders may leak, decord does.
_TASKS_PER_PROCESS = 200

# A batch system signals workers and us together; wait that long to learn of it.
_GRACE_S = 0.3

# How often memory and the stop flag are looked at.
_POLL_INTERVAL_S = 0.2

# How long no process may be at work while a task waits: its result was lost on the way.
_START_S = 60.0

# Clips of a video that one task decodes at most: a fault costs all of them a second try.
_MAX_CLIPS_PER_TASK = 16

_GIGABYTE = 1e9
_logger = logging.getLogger(__name__)
_SAVED = "finished batches are saved"

if TYPE_CHECKING:
    _Future = ProcessFuture[tuple[float, list[tuple[DecodedClip, SlotRefs]]]]


@dataclass
class _Task:
    """Clips of one video on their way, and the slots for their arrays."""

    clips: list[Clip]
    slots: list[int | None]
    future: _Future


def default_workers(*, beside_gpu: bool) -> int:
    """Return how many CPUs decode: all but one beside a GPU, else half; as memory allows."""
    cpus = jobs.cpu_count()
    room = jobs.memory_limit() // _WORKER_BYTES
    return max(1, min(room, cpus - 1 if beside_gpu else cpus // 2))


@contextmanager
def open_pool(
    settings: DecodeSettings, decode: Decode, workers: int, batch_size: int, stop: StopFlag
) -> Iterator[DecodePool]:
    """Start a pool whose clips, decoded and not yet used, stay within the recipe's memory.

    Args:
        settings: what to decode.
        decode: the limits of a recipe.
        workers: processes.
        batch_size: clips that the consumer takes at once.
        stop: as of `DecodePool`.
    """
    size = clip_bytes(settings)
    # At least one clip per process and one more, or a process would wait for the consumer.
    ahead = max(workers + 1, int(decode.queue_gb * _GIGABYTE / size))
    ahead = min(ahead, 16 * workers + 4 * batch_size)  # more does not help
    # A batch that is being collated still has its slots while others are decoded ahead of it.
    with (
        closing(SharedBuffer(size, ahead + batch_size)) as buffer,
        DecodePool(
            settings,
            workers,
            decode.timeout_s,
            stop,
            decode.memory_gb,
            ahead,
            buffer,
            decode.stall_s,
        ) as pool,
    ):
        yield pool


class DecodePool:
    """Decodes batches of clips ahead of the consumer, in order.

    Args:
        settings: what to decode.
        workers: processes; each runs one video's clips at a time.
        timeout_s: CPU seconds for each clip of a task, which is killed after that.
        stop: looked at while waiting; before a process's death is blamed on a clip, too.
        memory_gb: a process that takes more is killed.
        ahead: clips that are decoded ahead of the consumer; null: two more than processes.
        buffer: where they are put; null: everything comes through a pipe.
        stall_s: a task is killed after so many seconds without using the CPU or reading a byte.

    Attributes:
        busy_s: CPU seconds that processes have spent on decoding, all together.
        look_first: a clip of which no file is there gets no process.

    Raises:
        StoppedError: from `batches`, when a stop was asked for.
    """

    def __init__(
        self,
        settings: DecodeSettings,
        workers: int,
        timeout_s: float,
        stop: StopFlag,
        memory_gb: float = float("inf"),
        ahead: int | None = None,
        buffer: SharedBuffer | None = None,
        stall_s: float = 300.0,
    ) -> None:
        self.settings, self.timeout_s, self.stop = settings, timeout_s, stop
        self._workers, self._ahead = workers, ahead or 2 + workers
        self._buffer = buffer
        self._wanted = list(dict.fromkeys(spec.modality for spec in settings.inputs))
        self.busy_s, self.look_first = 0.0, False
        self._pool = self._start()
        self._open: set[_Future] = set()
        self._watch = _Watch(memory_gb, stall_s)

    def _start(self) -> WorkerPool:
        return WorkerPool(
            self._workers, _start_worker, [self.settings], max_tasks=_TASKS_PER_PROCESS
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

    def batches(self, plans: Iterable[BatchPlan]) -> Iterator[tuple[BatchPlan, list[DecodedClip]]]:
        """Yield each batch with its decoded clips, in order, ahead of the consumer.

        A batch's arrays are valid until the next one is asked for: they are views of slots that
        other clips then get. Clips of one video that follow one another are decoded together,
        whatever batches they are in.
        """
        # What `_stream` takes out of one end of the plans comes out of the other, clip for clip.
        begun, planned = tee(plans)
        stream = self._stream(clip for plan in begun for clip in plan.clips)
        for plan in planned:
            taken = list(islice(stream, len(plan.clips)))
            yield plan, [decoded for decoded, _ in taken]
            self._give_back([slot for _, slot in taken])

    def _stream(self, clips: Iterable[Clip]) -> Iterator[tuple[DecodedClip, int | None]]:
        waiting: deque[_Task] = deque()
        pending = 0
        per_task = min(_MAX_CLIPS_PER_TASK, max(1, self._ahead // (self._workers + 1)))
        for group in _by_video(clips, per_task, self._wanted):
            # The oldest task is waited for first, even if others are done: clips come out in
            # the order in which they went in.
            while waiting and pending + len(group) > self._ahead:
                pending -= len(waiting[0].clips)
                yield from self._result(waiting.popleft())
            gone = self.look_first and not any(files.exists(p) for p in self._paths(group))
            waiting.append(self._absent(group) if gone else self._submit(group))
            pending += len(group)
        while waiting:
            yield from self._result(waiting.popleft())

    def _paths(self, clips: list[Clip]) -> set[Path]:
        return {clip.media[m].path for clip in clips for m in self._wanted if m in clip.media}

    def _absent(self, clips: list[Clip]) -> _Task:
        """Say why clips without any file are absent: nothing is opened, so no process is needed."""
        future: _Future = ProcessFuture()
        future.set_result((0.0, [(lost, {}) for lost in decode_clips(clips, self.settings)]))
        return _Task(clips, [None] * len(clips), future)

    def _submit(self, clips: list[Clip], settings: DecodeSettings | None = None) -> _Task:
        # More clips may be on their way than there are slots, as second tries have some of their
        # own: the rest come through the pipe, which is slower and never waits.
        slots = [self._buffer.take() if self._buffer else None for _ in clips]
        try:
            future = self._schedule(clips, slots, settings or self.settings)
        except RuntimeError:  # a process died between tasks, which ends pebble's pool
            self._restart()
            future = self._schedule(clips, slots, settings or self.settings)
        return _Task(clips, slots, future)

    def _schedule(
        self, clips: list[Clip], slots: list[int | None], settings: DecodeSettings
    ) -> _Future:
        address, size = (self._buffer.address, self._buffer.slot_bytes) if self._buffer else ("", 0)
        limit_s = self.timeout_s * len(clips)
        args = [address, size, slots, decode_clips, clips, settings, limit_s]
        future = self._pool.schedule(decode_into, args=args)
        self._open.add(future)
        # Runs in pebble's thread, at once if the task has ended by now.
        future.add_done_callback(self._open.discard)
        return future

    def _give_back(self, slots: list[int | None]) -> None:
        if self._buffer:
            self._buffer.give_back(slots)

    def _restart(self) -> None:
        """Begin again with new processes.

        Tasks of the old pool are lost with it, however many there are; `_is_done` tells them by
        their absence from the open ones, and their clips are tried again.
        """
        self._open.clear()
        self._stop()
        self._pool = self._start()

    def _stop(self) -> None:
        self._pool.stop()  # type: ignore[no-untyped-call]
        self._pool.join()

    def _result(self, task: _Task) -> Iterator[tuple[DecodedClip, int | None]]:
        """Wait for a task; if it fails, decode each of its clips by itself."""
        outcome = self._wait(task)
        if not isinstance(outcome, MediaFaultError):
            yield from zip(outcome, task.slots, strict=True)
            return
        for clip in task.clips:
            yield self._again(clip)

    def _again(self, clip: Clip) -> tuple[DecodedClip, int | None]:
        """Try a clip once more in another process, then each of its sources by itself."""
        task = self._submit([clip])
        outcome = self._wait(task)
        if not isinstance(outcome, MediaFaultError):
            return outcome[0], task.slots[0]
        whole = lost(clip.clip_id, self.settings, outcome)
        # What kills the decoder of one stream says nothing of the others.
        parts = _apart(clip, self.settings)
        for settings in parts if len(parts) > 1 else []:
            task = self._submit([clip], settings)
            outcome = self._wait(task)
            if isinstance(outcome, MediaFaultError):
                whole.take(lost(clip.clip_id, settings, outcome), settings.inputs)
            else:
                whole.take(outcome[0], settings.inputs)
                self._give_back(task.slots)
        return whole, None

    def _wait(self, task: _Task) -> list[DecodedClip] | MediaFaultError:
        """Return what a task decoded; if it failed, why, and its slots are free again."""
        outcome = self._outcome(task.future)
        if isinstance(outcome, MediaFaultError):
            # Its process is dead or done with them: pebble kills one that takes too long before
            # it says so. One that still wrote would write into another clip.
            self._give_back(task.slots)
            return outcome
        seconds, parts = outcome
        self.busy_s += seconds
        for (decoded, refs), slot in zip(parts, task.slots, strict=True):
            if self._buffer:
                self._buffer.restore(decoded, refs, slot)
        return [decoded for decoded, _ in parts]

    def _outcome(
        self, future: _Future
    ) -> tuple[float, list[tuple[DecodedClip, SlotRefs]]] | MediaFaultError:
        if not self._is_done(future):
            return self._blame(None)
        try:
            return future.result(0)
        except MemoryError:
            return MediaFaultError(Reason.OUT_OF_MEMORY, "memory allocation failed")
        except (ProcessExpired, BrokenProcessPool) as death:
            # A batch system that ends the job signals its processes in any order. If ours is
            # among them, this is no fault of the clip, which must not be marked as lost.
            time.sleep(_GRACE_S)
            self.stop.check(_SAVED)
            return self._blame(death)
        except Exception as error:  # whatever a decoder may raise
            _logger.warning("decoding failed: %s: %s", type(error).__name__, error)
            return MediaFaultError(
                Reason.DECODE_ERROR, f"{type(error).__name__}: {first_line(error)}"
            )

    def _blame(self, death: BaseException | None) -> MediaFaultError:
        """Say why a decode process died, as far as is known; None: with its pool."""
        killed = self._watch.killed
        # A process that was killed as it started, before it had a task, breaks the pool unnamed.
        pid = getattr(death, "pid", next(reversed(killed), -1))
        if fault := killed.get(pid):
            return fault
        code = getattr(death, "exitcode", None)
        if code == -signal.SIGXCPU:
            return MediaFaultError(
                Reason.TIMEOUT, f"a clip took more than {self.timeout_s:g} s of CPU time"
            )
        how = "exited without a result"
        if code is not None:
            how = f"was killed by signal {-code}" if code < 0 else f"exited with code {code}"
        return MediaFaultError(Reason.CRASHED, f"its decode process {how}")

    def _is_done(self, future: _Future) -> bool:
        """Wait for a task; False if it was lost with its pool.

        A process killed while it sends its result leaves pebble waiting for the rest, for ever.
        """
        while not wait([future], _POLL_INTERVAL_S).done:
            self.stop.check(_SAVED)
            if future not in self._open:  # a restart lost it, unless it has just ended
                return future.done()
            if self._watch.idle_s > _START_S:
                self._restart()
        return True


class _Watch(threading.Thread):
    """Kills decode processes that take too much memory, or do nothing at all.

    From outside: a decoder that goes wrong inside C holds the interpreter's lock, so that nothing
    in its own process would run, and a limit of the address space (RLIMIT_AS) also counts what
    is mapped and not used, which is most of what torch has. Time is counted in looks: while the
    machine sleeps, there are none.

    Attributes:
        killed: their process ids, and why.
        idle_s: seconds since a process was last seen at work.
    """

    def __init__(self, limit_gb: float, stall_s: float) -> None:
        super().__init__(daemon=True)
        self.limit_gb, self.stall_s = limit_gb, stall_s
        self.killed: dict[int, MediaFaultError] = {}
        self.idle_s = 0.0
        self.finished = threading.Event()
        self._seen: dict[int, tuple[object, float]] = {}

    def run(self) -> None:
        """Look at all child processes until `finished` is set."""
        me = psutil.Process()
        while not self.finished.wait(_POLL_INTERVAL_S):
            self.idle_s += _POLL_INTERVAL_S
            for child in me.children():
                try:
                    if fault := self._fault_of(child):
                        # Noted first: `_outcome` may learn of the death before kill returns.
                        self.killed[child.pid] = fault
                        child.kill()
                except (psutil.Error, OSError):
                    continue  # it has just ended

    def _fault_of(self, child: psutil.Process) -> MediaFaultError | None:
        if child.memory_info().rss > self.limit_gb * _GIGABYTE and _is_spawned(child):
            detail = f"its decode process used more than {self.limit_gb:g} GB"
            return MediaFaultError(Reason.OUT_OF_MEMORY, detail)
        quiet_s = self._quiet_s(child)
        if not quiet_s and _is_spawned(child):  # it may be starting
            self.idle_s = 0.0
        if Path(f"/proc/{child.pid}/comm").read_text("utf-8").strip() != AT_WORK:
            return None
        self.idle_s = 0.0
        if quiet_s <= self.stall_s:
            return None
        detail = f"its decode process stalled for {self.stall_s:g} s"
        return MediaFaultError(Reason.TIMEOUT, detail)

    def _quiet_s(self, child: psutil.Process) -> float:
        """Return for how long a process has neither used the CPU nor read a byte."""
        moved: object = (child.create_time(), child.cpu_times()[:2])
        with suppress(psutil.AccessDenied):
            moved = (moved, child.io_counters())
        before, quiet_s = self._seen.get(child.pid, (None, 0.0))
        # One that could run waits for a CPU, and one that was stopped for who stopped it.
        if moved != before or child.status() == psutil.STATUS_RUNNING:
            quiet_s = 0.0
        elif child.status() != psutil.STATUS_STOPPED:
            quiet_s += _POLL_INTERVAL_S
        self._seen[child.pid] = (moved, quiet_s)
        return quiet_s


def _apart(clip: Clip, settings: DecodeSettings) -> list[DecodeSettings]:
    """Return settings that ask for the pictures or the sound of one source each."""
    groups: dict[object, list[InputSpec]] = {}
    for spec in settings.inputs:
        key = (clip.media.get(spec.modality), spec.modality == "audio")
        groups.setdefault(key, []).append(spec)
    return [replace(settings, inputs=tuple(specs)) for specs in groups.values()]


def _is_spawned(process: psutil.Process) -> bool:
    """Tell our decode processes from other children, such as multiprocessing's tracker."""
    return "--multiprocessing-fork" in process.cmdline()


def _by_video(clips: Iterable[Clip], size: int, wanted: Sequence[str] = ()) -> Iterator[list[Clip]]:
    group: list[Clip] = []
    for clip in clips:
        if group and (len(group) == size or _place(group[-1], wanted) != _place(clip, wanted)):
            yield group
            group = []
        group.append(clip)
    if group:
        yield group


def _place(clip: Clip, wanted: Iterable[str]) -> Path | None:
    """Return where the clip's video lies; of sensors alone, the folder of their small files."""
    sources = [clip.media[m] for m in wanted if m in clip.media]
    if sources and all(isinstance(source, SensorSource) for source in sources):
        return sources[0].path.parent
    source = clip.media.get("rgb") or next(iter(clip.media.values()), None)
    return None if source is None else source.path


def _start_worker(settings: DecodeSettings) -> None:
    jobs.become_worker()
    # Each process has a CPU to itself; threads of their own would only get into each other's way,
    # and the last bits of a spectrogram would depend on how many CPUs the machine has.
    # BLAS came with numpy and no longer looks at the environment.
    threadpool_limits(1, user_api="blas")
    # torch is imported where a resize needs it, or was, if a network of one's own is named.
    os.environ["OMP_NUM_THREADS"] = "1"
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    cv2.setNumThreads(1)
    if any(wanted.modality == "audio" for wanted in settings.inputs):
        # librosa loads for seconds when it is first used: not on the first clip's time
        log_mel(settings.audio, np.zeros(settings.audio.sample_rate, np.float32))
