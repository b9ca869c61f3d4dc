"""The same chain on this machine, without any scheduler: stage after stage, parts side by side."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from karmma_pipeline.batch.chain import Work
from karmma_pipeline.batch.progress import Progress
from karmma_pipeline.batch.recipe import Chain, Site
from karmma_pipeline.batch.script import threads
from karmma_pipeline.errors import ExitCode, KarmmaError, TooManyFailuresError
from karmma_pipeline.jobs import StopFlag, cpu_count

_LOOK_S = 0.2


@dataclass
class _Task:
    """One command; tried again when it was killed."""

    words: list[str]
    log: Path
    retries: int
    process: "subprocess.Popen[bytes] | None" = None
    cpus: tuple[int, ...] = field(default=())


def run_stage(
    chain: Chain,
    work: Work,
    found: Progress,
    site: Site,
    stop: StopFlag,
    say: Callable[[str], None],
) -> None:
    """Run what a stage lacks.

    Raises:
        StoppedError: a stop was asked for; the commands have saved and ended.
        KarmmaError: a command failed; the message names its log.
    """
    if found.done:
        say(f"{work.name}: done ({found.text})")
        return
    say(f"{work.name}: running ({found.text}), logs in {chain.folder / 'logs'}")
    if not work.stage.is_array:
        _run_all(chain, work, {work.name: work.arguments}, site, stop)
    else:
        parts = {
            f"{work.name}.{part.index + 1}": [*work.arguments, "--part", str(part)]
            for part in found.missing
        }
        _run_all(chain, work, parts, site, stop, say)
        _run_all(chain, work, {f"{work.name}.finish": work.finish_arguments}, site, stop)


def _run_all(
    chain: Chain,
    work: Work,
    commands: dict[str, list[str]],
    site: Site,
    stop: StopFlag,
    say: Callable[[str], None] | None = None,
) -> None:
    """Run commands side by side; with ``say``, a failure is told, but others judge of it."""
    logs = chain.folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    waiting = [_Task(w, logs / f"{name}.log", site.retries) for name, w in commands.items()]
    slots = list(_slots(work))
    running: list[_Task] = []
    try:
        while waiting or running:
            while waiting and slots and not stop.requested:
                running.append(_start(waiting.pop(0), slots.pop(), work, site))
            for task in [task for task in running if _ended(task)]:
                running.remove(task)
                slots.append(task.cpus)
                _look_at(task, work, waiting, say)
            if stop.requested:
                _end(running)
                stop.check("what the commands had in hand is saved")
            time.sleep(_LOOK_S)
    finally:
        _end(running)


def _slots(work: Work) -> Iterator[tuple[int, ...]]:
    """Yield the CPUs of each place where a task can run; they share none if there are enough."""
    mine = sorted(os.sched_getaffinity(0))
    size = min(work.stage.resources.cpus, len(mine))
    places = max(1, min(work.stage.array, work.stage.at_once or len(mine), cpu_count() // size))
    for place in range(places):
        yield tuple(mine[place * size : (place + 1) * size])


def _start(task: _Task, cpus: tuple[int, ...], work: Work, site: Site) -> _Task:
    values = {
        "HDF5_USE_FILE_LOCKING": "FALSE",
        "OMP_NUM_THREADS": str(threads(work.stage.resources, 1)),
        **site.env,
    }
    everything = os.sched_getaffinity(0)
    with task.log.open("ab") as log:
        os.sched_setaffinity(0, cpus)  # inherited by the child
        try:
            task.process = subprocess.Popen(
                [sys.executable, "-m", "karmma_pipeline.cli", *task.words],
                env={**os.environ, **values},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        finally:
            os.sched_setaffinity(0, everything)
    task.cpus = cpus
    return task


def _ended(task: _Task) -> bool:
    return task.process is not None and task.process.poll() is not None


def _look_at(
    task: _Task, work: Work, waiting: list[_Task], say: Callable[[str], None] | None
) -> None:
    """Put a task that was killed back into the queue; complain of one that failed."""
    code = task.process.returncode if task.process else 0
    if code == ExitCode.STOPPED or (code < 0 and task.retries > 0):
        waiting.append(_Task(task.words, task.log, task.retries - (code < 0)))
    elif code:
        told = f"{task.log} (exit code {code}) ends with: {last_line(task.log)}"
        if say is None or code == ExitCode.USAGE:
            kind = TooManyFailuresError if code == ExitCode.TOO_MANY_FAILURES else KarmmaError
            raise kind(f"{work.name}: {told}")
        say(f"{work.name}: {told}")


def _end(running: Sequence[_Task]) -> None:
    """Ask the commands to stop and wait until they have saved."""
    for task in running:
        if task.process and task.process.poll() is None:
            task.process.terminate()
    for task in running:
        if task.process:
            task.process.wait()


def last_line(log: Path) -> str:
    """Return what a log says at its end; progress bars write lines that end in a return."""
    if not log.is_file():
        return ""
    lines = log.read_bytes()[-4096:].decode(errors="replace").replace("\r", "\n").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
