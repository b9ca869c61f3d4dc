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
from karmma_pipeline.batch.chain import ChainStage, job_name, load_chain
from karmma_pipeline.batch.progress import StageProgress, stage_progress
from karmma_pipeline.batch.recipe import Chain, Site
from karmma_pipeline.batch.slurm import FINISH, QueuedJob, batch_script, threads
from karmma_pipeline.errors import ExitCode, KarmmaError, TooManyFailuresError
from karmma_pipeline.jobs import StopFlag, cpu_count
from karmma_pipeline.jobs.allocation import ONE_OF_SEVERAL, without

Say = Callable[[str], None]


def scripts(path: Path, site: Site) -> str:
    """Return the exact scripts that `submit` would hand to sbatch, one after the other."""
    chain, stages = load_chain(path)
    texts = []
    for stage in stages:
        progress = stage_progress(stage)
        if progress.done:
            texts.append(f"### {stage.name}: done ({progress.text})\n")
            continue
        for name, job in slurm.stage_jobs(chain, stage, progress, Path.cwd()).items():
            texts.append(f"### {chain.folder / 'scripts' / name}.sbatch{_after(name, stage)}\n")
            texts.append(batch_script(job, site) + "\n")
    return "".join(texts)


def _after(name: str, stage: ChainStage) -> str:
    waits = f"afterany {stage.name}" if name != stage.name else ""
    if not waits and stage.waits:
        waits = f"afterok {', '.join(stage.waits)}"
    return f"  ({waits})" if waits else ""


def submit(path: Path, site: Site, say: Say) -> None:
    """Submit what is neither done nor in the queue.

    Raises:
        ConfigError: something that a job will need is not there; nothing was submitted.
        TooManyFailuresError: an extraction is complete, but too many clips failed.
        KarmmaError: Slurm refuses.
    """
    chain, stages = load_chain(path)
    progresses = [stage_progress(stage) for stage in stages]
    _stop_at_faults(progresses)
    checks.check(stages, progresses, chain.folder)
    submission = slurm.Submission(chain, site, say)
    for stage, progress in zip(stages, progresses, strict=True):
        submission.send(stage, progress)
    if not submission.last:
        say("everything is done")


def run_locally(path: Path, site: Site, stop: StopFlag, say: Say) -> None:
    """Run what is missing on this machine.

    Raises:
        StoppedError: a stop was asked for; the commands have saved.
        KarmmaError: as `submit`, or a command failed.
    """
    chain, stages = load_chain(path)
    checks.check(stages, [stage_progress(stage) for stage in stages], chain.folder)
    for stage in stages:
        progress = stage_progress(stage)
        _stop_at_faults([progress])
        run_stage(chain, stage, progress, site, stop, say)
        ended = stage_progress(stage)
        _stop_at_faults([ended])
        if not ended.done:
            raise KarmmaError(
                f"{stage.name}: its commands have ended without an error, but it is not done "
                f"({ended.text}); {chain.folder / 'logs'} has what they said."
            )
    say("everything is done")


def status(path: Path) -> str:
    """Return where each stage stands; without a Slurm that answers, by what lies on disk."""
    chain, stages = load_chain(path)
    note = ""
    try:
        queued = slurm.queue() if slurm.has_slurm() else []
    except KarmmaError as error:
        queued, note = [], f"\n(the queue is not known: {error})"
    return table(chain, stages, [stage_progress(stage) for stage in stages], queued) + note


def _stop_at_faults(progresses: Sequence[StageProgress]) -> None:
    for progress in progresses:
        if progress.fault:
            raise TooManyFailuresError(progress.fault)


_POLL_INTERVAL_S = 0.2


@dataclass(frozen=True)
class _Slot:
    """A place where one command can run: its CPUs, and its GPUs if there are any to share out."""

    cpus: tuple[int, ...]
    devices: tuple[str, ...] | None = None


@dataclass
class _LocalCommand:
    """One command; tried again when it was killed."""

    words: list[str]
    log: Path
    retries: int
    process: "subprocess.Popen[bytes] | None" = None
    slot: _Slot = field(default=_Slot(()))


def run_stage(
    chain: Chain,
    stage: ChainStage,
    progress: StageProgress,
    site: Site,
    stop: StopFlag,
    say: Callable[[str], None],
) -> None:
    """Run what a stage lacks.

    Raises:
        StoppedError: a stop was asked for; the commands have saved and ended.
        KarmmaError: a command failed; the message names its log.
    """
    if progress.done:
        say(f"{stage.name}: done ({progress.text})")
        return
    say(f"{stage.name}: running ({progress.text}), logs in {chain.folder / 'logs'}")
    if not stage.settings.is_array:
        _run_all(chain, stage, {stage.name: stage.arguments}, site, stop)
    else:
        parts = {
            f"{stage.name}.{part.index + 1}": [*stage.arguments, "--part", str(part)]
            for part in progress.missing
        }
        _run_all(chain, stage, parts, site, stop, say)
        _run_all(chain, stage, {f"{stage.name}.finish": stage.finish_arguments}, site, stop)


def _run_all(
    chain: Chain,
    stage: ChainStage,
    commands: dict[str, list[str]],
    site: Site,
    stop: StopFlag,
    say: Callable[[str], None] | None = None,
) -> None:
    """Run commands side by side; with ``say``, a failure is told, but others judge of it."""
    logs = chain.folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    waiting = [_LocalCommand(w, logs / f"{name}.log", site.retries) for name, w in commands.items()]
    slots = list(_slots(stage, devices()))
    running: list[_LocalCommand] = []
    try:
        while waiting or running:
            while waiting and slots and not stop.requested:
                running.append(_start(waiting.pop(0), slots.pop(), stage, site))
            for task in [task for task in running if _ended(task)]:
                running.remove(task)
                slots.append(task.slot)
                _handle_exit(task, stage, waiting, say)
            if stop.requested:
                _end(running)
                stop.check("what the commands had in hand is saved")
            time.sleep(_POLL_INTERVAL_S)
    finally:
        _end(running)


def devices() -> tuple[str, ...]:
    """Return the GPUs that this process may use, as ``CUDA_VISIBLE_DEVICES`` names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return tuple(name.strip() for name in named.split(",") if name.strip())
    import torch  # takes a second, which only a chain that runs here should cost

    return tuple(map(str, range(torch.cuda.device_count())))


def _slots(stage: ChainStage, gpus: Sequence[str]) -> Iterator[_Slot]:
    """Yield the places where a task can run; they share no CPU and no GPU if there are enough."""
    mine = sorted(os.sched_getaffinity(0))
    resources = stage.settings.resources
    size = min(resources.cpus, len(mine))
    each = min(resources.gpus, len(gpus))
    places = max(
        1,
        min(
            stage.settings.array,
            stage.settings.at_once or len(mine),
            cpu_count() // size,
            len(gpus) // each if each else len(mine),
        ),
    )
    for place in range(places):
        yield _Slot(
            tuple(mine[place * size : (place + 1) * size]),
            tuple(gpus[place * each : (place + 1) * each]) if gpus else None,
        )


def _start(task: _LocalCommand, slot: _Slot, stage: ChainStage, site: Site) -> _LocalCommand:
    values = {
        "HDF5_USE_FILE_LOCKING": "FALSE",
        "OMP_NUM_THREADS": str(threads(stage.settings.resources, 1)),
        **site.env,
    }
    if slot.devices is not None:
        values["CUDA_VISIBLE_DEVICES"] = ",".join(slot.devices)
    everything = os.sched_getaffinity(0)
    with task.log.open("ab") as log:
        # A child inherits the affinity of the thread that starts it; a `preexec_fn` would do it in
        # the child, but must not be used in a process with threads.
        os.sched_setaffinity(0, slot.cpus)
        try:
            task.process = subprocess.Popen(
                [sys.executable, "-m", "karmma_pipeline.cli", *task.words],
                # The chain says which part is whose, whatever array or ranks this process is of.
                env={**without(ONE_OF_SEVERAL), **values},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        finally:
            os.sched_setaffinity(0, everything)
    task.slot = slot
    return task


def _ended(task: _LocalCommand) -> bool:
    return task.process is not None and task.process.poll() is not None


def _handle_exit(
    task: _LocalCommand,
    stage: ChainStage,
    waiting: list[_LocalCommand],
    say: Callable[[str], None] | None,
) -> None:
    """Put a task that was killed back into the queue; complain of one that failed."""
    # A negative code is the signal that killed it, out of memory perhaps: worth another try, as
    # Slurm would requeue it. A command that saved and stopped is taken up again without counting.
    code = task.process.returncode if task.process else 0
    if code == ExitCode.STOPPED or (code < 0 and task.retries > 0):
        waiting.append(_LocalCommand(task.words, task.log, task.retries - (code < 0)))
    elif code:
        told = f"{task.log} (exit code {code}) ends with: {last_line(task.log)}"
        if say is None or code == ExitCode.USAGE:
            kind = TooManyFailuresError if code == ExitCode.TOO_MANY_FAILURES else KarmmaError
            raise kind(f"{stage.name}: {told}")
        say(f"{stage.name}: {told}")


def _end(running: Sequence[_LocalCommand]) -> None:
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
    chain: Chain,
    stages: Sequence[ChainStage],
    progresses: Sequence[StageProgress],
    queued: Sequence[QueuedJob],
) -> str:
    """Return one line per stage, and for an idle stage the end of its log."""
    rows = [
        (stage.name, _state(chain, stage, progress, queued), progress.text)
        for stage, progress in zip(stages, progresses, strict=True)
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    lines = []
    for (name, state, text), progress in zip(rows, progresses, strict=True):
        lines.append(f"{name:{widths[0]}}  {state:{widths[1]}}  {text}".rstrip())
        said = progress.fault or (_end_of_log(chain, name) if state == "idle" else "")
        if said:
            lines.append(f"{'':{widths[0]}}  {said}")
    return "\n".join(lines)


def _state(
    chain: Chain, stage: ChainStage, progress: StageProgress, queued: Sequence[QueuedJob]
) -> str:
    if progress.done:
        return "too many clips failed" if progress.fault else "done"
    names = {job_name(chain, stage.name), job_name(chain, stage.name, FINISH)}
    states = Counter(q.state.lower() for q in queued if q.name in names)
    if states:
        return ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
    return "idle"


def _end_of_log(chain: Chain, name: str) -> str:
    logs = (chain.folder / "logs").glob(f"{name}.*log")
    newest = max(logs, key=lambda log: log.stat().st_mtime_ns, default=None)
    return f"{newest} ends with: {last_line(newest)}" if newest else ""
