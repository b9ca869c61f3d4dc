"""Launch a chain, again and again, until it is done; what is done is never done twice."""

from collections.abc import Callable
from pathlib import Path

from karmma_pipeline.batch import local, preflight, slurm
from karmma_pipeline.batch.chain import Work, load_chain
from karmma_pipeline.batch.progress import Progress, progress
from karmma_pipeline.batch.recipe import Site
from karmma_pipeline.batch.script import batch_script
from karmma_pipeline.batch.status import table
from karmma_pipeline.errors import KarmmaError, TooManyFailuresError
from karmma_pipeline.jobs import StopFlag

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
    preflight.check(works, found, chain.folder)
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
    preflight.check(works, [progress(work) for work in works], chain.folder)
    for work in works:
        found = progress(work)
        _stop_at_faults([found])
        local.run_stage(chain, work, found, site, stop, say)
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
