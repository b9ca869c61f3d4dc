"""The text of Slurm batch scripts; a pure function of the job and the site."""

import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from karmma_pipeline.batch.recipe import Resources, Site
from karmma_pipeline.jobs.part import PARTS

_PLAIN = re.compile(r"[A-Za-z0-9_@%+=:,./-]+")

_REQUEUE = """\
case $rc in
  75 | 138 | 143) again=yes ;;  # stopped and saved, or told to stop before it could listen
  13[0-9]) [ "${{SLURM_RESTART_COUNT:-0}}" -ge {retries} ] || again=yes ;;  # killed: try again
esac
job="${{SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}}${{SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}}"
# Whoever cancels the job, or Slurm where it requeues by itself, has changed its state already.
if [ -n "$again" ] && [ "$(squeue -h -j "$job" -o %T)" = RUNNING ]; then
  exec scontrol requeue "$job"
fi
exit "$rc"
"""

_WAIT = """\
pid=$!  # in the background: bash runs a trap only once `wait` returns
[ -z "$told" ] || kill -USR1 "$pid"
wait "$pid"; rc=$?
while kill -0 "$pid" 2>/dev/null; do wait "$pid"; rc=$?; done
"""

_TORCHRUN = """\
# One agent per node, one rank per GPU. The warning signal reaches agents and ranks alike: an agent
# must not die of it (trap), and a rank that has saved (75) must not look like one that failed.
# Ranks that torchrun starts again must not find the addresses of the dead in a store that it kept.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n1)
port=$((20000 + SLURM_JOB_ID % 10000))
export KARMMA_STOPPED={mark}.$SLURM_JOB_ID
rm -f -- "$KARMMA_STOPPED"
srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" \\
  bash -c 'trap "" USR1; exec "$@"' agent \\
  {torchrun} --nnodes="$SLURM_NNODES" --nproc-per-node={ranks} \\
  --rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID" --rdzv-endpoint="$head:$port" \\
  --max-restarts={retries} --no-python \\
  bash -c '"$@"; rc=$?; [ "$rc" != 75 ] || {{ : >"$KARMMA_STOPPED"; rc=0; }}; exit "$rc"' rank \\
  {command} &
"""


@dataclass(frozen=True)
class Job:
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


def batch_script(job: Job, site: Site) -> str:
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


def _options(job: Job, site: Site) -> Iterator[str]:
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
    batch_shell = "" if job.ranks else "B:"
    yield f"--signal={batch_shell}USR1@{site.warning_s}"
    if site.account:
        yield f"--account={site.account}"
    partition = site.partition if resources.gpus else site.cpu_partition or site.partition
    if partition:
        yield f"--partition={partition}"
    if site.qos:
        yield f"--qos={site.qos}"


def _environment(job: Job, site: Site) -> Iterator[str]:
    yield "pid='' told='' again=''"
    yield 'trap \'told=yes; [ -z "$pid" ] || kill -USR1 "$pid" 2>/dev/null\' USR1 TERM'
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
