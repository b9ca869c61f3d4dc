"""What a batch system allots to a job: its part of the work, CPUs, memory, and when to stop.

A machine's own size misleads on shared nodes: threads that outnumber the job's CPUs spin for
one another, and a process that outgrows the cgroup is killed silently. So a job's limits are the
smallest of its CPU affinity, its cgroup's and those that the batch system sets.
"""

import heapq
import math
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from types import FrameType
from typing import Self

import psutil

from karmma_pipeline.errors import ConfigError, ExitCode, StoppedError

#: Environment variable: the number of parts, where an array does not tell it or has gaps.
PARTS = "KARMMA_PARTS"

# PBS Pro and Torque tell a task its number, but not how many there are.
_NUMBERS_ALONE = ("PBS_ARRAY_INDEX", "PBS_ARRAYID")

# By which srun, mpirun and mpiexec tell a process how many of it they have started.
_COPIES = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")

#: Variables (``*``: all that begin so) that make a process one task, step or rank of several.
ONE_OF_SEVERAL = (
    PARTS,
    "SLURM_ARRAY_*",
    "SLURM_STEP_*",
    "SGE_TASK_*",
    "LSB_JOBINDEX*",
    "PBS_ARRAY*",
    *("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_*", "WORLD_SIZE", "LOCAL_WORLD_SIZE"),
    *("GROUP_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_*", "KARMMA_STOPPED"),
    *("OMPI_COMM_WORLD_*", "PMI_RANK", "PMI_SIZE", "PMIX_RANK"),
)

#: Variables that a job has of its batch system.
JOB = (
    *ONE_OF_SEVERAL,
    *("SLURM_*", "SLURMD_*", "SQUEUE_*", "PBS_*", "SGE_*", "LSB_*", "NSLOTS"),
    *("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL"),
)

# Which Slurm is meant: said by the machine or the user, not by a job.
_CLUSTER = {"SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT"}


def without(names: Sequence[str], environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the environment without some variables; a name that ends in ``*`` is a beginning.

    What says which Slurm is meant stays in any case.
    """
    exact = {name for name in names if not name.endswith("*")}
    beginnings = tuple(name[:-1] for name in names if name.endswith("*"))
    return {
        name: value
        for name, value in environment.items()
        if name in _CLUSTER or not (name in exact or name.startswith(beginnings))
    }


def copies(environment: Mapping[str, str] = os.environ) -> tuple[str, int] | None:
    """Return by which variable ``srun -n 3`` and its like tell that they started 3 of this process.

    None where there is one.
    """
    for name in _COPIES:
        if environment.get(name, "").isdigit() and int(environment[name]) > 1:
            return name, int(environment[name])
    return None


def balance(costs: Sequence[float], count: int) -> list[list[int]]:
    """Share out items so that all parts take about as long; a pure function of its arguments.

    The longest item goes first, each to the part that has least so far (Graham's longest
    processing time rule: no part takes longer than 4/3 of the best possible).

    Args:
        costs: of each item, such as seconds of video; finite, from 0 on.
        count: parts; there may be more than items.

    Returns:
        The items of each part, ascending.
    """
    if not all(math.isfinite(cost) and cost >= 0 for cost in costs):
        raise ValueError(f"costs={list(costs)}: must be finite and non-negative")
    parts: list[list[int]] = [[] for _ in range(count)]
    loads = [(0.0, 0, part) for part in range(count)]
    for item in sorted(range(len(costs)), key=lambda item: (-costs[item], item)):
        load, items, part = loads[0]
        parts[part].append(item)
        heapq.heapreplace(loads, (load + costs[item], items + 1, part))
    return [sorted(part) for part in parts]


@dataclass(frozen=True)
class Part:
    """Part ``index`` (from 0) of ``count`` parts of the work; ``why`` says who wants it."""

    index: int = 0
    count: int = 1
    why: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ConfigError(
                f"part={self.index + 1}/{self.count}: must be between 1 and {self.count}."
            )

    def __str__(self) -> str:
        return f"{self.index + 1}/{self.count}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``i/n`` with i from 1 to n, as a person counts."""
        try:
            index, count = (int(x) for x in text.split("/"))
        except ValueError:
            raise ConfigError(
                f"part={text!r}: write i/n with i from 1 to n, such as 1/4."
            ) from None
        return cls(index - 1, count, f"--part {text}")

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Self:
        """Read the array variables of Slurm, PBS, LSF or Grid Engine.

        ``KARMMA_PARTS=n`` states the number of parts; tasks are then numbered from 1 to n, and
        any of them may be run again alone. Without an array, the whole work is one part.

        Raises:
            ConfigError: the number of parts cannot be known, or does not fit the array, or this
                process is one of several that would all do the same.
        """
        if (several := copies(environment)) is not None:
            name, number = several
            raise ConfigError(
                f"{name}={number}: {number} processes of this command were started and would "
                "all do the same work; start one (srun -n 1), or give each its own --part i/n."
            )
        task = _array_task(environment)
        if task is None:
            if PARTS in environment:
                raise ConfigError(
                    f"{PARTS}={environment[PARTS]!r}: not an array task; give --part i/n."
                )
            return cls()
        name, number, index, count = task
        why = f"{name}={number}"
        if PARTS in environment:
            index, count = number - 1, _integer(environment, PARTS)
            why = f"{why} and {PARTS}={count}"
        if count is None:
            raise ConfigError(
                f"{name}={number}: this batch system does not report the number of tasks; "
                f"number them from 1 and set {PARTS}=n, or give --part i/n."
            )
        if not 0 <= index < count:
            raise ConfigError(
                f"{name}={number}: not one of {count} tasks; for an array with gaps, number the "
                f"tasks from 1 and set {PARTS} to the number of parts."
            )
        return cls(index, count, why)

    def shards(self, costs: Sequence[float]) -> list[int]:
        """Return my shards, ascending; every shard belongs to exactly one part.

        Args:
            costs: of every shard of the store, done or not, so that all tasks agree.
        """
        return balance(costs, self.count)[self.index]


def _array_task(environment: Mapping[str, str]) -> tuple[str, int, int, int | None] | None:
    """Return variable, number, index from 0 and count of an array task; None outside of one."""
    count: int | None = None
    first, step = 1, 1
    if (name := "SLURM_ARRAY_TASK_ID") in environment:
        first = _integer(environment, "SLURM_ARRAY_TASK_MIN", 0)
        step = _integer(environment, "SLURM_ARRAY_TASK_STEP", 1)
        count = _integer(environment, "SLURM_ARRAY_TASK_COUNT")
    elif environment.get(name := "SGE_TASK_ID", "undefined") != "undefined":
        first = _integer(environment, "SGE_TASK_FIRST")
        step = _integer(environment, "SGE_TASK_STEPSIZE")
        count = (_integer(environment, "SGE_TASK_LAST") - first) // step + 1
    elif environment.get(name := "LSB_JOBINDEX", "0") != "0":
        step = _integer(environment, "LSB_JOBINDEX_STEP", 1)
        count = (_integer(environment, "LSB_JOBINDEX_END") - 1) // step + 1
    else:
        name = next((one for one in _NUMBERS_ALONE if one in environment), "")
    if not name:
        return None
    number = _integer(environment, name)
    return name, number, (number - first) // step, count


def _integer(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environment.get(name) or ("" if default is None else str(default))
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"{name}={text!r}: must be a number; or give --part i/n.") from None


# CPUs of a task as Slurm, Torque, LSF and Grid Engine tell them.
_CPUS = ("SLURM_CPUS_PER_TASK", "PBS_NUM_PPN", "LSB_DJOB_NUMPROC", "NSLOTS")

_ROOT = Path("/")
# Version 1 writes "no limit" as a number near 2^63.
_UNLIMITED = 1 << 60


def cpu_count(root: Path = _ROOT, environment: Mapping[str, str] = os.environ) -> int:
    """Return how many CPUs this job may use, at least one.

    The smallest of CPU affinity, the quotas of its cgroup and those above it (both versions),
    and what the batch system says (which counts where affinity is not set).

    Args:
        root: where ``proc`` and ``sys`` are.
        environment: with the batch system's variables.
    """
    limits = [float(len(os.sched_getaffinity(0)))]
    limits += [float(environment[name]) for name in _CPUS if environment.get(name, "").isdigit()]
    for folder in _folders(root, "cpu"):
        quota, period = folder / "cpu.cfs_quota_us", folder / "cpu.cfs_period_us"
        # Version 2 has quota and period in one file, version 1 in two; a folder has one of both.
        words = [*_words(folder / "cpu.max"), *_words(quota), *_words(period)]
        if len(words) == 2 and all(word.isdigit() for word in words):  # "max" and -1: no limit
            limits.append(int(words[0]) / max(1, int(words[1])))
    return max(1, math.floor(min(limits)))


def memory_limit(root: Path = _ROOT) -> int:
    """Return how many bytes of memory this job may use: the machine's, or its cgroup's limit.

    Args:
        root: where ``proc`` and ``sys`` are.
    """
    limits = [psutil.virtual_memory().total]
    for folder in _folders(root, "memory"):
        for name in ("memory.max", "memory.high", "memory.limit_in_bytes"):
            # Above memory.high nothing is killed, but the kernel slows the job down to a crawl.
            words = _words(folder / name)
            if words and words[0].isdigit() and 0 < int(words[0]) < _UNLIMITED:
                limits.append(int(words[0]))
    return min(limits)


def _folders(root: Path, controller: str) -> Iterator[Path]:
    """Yield the folders of a controller that hold my limits: my cgroup and all above it.

    A container often shows its own cgroup as the root of the tree, under a path that is only
    valid outside; what does not exist is skipped.
    """
    mount = root / "sys" / "fs" / "cgroup"
    for line in _lines(root / "proc" / "self" / "cgroup"):
        number, controllers, path = [*line.split(":", 2), "", ""][:3]
        if number == "0" and not controllers:
            tops = [mount, mount / "unified"]
        elif controller in controllers.split(","):
            tops = [mount / controller, mount / controllers]
        else:
            continue
        for top in tops:
            below = Path(path.lstrip("/"))
            yield from (top / part for part in (below, *below.parents) if (top / part).is_dir())


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def _words(path: Path) -> list[str]:
    return " ".join(_lines(path)).split()


#: With what a terminal, Slurm, PBS, LSF, Grid Engine and a limit of CPU time ask for an end.
STOP_SIGNALS = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGXCPU,
)


class StopFlag:
    """Turns `STOP_SIGNALS` into a flag that loops look at between steps.

    The first SIGINT says so at once; a second one ends the process there and then, which costs no
    more than what was not saved yet. A SIGHUP that is ignored, as under ``nohup``, stays so. Used
    as a context manager in the main thread; elsewhere it only holds the flag.

    Args:
        resumes: whether the command goes on where it stopped if it is run again.
    """

    def __init__(self, resumes: bool = True) -> None:
        self._again = "run the same command again" + (" to resume" if resumes else "")
        self._signal: int | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> Self:
        # Python lets only the main thread set handlers; a flag made elsewhere is set by `request`.
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                    continue
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        # Whoever calls a command from Python gets the handlers back that were there before.
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # A handler runs between any two instructions of the main thread, so it may do no more
        # than set the flag: a lock that it took could be held by the code that it interrupted.
        # os.write takes none.
        if self._signal == signal.SIGINT == number:
            _say(f"stopped immediately; {self._again}.")
            os._exit(ExitCode.STOPPED)
        if number == signal.SIGINT:
            _say("stopping after this batch; press Ctrl-C again to stop now")
        self._signal = number

    def request(self) -> None:
        """Ask for a stop from inside the program."""
        self._signal = self._signal or signal.SIGTERM

    @property
    def requested(self) -> bool:
        """Whether a stop was asked for."""
        return self._signal is not None

    def check(self, saved: str) -> None:
        """Raise StoppedError if a stop was asked for; ``saved`` says what is safe."""
        if self._signal is not None:
            name = signal.Signals(self._signal).name
            raise StoppedError(f"stopped by {name}: {saved}; {self._again}.")


def _say(line: str) -> None:
    with suppress(OSError):  # the terminal may be gone
        os.write(2, f"\n{line}\n".encode())


def become_worker() -> None:
    """Leave the stop signals to the main process, and end when that is gone.

    A parent killed with SIGKILL cannot notify its workers: they would wait for ever.
    """
    # Ctrl-C and a batch system's warning reach every process of the job. A worker that died of one
    # would take the clip in its hands with it, and the parent would blame the clip. SIGXCPU alone
    # still ends it: with it the kernel enforces the CPU seconds of a clip, and does not insist.
    for number in STOP_SIGNALS:
        ends = number == signal.SIGXCPU
        signal.signal(number, signal.SIG_DFL if ends else signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)  # see `processes`
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=[parent.sentinel], daemon=True).start()


def _end_with(sentinel: int) -> None:
    # The sentinel becomes readable when the parent's end of a pipe closes, which the kernel does
    # for a killed process too. PR_SET_PDEATHSIG would follow the *thread* that started the worker,
    # and end workers whose parent is alive. os._exit: nothing of a worker is worth cleaning up,
    # and the main thread may hang inside a decoder.
    wait([sentinel])
    os._exit(1)
