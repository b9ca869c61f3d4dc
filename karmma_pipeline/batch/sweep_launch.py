"""Launch a sweep, again and again, until it is done; what is done is never done twice."""

import shlex
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from karmma_pipeline.batch import local, slurm
from karmma_pipeline.batch.chain import job_name
from karmma_pipeline.batch.local import LocalCommand, last_line
from karmma_pipeline.batch.progress import StageProgress
from karmma_pipeline.batch.recipe import Site
from karmma_pipeline.batch.slurm import BatchJob, array_of, batch_script
from karmma_pipeline.batch.sweep import (
    EXTRACT,
    REPORT,
    LoadedSweep,
    check,
    describe,
    progress_of,
)
from karmma_pipeline.errors import KarmmaError, counted
from karmma_pipeline.evaluation import results
from karmma_pipeline.evaluation.evaluate import EvaluateReport
from karmma_pipeline.jobs import StopFlag
from karmma_pipeline.logs import progress_bar

Say = Callable[[str], None]


def run_locally(sweep: LoadedSweep, jobs: int | None, site: Site, stop: StopFlag, say: Say) -> None:
    """Run what is missing on this machine; one run that fails does not end the others.

    Args:
        sweep: what is asked for.
        jobs: runs at once; None: as many as there are CPUs and GPUs for.
        site: its environment.
        stop: asks for a stop.
        say: takes a line for the user.

    Raises:
        StoppedError: a stop was asked for; the runs have saved.
        TooManyFailuresError: see `sweep.check`.
        KarmmaError: runs failed; they are named, each with its log.
    """
    progresses = progress_of(sweep)
    check(sweep, progresses)
    todo = [stage for stage in sweep.stages if not progresses[stage.name].done]
    names = {stage.name for stage in todo}
    say(f"{len(sweep.stages) - len(todo)} of {len(sweep.stages)} stages done")
    commands = [
        LocalCommand(
            stage.name,
            [*sweep.words, "--run", stage.name],
            sweep.settings.folder / "logs" / f"{stage.name}.log",
            site.retries,
            after=frozenset(names.intersection(stage.waits)),
        )
        for stage in todo
    ]
    failed: list[str] = []
    with progress_bar(total=len(todo), desc="sweep", unit="run", disable=None) as bar:

        def ended(command: LocalCommand, code: int) -> None:
            said = describe(sweep.stage(command.name))
            if code:
                said = f"failed (exit code {code}): {last_line(command.log)}"
                failed.append(f"{command.name} ({command.log} ends with: {last_line(command.log)})")
            say(f"{command.name}: {command.seconds:.0f} s, {said}")
            bar.update()

        most = jobs or len(sweep.stages)
        done = local.run_all(commands, sweep.settings.resources, most, site, stop, ended)
    if failed:
        left = sorted(names - done - {text.partition(" ")[0] for text in failed})
        without = f"; not started because of them: {', '.join(left)}" if left else ""
        raise KarmmaError(f"{len(failed)} failed: {'; '.join(failed)}{without}.")
    folder = sweep.settings.out / REPORT
    say(EvaluateReport(folder, results.read(folder / "results.json")).summary())


def status(sweep: LoadedSweep) -> str:
    """Return where each method stands; without a Slurm that answers, by what lies on disk."""
    progresses = progress_of(sweep)
    rows = list(_rows(sweep, progresses))
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:{width}}  {text}" for name, text in rows]
    try:
        queued = slurm.queue() if slurm.has_slurm() else []
    except KarmmaError as error:
        queued, lines = [], [*lines, f"(the queue could not be read: {error})"]
    for level in _levels(sweep):
        name = job_name(sweep.settings, level)
        states = Counter(q.state.lower() for q in queued if q.name == name)
        if states:
            said = ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
            lines.append(f"{level} in the queue: {said}")
    return "\n".join(lines)


def _rows(sweep: LoadedSweep, progresses: dict[str, StageProgress]) -> Iterator[tuple[str, str]]:
    if EXTRACT in progresses:
        yield EXTRACT, _state(progresses[EXTRACT])
    for point in sweep.points:
        runs = {f"seed{seed}": f"{point.name}/seed{seed}" for seed in sweep.settings.seeds}
        done = sum(progresses[name].done for name in runs.values())
        open_ = [
            f"{seed}: {progresses[name].text}{_end_of_log(sweep, name)}"
            for seed, name in runs.items()
            if not progresses[name].done
        ]
        yield point.name, "; ".join([f"{done} of {counted(len(runs), 'run')} done", *open_])
    yield REPORT, _state(progresses[REPORT])


def _state(progress: StageProgress) -> str:
    return progress.fault or ("done" if progress.done else progress.text)


def _end_of_log(sweep: LoadedSweep, name: str) -> str:
    log = sweep.settings.folder / "logs" / f"{name}.log"
    return f" ({log} ends with: {last_line(log)})" if log.is_file() else ""


def scripts(sweep: LoadedSweep, jobs: int | None, site: Site) -> str:
    """Return the exact scripts that `submit` would hand to sbatch, one after the other."""
    texts = []
    before = ""
    for level, job in _jobs(sweep, progress_of(sweep), jobs).items():
        after = f"  ({_dependency(before)} {before})" if before else ""
        texts.append(f"### {slurm.script_path(sweep.settings, level)}{after}\n")
        texts.append(batch_script(job, site) + "\n")
        before = level
    return "".join(texts)


def submit(sweep: LoadedSweep, jobs: int | None, site: Site, say: Say) -> None:
    """Submit what is neither done nor in the queue: an array for all runs that may go together.

    Raises:
        ConfigError: something that a run will need is not there; nothing was submitted.
        KarmmaError: Slurm refuses.
    """
    progresses = progress_of(sweep)
    check(sweep, progresses)
    sender = slurm.Sender(sweep.settings, site, say)
    before, depends, new = "", "", False
    for level, job in _jobs(sweep, progresses, jobs).items():
        if new:  # what waits for a job that is gone would begin too early
            sender.cancel_waiting(level)
        job_id, new = sender.send_job(level, job, depends)
        before, depends = level, f"{_dependency(level)}:{job_id}"
    if not before:
        say("nothing to do: all runs are done")


def _dependency(before: str) -> str:
    """Return how a level depends on the one before it: runs that fail do not end the others."""
    return "afterok" if before == EXTRACT else "afterany"


def _levels(sweep: LoadedSweep) -> dict[str, list[str]]:
    """Return the stages that may run together, by the name of their job."""
    depth: dict[str, int] = {}
    levels: dict[str, list[str]] = {}
    for stage in sweep.stages:
        trained = [depth[name] for name in stage.waits if name != EXTRACT]
        depth[stage.name] = 1 + max(trained, default=0)
        alone = stage.name in {EXTRACT, REPORT}
        level = stage.name if alone else f"runs{depth[stage.name]}"
        levels.setdefault(level, []).append(stage.name)
    order = sorted(levels, key=lambda level: (level == REPORT, level != EXTRACT, level))
    return {level: levels[level] for level in order}


def _jobs(
    sweep: LoadedSweep, progresses: dict[str, StageProgress], at_once: int | None
) -> dict[str, BatchJob]:
    """Return the jobs that are needed, in order."""
    jobs = {}
    for level, names in _levels(sweep).items():
        numbers = [n for n, name in enumerate(names, 1) if not progresses[name].done]
        if numbers:
            jobs[level] = _job(sweep, level, names, numbers, at_once)
    return jobs


def _job(
    sweep: LoadedSweep, level: str, names: list[str], numbers: list[int], at_once: int | None
) -> BatchJob:
    alone = level in {EXTRACT, REPORT}
    runs = [f"  [{number}]={shlex.quote(names[number - 1])}" for number in numbers]
    log = str((sweep.settings.folder / "logs").absolute() / level).replace("%", "%%")
    which = level if alone else '"${RUNS[SLURM_ARRAY_TASK_ID]}"'
    return BatchJob(
        title=f"Sweep {sweep.path}: {level}\n{slurm.RETURNS}",
        name=job_name(sweep.settings, level),
        arguments=f"{shlex.join(sweep.words)} --run {which}",
        resources=sweep.settings.resources,
        log=f"{log}.%j.log" if alone else f"{log}.%A_%a.log",
        folder=str(Path.cwd()),
        array="" if alone else array_of(numbers, at_once),
        setup=() if alone else ("RUNS=(", *runs, ")"),
    )
