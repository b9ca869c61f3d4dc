"""What a machine does to a command besides killing it: full disks, lost inputs, flipped bytes.

Each begins where a kill at some call left off, or anew.
"""

import os
import random
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from faults.trials import MOUNT, DefectError, Trials

Damage = Callable[[Trials, random.Random], str]

_BALLAST_BYTES = 200_000
_SPARE_INODES = 60
_FRAGILE = ("state/*.pt", "teacher_table/*/*.sealed", "spool/*/*")
"""What a command reads again when it goes on."""


@contextmanager
def full(trials: Trials, rng: random.Random) -> Iterator[None]:
    """Leave a few kilobytes of disk."""
    ballast, disk = trials.work / "ballast", os.statvfs(trials.work)
    size = disk.f_bavail * disk.f_frsize - rng.randint(0, _BALLAST_BYTES)
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, size))
    try:
        yield
    finally:
        ballast.unlink()


@contextmanager
def crowded(trials: Trials, rng: random.Random) -> Iterator[None]:
    """Leave a few inodes."""
    used = sum(1 for _ in trials.work.rglob("*")) + 1
    _remount(trials.work, f"nr_inodes={used + rng.randint(1, _SPARE_INODES)}")
    try:
        yield
    finally:
        _remount(trials.work, "nr_inodes=100000")


@contextmanager
def read_only(trials: Trials, rng: random.Random) -> Iterator[None]:
    """Make the disk read-only."""
    _remount(trials.work, "ro")
    try:
        yield
    finally:
        _remount(trials.work, "rw")


@contextmanager
def vanished(trials: Trials, rng: random.Random) -> Iterator[None]:
    """Take away the store that is read."""
    store = trials.folder / "store"
    elsewhere = store.rename(trials.folder / "elsewhere")
    try:
        yield
    finally:
        elsewhere.rename(store)


@contextmanager
def flipped(trials: Trials, rng: random.Random) -> Iterator[None]:
    """Flip a byte of the newest state, of a chunk of a table or of a spool; or cut the file."""
    for pattern in _FRAGILE:
        found = [p for p in sorted(trials.work.rglob(pattern)) if p.stat().st_size]
        if found:
            data = bytearray(found[-1].read_bytes())
            if rng.random() < 0.5:
                data[rng.randrange(len(data))] ^= 1
            else:
                del data[rng.randrange(len(data)) :]
            found[-1].write_bytes(data)
    yield


DISK = {"a full disk": full, "no inodes": crowded, "a read-only disk": read_only}
LOST = {"a vanished store": vanished}
BYTES = {"flipped bytes": flipped}


def possible(trials: Trials) -> list[str]:
    """Return what can be done to a scenario on this machine."""
    names = [*DISK] if trials.mounted else []
    names += LOST if (trials.folder / "store").exists() else []
    return [*names, *(BYTES if trials.made else [])]


def hurt(trials: Trials, rng: random.Random, name: str) -> str:
    """Damage something half-way, run, mend it, run to the end and compare; say what happened."""
    trials.clear()
    half_way = rng.randint(0, len(trials.made)) if name in BYTES or rng.random() < 0.5 else 0
    if half_way:
        trials.kill_at(half_way)
    what = f"{name} after a kill at call {half_way}"
    with {**DISK, **LOST, **BYTES}[name](trials, rng):
        ended = trials.run()
    if name in LOST:
        if ended.code != 0 and "no feature store found" not in ended.said:
            raise DefectError(f"{what}: exit code {ended.code}\n{ended.said}")
    else:
        trials.judge(what, ended, killed=False)
    trials.end(what)
    return f"{name}: exit {ended.code}"


def _remount(folder: Path, options: str) -> None:
    subprocess.run([MOUNT, "-o", f"remount,{options}", str(folder)], check=True)
