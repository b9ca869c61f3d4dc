"""Slurm: what of a chain is in the queue, and sending off what is not.

Plain ``sbatch`` and ``squeue``: our commands are programs that go on where they stopped, so
there is nothing to serialise, and the scripts can be read, kept and submitted by hand.
"""

import getpass
import shlex
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from karmma_pipeline import files
from karmma_pipeline.batch.chain import Work, job_name
from karmma_pipeline.batch.progress import Progress
from karmma_pipeline.batch.recipe import Chain, Resources, Site
from karmma_pipeline.batch.script import Job, batch_script
from karmma_pipeline.data.store import layout
from karmma_pipeline.errors import KarmmaError
from karmma_pipeline.extract.recipe import ExtractRecipe

FINISH = "finish"
"""Name of the job that joins what the tasks of an array have made."""

_RETURNS = (
    "Stopped by its time limit or pre-empted, it saves, goes back into the queue and goes on."
)
_FINISH_RESOURCES = Resources(cpus=1, gpus=0, memory_gb=4, hours=1)


@dataclass(frozen=True)
class Queued:
    """A job, or a task of an array, in the queue."""

    job_id: str
    array_id: str
    state: str
    name: str


def queue() -> list[Queued]:
    """Return my jobs in the queue, each array task by itself.

    Raises:
        KarmmaError: Slurm does not answer.
    """
    fields = _run(["squeue", "-h", "-r", "-u", getpass.getuser(), "-o", "%A|%F|%T|%j"])
    return [Queued(*line.split("|", 3)) for line in fields.splitlines() if line.count("|") >= 3]


def has_slurm() -> bool:
    """Tell whether Slurm's commands are here."""
    return shutil.which("sbatch") is not None and shutil.which("squeue") is not None


def stage_jobs(chain: Chain, work: Work, found: Progress, folder: Path) -> dict[str, Job]:
    """Return the jobs of a stage, in order: the stage itself, and for an array its joining."""
    log = str((chain.folder / "logs").absolute() / work.name).replace("%", "%%")
    title = f"Stage {work.name}: karmma {shlex.join(work.arguments)}"
    stage, resources = work.stage, work.stage.resources
    distributed = stage.command != "extract" and stage.command != "evaluate"
    ranks = max(1, resources.gpus) if distributed and (stage.nodes > 1 or resources.gpus > 1) else 0
    jobs = {}
    if found.missing or not stage.is_array:
        jobs[work.name] = Job(
            title=f"{title}\n{_RETURNS}",
            name=job_name(chain, work.name),
            arguments=shlex.join(work.arguments),
            resources=resources,
            log=f"{log}.%A_%a.log" if stage.is_array else f"{log}.%j.log",
            folder=str(folder),
            array=_array(found, stage.at_once) if stage.is_array else "",
            parts=stage.array if stage.is_array else 0,
            nodes=stage.nodes,
            ranks=ranks,
        )
    if stage.is_array:
        jobs[f"{work.name}.{FINISH}"] = Job(
            title=f"Stage {work.name}: joins what its tasks have made, or says what is missing.",
            name=job_name(chain, work.name, FINISH),
            arguments=shlex.join(work.finish_arguments),
            resources=_FINISH_RESOURCES,
            log=f"{log}.{FINISH}.%j.log",
            folder=str(folder),
        )
    return jobs


def _array(found: Progress, at_once: int | None) -> str:
    """Return Slurm's list of the missing parts, numbered from 1; runs as a-b."""
    runs: list[list[int]] = []
    for number in (part.index + 1 for part in found.missing):
        if runs and runs[-1][-1] == number - 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    text = ",".join("-".join(map(str, run)) for run in runs)
    return f"{text}%{at_once}" if at_once else text


class Submission:
    """Sends a chain to Slurm; what is done or in the queue already is left alone.

    Args:
        chain: the recipe.
        site: what the cluster wants to be told.
        say: takes a line for the user.
    """

    def __init__(self, chain: Chain, site: Site, say: Callable[[str], None]) -> None:
        self.chain, self.site, self.say = chain, site, say
        self.queued = queue()
        self.last: dict[str, str] = {}  # stage to the job that must have ended well
        self.new: set[str] = set()

    def send(self, work: Work, found: Progress) -> None:
        """Submit the jobs of a stage that are neither done nor in the queue."""
        if found.done:
            self.say(f"{work.name}: done ({found.text})")
            return
        if any(stage in self.new for stage in work.waits):
            self._cancel_waiting(work)
        before = [self.last[stage] for stage in work.waits if stage in self.last]
        depends = "afterok:" + ":".join(before) if before else ""
        for name, job in stage_jobs(self.chain, work, found, Path.cwd()).items():
            alive = [q for q in self.queued if q.name == job.name]
            if alive:
                job_id = alive[0].array_id
                self.say(f"{name}: in the queue as job {job_id}")
            else:
                if job.array and isinstance(work.recipe, ExtractRecipe):
                    release_locks(work.writes, {q.job_id for q in self.queued})
                job_id = self._submit(name, job, depends)
                self.new.add(work.name)
            self.last[work.name] = job_id
            depends = f"afterany:{job_id}"

    def _submit(self, name: str, job: Job, depends: str) -> str:
        path = self.chain.folder / "scripts" / f"{name}.sbatch"
        files.write_text(path, batch_script(job, self.site))
        (self.chain.folder / "logs").mkdir(parents=True, exist_ok=True)
        options = [f"--dependency={depends}", "--kill-on-invalid-dep=yes"] if depends else []
        job_id = _run(["sbatch", "--parsable", *options, str(path)]).strip().split(";")[0]
        after = f", {depends}" if depends else ""
        tasks = f", tasks {job.array}" if job.array else ""
        self.say(f"{name}: submitted as job {job_id}{tasks}{after}")
        return job_id

    def _cancel_waiting(self, work: Work) -> None:
        """Cancel what waits for a job that is gone; its successor gets a job of its own."""
        names = {job_name(self.chain, work.name), job_name(self.chain, work.name, FINISH)}
        stale = [q for q in self.queued if q.name in names and q.state == "PENDING"]
        if stale:
            _run(["scancel", *{q.array_id for q in stale}])
            self.queued = [q for q in self.queued if q not in stale]


def release_locks(stores: Sequence[Path], alive: set[str]) -> None:
    """Remove the locks of writers whose Slurm job is no longer in the queue.

    A writer looks for its predecessor on its own node only; the queue knows of all nodes.
    """
    for store in stores:
        for lock in sorted(layout.spool_folder(store, 0).parent.glob("*/lock")):
            words = lock.read_text().split()
            if len(words) == 3 and words[2].isdigit() and words[2] not in alive:
                lock.unlink(missing_ok=True)


def _run(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except FileNotFoundError:
        raise KarmmaError(
            f"{command[0]}: not found; run this on a login node of the cluster, or with "
            "--launcher local."
        ) from None
    except subprocess.CalledProcessError as error:
        reason = " ".join(error.stderr.split()) or f"exit code {error.returncode}"
        raise KarmmaError(f"{shlex.join(command)}: {reason}.") from None
    return done.stdout
