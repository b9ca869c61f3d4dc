"""Launch a chain, again and again, until it is done; what is done is never done twice."""

import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from karmma_pipeline.batch import checks, slurm
from karmma_pipeline.batch.chain import Work, job_name, load_chain
from karmma_pipeline.batch.progress import Progress, progress
from karmma_pipeline.batch.recipe import Chain, Site
from karmma_pipeline.batch.slurm import FINISH, Queued, batch_script, threads
from karmma_pipeline.errors import ExitCode, KarmmaError, TooManyFailuresError
from karmma_pipeline.jobs import StopFlag, cpu_count

Say = Callable[[str], None]


def scripts(path: Path, site: Site) -> str:
    """Return the exact scripts that `submit` would hand to sbatch, one after the other."""
    chain, works = load_chain(path)
    texts = []
    for work in works:
        found = progress(work)
        if found.done:
            texts.append(f"### {work.name}: done ({found.text})\n")
            continue
        for name, job in slurm.stage_jobs(chain, work, found, Path.cwd()).items():
            texts.append(f"### {chain.folder / 'scripts' / name}.sbatch{_after(name, work)}\n")
            texts.append(batch_script(job, site) + "\n")
    return "".join(texts)


def _after(name: str, work: Work) -> str:
    waits = f"afterany {work.name}" if name != work.name else ""
    if not waits and work.waits:
        waits = f"afterok {', '.join(work.waits)}"
    return f"  ({waits})" if waits else ""


def submit(path: Path, site: Site, say: Say) -> None:
    """Submit what is neither done nor in the queue.

    Raises:
        ConfigError: something that a job will need is not there; nothing was submitted.
        TooManyFailuresError: an extraction is complete, but too many clips failed.
        KarmmaError: Slurm refuses.
    """
    chain, works = load_chain(path)
    found = [progress(work) for work in works]
    _stop_at_faults(found)
    checks.check(works, found, chain.folder)
    submission = slurm.Submission(chain, site, say)
    for work, one in zip(works, found, strict=True):
        submission.send(work, one)
    if not submission.last:
        say("everything is done")


def run_here(path: Path, site: Site, stop: StopFlag, say: Say) -> None:
    """Run what is missing on this machine.

    Raises:
        StoppedError: a stop was asked for; the commands have saved.
        KarmmaError: as `submit`, or a command failed.
    """
    chain, works = load_chain(path)
    checks.check(works, [progress(work) for work in works], chain.folder)
    for work in works:
        found = progress(work)
        _stop_at_faults([found])
        run_stage(chain, work, found, site, stop, say)
        _stop_at_faults([progress(work)])
    say("everything is done")


def status(path: Path) -> str:
    """Return where each stage stands; without a Slurm that answers, by what lies on disk."""
    chain, works = load_chain(path)
    note = ""
    try:
        queued = slurm.queue() if slurm.has_slurm() else []
    except KarmmaError as error:
        queued, note = [], f"\n(the queue is not known: {error})"
    return table(chain, works, [progress(work) for work in works], queued) + note


def _stop_at_faults(found: list[Progress]) -> None:
    for one in found:
        if one.fault:
            raise TooManyFailuresError(one.fault)


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


def table(
    chain: Chain, works: Sequence[Work], progresses: Sequence[Progress], queued: Sequence[Queued]
) -> str:
    """Return one line per stage, and for a stage that is not at work the end of its log."""
    rows = [
        (work.name, _state(chain, work, found, queued), found.text)
        for work, found in zip(works, progresses, strict=True)
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    lines = []
    for (name, state, text), found in zip(rows, progresses, strict=True):
        lines.append(f"{name:{widths[0]}}  {state:{widths[1]}}  {text}".rstrip())
        said = found.fault or (_said(chain, name) if state == "not at work" else "")
        if said:
            lines.append(f"{'':{widths[0]}}  {said}")
    return "\n".join(lines)


def _state(chain: Chain, work: Work, found: Progress, queued: Sequence[Queued]) -> str:
    if found.done:
        return "too many clips failed" if found.fault else "done"
    names = {job_name(chain, work.name), job_name(chain, work.name, FINISH)}
    states = Counter(q.state.lower() for q in queued if q.name in names)
    if states:
        return ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
    return "not at work"


def _said(chain: Chain, stage: str) -> str:
    logs = (chain.folder / "logs").glob(f"{stage}.*log")
    newest = max(logs, key=lambda log: log.stat().st_mtime_ns, default=None)
    return f"{newest} ends with: {last_line(newest)}" if newest else ""
