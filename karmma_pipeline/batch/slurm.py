"""Slurm: what of a chain is in the queue, and sending off what is not.

Plain ``sbatch`` and ``squeue``: our commands are programs that go on where they stopped, so
there is nothing to serialise, and the scripts can be read, kept and submitted by hand.
"""

import getpass
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from karmma_pipeline import files
from karmma_pipeline.batch.chain import ChainStage, job_name
from karmma_pipeline.batch.progress import StageProgress
from karmma_pipeline.batch.recipe import Chain, Resources, Site, Sweep
from karmma_pipeline.errors import KarmmaError
from karmma_pipeline.extraction.recipe import ExtractRecipe
from karmma_pipeline.jobs.batch_system import JOB, ONE_OF_SEVERAL, PARTS, without
from karmma_pipeline.store.format import layout

_PLAIN = re.compile(r"[A-Za-z0-9_@%+=:,./-]+")

# Exit codes above 128 are 128 + the signal that ended the program. Those that ask for a stop
# (SIGHUP 1, SIGUSR1 10, SIGUSR2 12, SIGTERM 15, SIGXCPU 24) may come before `StopFlag` can listen.
_REQUEUE = """\
case $rc in
  75) again=yes ;;  # stopped and saved
  129 | 138 | 140 | 143 | 152) again=yes ;;  # stopped before it could save
  13[0-9]) [ "${{SLURM_RESTART_COUNT:-0}}" -ge {retries} ] || again=yes ;;  # killed: try again
esac
job="${{SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}}${{SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}}"
# If the job was cancelled, or Slurm requeues it by itself, its state has changed already.
if [ -n "$again" ] && [ "$(squeue -h -j "$job" -o %T)" = RUNNING ]; then
  exec scontrol requeue "$job"
fi
exit "$rc"
"""

_OF_ARRAY = {PARTS, "SLURM_ARRAY_*"}

# As `StopFlag` listens to.
_STOPS = "USR1 USR2 TERM HUP XCPU"

# What `srun` and our commands would read and this job does not set: it states ``--mem``.
_FOREIGN = (
    *("PBS_*", "SGE_*", "LSB_*", "NSLOTS", "SLURM_MEM_PER_CPU", "SLURM_MEM_PER_GPU"),
    *("SLURM_CPU_BIND*", "SLURM_DISTRIBUTION", "SLURM_HINT", "SLURM_EXPORT_ENV"),
    *("SLURM_NTASKS_PER_CORE", "SLURM_NTASKS_PER_GPU", "SLURM_NTASKS_PER_SOCKET"),
)

_WAIT = """\
pid=$!  # in the background: bash runs a trap only once `wait` returns
[ -z "$told" ] || kill -USR1 "$pid"
wait "$pid"; rc=$?
while kill -0 "$pid" 2>/dev/null; do wait "$pid"; rc=$?; done
"""

_TORCHRUN = """\
# One agent per node, one rank per GPU. Agents and ranks both get the warning signal: agents ignore
# it (trap), and a rank that has saved its state (75) must not count as failed.
# Without the next line, restarted ranks may read the addresses of dead ones.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n1)
port=$((20000 + SLURM_JOB_ID % 10000))
export KARMMA_STOPPED={mark}.$SLURM_JOB_ID
rm -f -- "$KARMMA_STOPPED"
srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" \\
  bash -c 'trap "" USR1 USR2 XCPU; exec "$@"' agent \\
  {torchrun} --nnodes="$SLURM_NNODES" --nproc-per-node={ranks} \\
  --rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID" --rdzv-endpoint="$head:$port" \\
  --max-restarts={retries} --no-python \\
  bash -c '"$@"; rc=$?; [ "$rc" != 75 ] || {{ : >"$KARMMA_STOPPED"; rc=0; }}; exit "$rc"' rank \\
  {command} &
"""


@dataclass(frozen=True)
class BatchJob:
    """What a batch script is made from.

    Attributes:
        title: comment lines at its top.
        name: of the job.
        arguments: after ``karmma``, as shell text.
        resources: of a task.
        log: path of the log, with Slurm's patterns.
        folder: where it runs; empty: where it was submitted.
        array: Slurm's list of tasks; empty: no array.
        parts: into which an array shares out its work; 0: as many as the array has tasks.
        nodes: above 1 (or with several GPUs), ranks run under torchrun.
        ranks: per node; 0: no torchrun.
        setup: shell lines before the command, such as variables that its arguments use.
    """

    title: str
    name: str
    arguments: str
    resources: Resources
    log: str
    folder: str = ""
    array: str = ""
    parts: int = 0
    nodes: int = 1
    ranks: int = 0
    setup: tuple[str, ...] = ()


def batch_script(job: BatchJob, site: Site) -> str:
    """Return the script of a job at a site."""
    lines = ["#!/usr/bin/env bash", *(f"# {line}" for line in job.title.splitlines())]
    lines += [f"#SBATCH {_option(option)}" for option in (*_options(job, site), *site.sbatch)]
    lines += ["", *_environment(job, site), ""]
    text = "\n".join(lines) + "\n"
    if job.ranks:
        text += _TORCHRUN.format(
            mark=f"{shlex.quote(log_folder(job.log))}/stopped",
            torchrun=program(site, "torchrun"),
            ranks=job.ranks,
            retries=site.retries,
            command=f"{'karmma' if site.container else program(site)} {job.arguments}",  # inside
        )
    else:
        text += f"{program(site)} {job.arguments} &\n"
    text += _WAIT
    if job.ranks:
        text += '[ ! -e "$KARMMA_STOPPED" ] || { rm -f -- "$KARMMA_STOPPED"; rc=75; }\n'
    return text + "\n" + _REQUEUE.format(retries=site.retries)


def log_folder(log: str) -> str:
    """Return the folder of a log pattern."""
    return log.rpartition("/")[0].replace("%%", "%") or "."


def program(site: Site, name: str = "karmma") -> str:
    """Return how a program of ours is started at a site, as shell text."""
    if site.container is not None:
        container = site.container
        words = [container.program, "exec", "--nv"]
        for bind in container.binds:
            words += ["--bind", bind]
        return f"{shlex.join([*words, str(container.image)])} {name}"
    if site.karmma is not None:
        return site.karmma if name == "karmma" else name
    module = {"karmma": "karmma_pipeline.cli", "torchrun": "torch.distributed.run"}[name]
    return shlex.join([sys.executable, "-m", module])


def threads(resources: Resources, ranks: int) -> int:
    """Return the threads of a process; sums in floating point depend on them."""
    return max(1, resources.cpus // max(1, ranks))


def _options(job: BatchJob, site: Site) -> Iterator[str]:
    resources = job.resources
    yield f"--job-name={job.name}"
    if job.array:
        yield f"--array={job.array}"
    if job.ranks:
        yield f"--nodes={job.nodes}"
        yield "--ntasks-per-node=1"
    yield f"--cpus-per-task={resources.cpus}"
    if resources.gpus:
        yield site.gpu_option.format(gpus=resources.gpus)
    yield f"--mem={round(resources.memory_gb * 1024)}M"
    yield f"--time={_clock(resources.hours)}"
    yield f"--output={job.log}"
    yield "--open-mode=append"
    yield "--requeue"
    # B: warns the batch shell alone, whose trap tells the one program. Under torchrun `srun` must
    # pass the signal on to the ranks of all nodes.
    batch_shell = "" if job.ranks else "B:"
    yield f"--signal={batch_shell}USR1@{site.warning_s}"
    if site.account:
        yield f"--account={site.account}"
    partition = site.partition if resources.gpus else site.cpu_partition or site.partition
    if partition:
        yield f"--partition={partition}"
    if site.qos:
        yield f"--qos={site.qos}"


def _environment(job: BatchJob, site: Site) -> Iterator[str]:
    yield "pid='' told='' again=''"
    yield f'trap \'told=yes; [ -z "$pid" ] || kill -USR1 "$pid" 2>/dev/null\' {_STOPS}'
    yield "# If submitted from inside a job, this job has inherited that job's variables."
    yield from _unset(ONE_OF_SEVERAL if not job.array else set(ONE_OF_SEVERAL) - _OF_ARRAY)
    if job.folder:
        yield f"cd -- {shlex.quote(job.folder)} || exit 1"
    values = {
        "HDF5_USE_FILE_LOCKING": "FALSE",
        "OMP_NUM_THREADS": str(threads(job.resources, job.ranks)),
    }
    if job.parts:
        values[PARTS] = str(job.parts)
    for name, value in {**values, **site.env}.items():
        yield f"export {name}={shlex.quote(value)}"
    yield from site.setup
    yield from job.setup


def _unset(names: Iterable[str]) -> list[str]:
    """Return the shell lines that take variables out of the environment."""
    found = sorted({*_FOREIGN, *names})
    covered = tuple(name[:-1] for name in _FOREIGN if name.endswith("*"))
    words = [
        f"${{!{name[:-1]}@}}" if name.endswith("*") else name
        for name in found
        if name in _FOREIGN or not name.startswith(covered)
    ]
    text = textwrap.fill(f"unset {' '.join(words)}", 98, break_on_hyphens=False)
    return text.replace("\n", " \\\n  ").split("\n")


def _clock(hours: float) -> str:
    minutes = round(hours * 60)
    return f"{minutes // 60:02d}:{minutes % 60:02d}:00"


def _option(text: str) -> str:
    """Quote an option as sbatch reads it: only double quotes and backslashes are special."""
    if _PLAIN.fullmatch(text):
        return text
    name, equals, value = text.partition("=")
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'{name}{equals}"{escaped}"'


#: Name of the job that joins what the tasks of an array have made.
FINISH = "finish"

RETURNS = "At its time limit or if preempted, the task saves, is requeued and resumes."
_FINISH_RESOURCES = Resources(cpus=1, gpus=0, memory_gb=4, hours=1)


@dataclass(frozen=True)
class QueuedJob:
    """A job, or a task of an array, in the queue."""

    job_id: str
    array_id: str
    state: str
    name: str


def queue() -> list[QueuedJob]:
    """Return my jobs in the queue, each array task by itself.

    Raises:
        KarmmaError: Slurm does not answer.
    """
    # -r: one line for each array task. Names come last, for they alone could hold a bar.
    try:
        fields = _run(["squeue", "-h", "-r", "-u", getpass.getuser(), "-o", "%A|%F|%T|%j"])
    except _FailedError as error:
        # It says in several lines which of its ways to the controller failed, the cause last.
        raise KarmmaError(f"Slurm is not responding: {error.lines[-1].rstrip('.')}.") from None
    return [QueuedJob(*line.split("|", 3)) for line in fields.splitlines() if line.count("|") >= 3]


def has_slurm() -> bool:
    """Tell whether Slurm's commands are here."""
    return shutil.which("sbatch") is not None and shutil.which("squeue") is not None


def stage_jobs(
    chain: Chain, stage: ChainStage, progress: StageProgress, folder: Path
) -> dict[str, BatchJob]:
    """Return the jobs of a stage, in order: the stage itself, and for an array its joining."""
    log = str((chain.folder / "logs").absolute() / stage.name).replace("%", "%%")
    title = f"Stage {stage.name}: karmma {shlex.join(stage.arguments)}"
    settings, resources = stage.settings, stage.settings.resources
    distributed = settings.command != "extract" and settings.command != "evaluate"
    ranks = (
        max(1, resources.gpus) if distributed and (settings.nodes > 1 or resources.gpus > 1) else 0
    )
    jobs = {}
    if progress.missing or not settings.is_array:
        jobs[stage.name] = BatchJob(
            title=f"{title}\n{RETURNS}",
            name=job_name(chain, stage.name),
            arguments=shlex.join(stage.arguments),
            resources=resources,
            log=f"{log}.%A_%a.log" if settings.is_array else f"{log}.%j.log",
            folder=str(folder),
            array=array_of((part.index + 1 for part in progress.missing), settings.at_once)
            if settings.is_array
            else "",
            parts=settings.array if settings.is_array else 0,
            nodes=settings.nodes,
            ranks=ranks,
        )
    if settings.is_array:
        jobs[f"{stage.name}.{FINISH}"] = BatchJob(
            title=f"Stage {stage.name}: finalizes the stores, or reports missing parts.",
            name=job_name(chain, stage.name, FINISH),
            arguments=shlex.join(stage.finish_arguments),
            resources=_FINISH_RESOURCES,
            log=f"{log}.{FINISH}.%j.log",
            folder=str(folder),
        )
    return jobs


def array_of(numbers: Iterable[int], at_once: int | None = None) -> str:
    """Return Slurm's list of the tasks of an array, given ascending; runs as a-b."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    text = ",".join("-".join(map(str, run)) for run in runs)
    return f"{text}%{at_once}" if at_once else text


class Sender:
    """Sends jobs to Slurm; what is in the queue already is left alone.

    Args:
        settings: of what they belong to.
        site: settings of the cluster.
        say: takes a line for the user.
    """

    def __init__(self, settings: Chain | Sweep, site: Site, say: Callable[[str], None]) -> None:
        self.settings, self.site, self.say = settings, site, say
        self.queued = queue()

    def send_job(self, name: str, job: BatchJob, depends: str = "") -> tuple[str, bool]:
        """Submit a job that is not in the queue; return its number, and whether it is new.

        Args:
            name: of its script and in what is said.
            job: what it does.
            depends: as ``--dependency``.
        """
        if alive := self.alive(job):
            self.say(f"{name}: already queued as job {alive[0].array_id}")
            return alive[0].array_id, False
        return self._submit(name, job, depends), True

    def alive(self, job: BatchJob) -> list[QueuedJob]:
        """Return what of a job is in the queue."""
        return [q for q in self.queued if q.name == job.name]

    def _submit(self, name: str, job: BatchJob, depends: str) -> str:
        path = script_path(self.settings, name)
        files.write_text(path, batch_script(job, self.site))
        (self.settings.folder / "logs").mkdir(parents=True, exist_ok=True)
        # Without kill-on-invalid-dep a job whose predecessor failed would wait for ever.
        options = [f"--dependency={depends}", "--kill-on-invalid-dep=yes"] if depends else []
        job_id = _run(["sbatch", "--parsable", *options, str(path)]).strip().split(";")[0]
        after = f", {depends}" if depends else ""
        tasks = f", tasks {job.array}" if job.array else ""
        self.say(f"{name}: submitted as job {job_id}{tasks}{after}")
        return job_id

    def cancel_waiting(self, *jobs: str) -> None:
        """Cancel what waits, by name, for a job that is gone; its successor gets a job anew."""
        names = {job_name(self.settings, *job.split(".")) for job in jobs}
        stale = [q for q in self.queued if q.name in names and q.state == "PENDING"]
        if stale:
            _run(["scancel", *{q.array_id for q in stale}])
            self.queued = [q for q in self.queued if q not in stale]


class Submission(Sender):
    """Sends a chain to Slurm; what is done or in the queue already is left alone.

    Args:
        chain: the recipe.
        site: settings of the cluster.
        say: takes a line for the user.
    """

    def __init__(self, chain: Chain, site: Site, say: Callable[[str], None]) -> None:
        super().__init__(chain, site, say)
        self.chain = chain
        self.last: dict[str, str] = {}  # stage to the job that must have ended well
        self.new: set[str] = set()

    def send(self, stage: ChainStage, progress: StageProgress) -> None:
        """Submit the jobs of a stage that are neither done nor in the queue."""
        if progress.done:
            self.say(f"{stage.name}: done ({progress.text})")
            return
        if any(name in self.new for name in stage.waits):
            self.cancel_waiting(stage.name, f"{stage.name}.{FINISH}")
        before = [self.last[name] for name in stage.waits if name in self.last]
        depends = "afterok:" + ":".join(before) if before else ""
        for name, job in stage_jobs(self.chain, stage, progress, Path.cwd()).items():
            if job.array and not self.alive(job) and isinstance(stage.recipe, ExtractRecipe):
                release_locks(stage.writes, {q.job_id for q in self.queued})
            job_id, new = self.send_job(name, job, depends)
            if new:
                self.new.add(stage.name)
            self.last[stage.name] = job_id
            depends = f"afterany:{job_id}"


def script_path(chain: Chain | Sweep, name: str) -> Path:
    """Return where the script of a job lies."""
    return chain.folder / "scripts" / f"{name}.sbatch"


def release_locks(stores: Sequence[Path], alive: set[str]) -> None:
    """Remove the locks of writers whose Slurm job is no longer in the queue.

    A writer looks for its predecessor on its own node only; the queue knows of all nodes.
    """
    for store in stores:
        for lock in sorted(layout.spool_folder(store, 0).parent.glob("*/lock")):
            words = lock.read_text(encoding="utf-8").split()
            if len(words) > 2 and words[2].isdigit() and words[2] not in alive:
                lock.unlink(missing_ok=True)


def _run(command: Sequence[str]) -> str:
    try:
        # Called inside a job, Slurm's commands would take that job's variables for options, and the
        # new job would find them in its environment.
        done = subprocess.run(command, env=without(JOB), capture_output=True, text=True, check=True)
    except FileNotFoundError:
        raise KarmmaError(
            f"{command[0]}: not found; run this on a login node of the cluster, or with "
            "--launcher local."
        ) from None
    except subprocess.CalledProcessError as error:
        raise _FailedError(command[0], error) from None
    return done.stdout


class _FailedError(KarmmaError):
    """A command of Slurm's that failed.

    Attributes:
        lines: what it said, without its name in front.
    """

    def __init__(self, program: str, error: subprocess.CalledProcessError) -> None:
        said = [line.removeprefix(f"{program}: ") for line in error.stderr.splitlines()]
        said = [line.removeprefix("error: ").strip() for line in said]
        self.lines = [line for line in said if line] or [f"exit code {error.returncode}"]
        super().__init__(f"{program}: {'; '.join(self.lines).rstrip('.')}.")
