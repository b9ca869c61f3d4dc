"""Launch a chain, again and again, until it is done; what is done is never done twice."""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from karmma_pipeline.batch import checks, local, slurm
from karmma_pipeline.batch.chain import ChainStage, job_name, load_chain
from karmma_pipeline.batch.local import LocalCommand, last_line
from karmma_pipeline.batch.progress import StageProgress, stage_progress
from karmma_pipeline.batch.recipe import Chain, Site
from karmma_pipeline.batch.slurm import FINISH, QueuedJob, batch_script
from karmma_pipeline.errors import ExitCode, KarmmaError, TooManyFailuresError
from karmma_pipeline.jobs import StopFlag

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
            texts.append(f"### {slurm.script_path(chain, name)}{_after(name, stage)}\n")
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
        say("nothing to do: all stages are done")


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
                f"{stage.name}: its commands exited with code 0, but the stage is not done "
                f"({ended.text}); see the logs in {chain.folder / 'logs'}."
            )
    say("all stages are done")


def status(path: Path) -> str:
    """Return where each stage stands; without a Slurm that answers, by what lies on disk."""
    chain, stages = load_chain(path)
    note = ""
    try:
        queued = slurm.queue() if slurm.has_slurm() else []
    except KarmmaError as error:
        queued, note = [], f"\n(the queue could not be read: {error})"
    return table(chain, stages, [stage_progress(stage) for stage in stages], queued) + note


def _stop_at_faults(progresses: Sequence[StageProgress]) -> None:
    for progress in progresses:
        if progress.fault:
            raise TooManyFailuresError(progress.fault)


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
    settings = stage.settings
    waiting = [
        LocalCommand(name, words, logs / f"{name}.log", site.retries)
        for name, words in commands.items()
    ]
    most = min(settings.array, settings.at_once or settings.array)

    def ended(command: LocalCommand, code: int) -> None:
        if not code:
            return
        told = f"{command.log} (exit code {code}) ends with: {last_line(command.log)}"
        if say is None or code == ExitCode.USAGE:
            kind = TooManyFailuresError if code == ExitCode.TOO_MANY_FAILURES else KarmmaError
            raise kind(f"{stage.name}: {told}")
        say(f"{stage.name}: {told}")

    local.run_all(waiting, settings.resources, most, site, stop, ended)


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
