"""What this job may use of the machine: its CPU affinity, its cgroup, its batch system's word.

A machine's own size misleads on shared nodes: threads that outnumber the job's CPUs spin for
one another, and a process that outgrows the cgroup is killed without a word.
"""

import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil

_CPUS = ("SLURM_CPUS_PER_TASK", "PBS_NUM_PPN", "LSB_DJOB_NUMPROC", "NSLOTS")
"""CPUs of a task as Slurm, Torque, LSF and Grid Engine tell them."""

_ROOT = Path("/")
_UNLIMITED = 1 << 60
"""Version 1 writes "no limit" as a number near 2^63."""


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
        return path.read_text().splitlines()
    except OSError:
        return []


def _words(path: Path) -> list[str]:
    return " ".join(_lines(path)).split()
