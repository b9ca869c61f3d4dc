"""Hurts trainings in every way a cluster does, and checks that they end with the same bytes.

    PYTHONPATH=tests python -m faults.trainer --seconds 600

A student (table of a teacher, moving average, accumulation, dropout, balanced classes) is
killed, starved of disk and lied to at random moments, and run again after each fault. Every
fault must end in success or one clear sentence, and the finished run must hold the bytes of
one that nothing happened to. Linux; faults that need root or strace are left out without them.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from support.tiny_store import write_store
from support.training import SIZE, ended, fork, results, student_recipe, teacher_recipe

from karmma_pipeline.jobs import StopFlag
from karmma_pipeline.train.stages import distill, train_teacher

SETTINGS = {
    "epochs": 3,
    "size": {**SIZE, "dropout": 0.2},
    "accumulate": 2,
    "ema": 0.9,
    "class_balance": 0.5,
    "temperature": 2.0,
    "save_every_s": 0.0,
}
FAULTS_OF_A_RUN = 8
STRACE = shutil.which("strace")
MOUNT, UMOUNT = (shutil.which(name) or name for name in ("mount", "umount"))
INJECTED = [
    f"{call}:{what}"
    for call in ("rename", "fsync")
    for what in ("signal=KILL", "error=EIO", "error=ENOSPC", "error=EDQUOT", "error=EROFS")
]


class UnclearError(AssertionError):
    """A fault ended in something else than success or one clear sentence."""


class Arena:
    """A store, a teacher, the bytes of an undisturbed student, and the student that is hurt."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.random = folder, random.Random(seed)
        self.store = write_store(folder / "store")
        self.teacher = folder / "teacher"
        self.disk = folder / "disk"
        self.disk.mkdir()
        self.mounted = os.geteuid() == 0 and _mount(self.disk)
        self.run = self.disk / "run"
        self.counts: Counter[str] = Counter()
        assert self.attempt("teacher") == 0
        started = time.monotonic()
        assert self.attempt("whole") == 0
        self.seconds = time.monotonic() - started
        self.wanted = results(folder / "whole")

    def close(self) -> None:
        """Give the disk back."""
        if self.mounted:
            subprocess.run([UMOUNT, "-l", str(self.disk)], check=True)

    def start(self, what: str = "run", wait: bool = False) -> tuple[int, int]:
        """Fork a process that trains; return its id and a pipe that, closed, lets it begin."""
        reader, writer = os.pipe()

        def train(stop: StopFlag) -> None:
            os.close(writer)
            os.read(reader, 1)
            if what == "teacher":
                train_teacher(teacher_recipe(self.store, self.teacher, epochs=1), stop)
            else:
                out = self.run if what == "run" else self.folder / what
                distill(student_recipe(self.store, self.teacher, out, **SETTINGS), stop)

        child = fork(train, self.folder / "said")
        os.close(reader)
        if not wait:
            os.close(writer)
        return child, writer

    def attempt(self, what: str = "run") -> int:
        """Train to the end of it and return the exit code."""
        return self.end(self.start(what)[0])

    def end(self, child: int) -> int:
        """Wait for a process; anything but success, a clear sentence or SIGKILL is unclear."""
        code = ended(child)
        if code not in (0, 1, 75, -signal.SIGKILL):
            raise UnclearError(f"exit code {code}\n{self.said()}")
        return code

    def said(self) -> str:
        """What the last process printed."""
        return (self.folder / "said").read_text()

    def expect(self, code: int, *sentences: str) -> None:
        """Check that a process that failed said why."""
        if code == 1 and not any(sentence in self.said() for sentence in sentences):
            raise UnclearError(self.said())


def kill(arena: Arena, number: int = signal.SIGKILL) -> None:
    """End the process at a random moment."""
    child, _ = arena.start()
    time.sleep(arena.random.uniform(0, arena.seconds))
    os.kill(child, number)
    arena.end(child)


def stop(arena: Arena) -> None:
    """Ask the process to stop at a random moment."""
    kill(arena, arena.random.choice([signal.SIGTERM, signal.SIGUSR1]))


def inject(arena: Arena) -> None:
    """Let a rename or fsync fail, or kill the process exactly there."""
    assert STRACE is not None
    fault = arena.random.choice(INJECTED)
    child, gate = arena.start(wait=True)
    call, when = fault.split(":")[0], arena.random.randint(1, 40)
    command = [STRACE, "-f", "-qq", "-o", "/dev/null", "-p", str(child), "-e", f"trace={call}"]
    tracer = subprocess.Popen([*command, "-e", f"inject={fault}:when={when}"])
    while "TracerPid:\t0" in Path(f"/proc/{child}/status").read_text():
        time.sleep(0.005)
    os.close(gate)
    code = arena.end(child)
    tracer.wait()
    arena.expect(code, "is full", "file system failed", "cannot be written")


def fill(arena: Arena) -> None:
    """Leave a few kilobytes of disk."""
    ballast = arena.disk / "ballast"
    free = os.statvfs(arena.disk)
    size = free.f_bavail * free.f_frsize - arena.random.randint(0, 200_000)
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, size))
    code = arena.attempt()
    ballast.unlink()
    arena.expect(code, "is full")


def lock(arena: Arena) -> None:
    """Make the disk read-only."""
    _remount(arena.disk, "ro")
    code = arena.attempt()
    _remount(arena.disk, "rw")
    arena.expect(code, "cannot be written")


def flip(arena: Arena) -> None:
    """Flip a byte of the newest state or of a chunk of the table, or cut it."""
    found = [
        *sorted(arena.run.glob("state/*.pt"))[-1:],
        *arena.run.glob("teacher_table/*/*.sealed"),
    ]
    if not found:
        return
    path = arena.random.choice(found)
    data = bytearray(path.read_bytes())
    if arena.random.random() < 0.5:
        data[arena.random.randrange(len(data))] ^= 1
    else:
        del data[arena.random.randrange(len(data)) :]
    path.write_bytes(data)
    kill(arena)


def vanish(arena: Arena) -> None:
    """Take the store away."""
    elsewhere = arena.store.rename(arena.folder / "elsewhere")
    code = arena.attempt()
    elsewhere.rename(arena.store)
    arena.expect(code, "no feature store is there")


def faults(arena: Arena) -> list[Callable[[Arena], None]]:
    """Return what can be done to a training on this machine."""
    possible: list[Callable[[Arena], None]] = [kill, kill, stop, flip, vanish]
    if STRACE:
        possible += [inject, inject, inject]
    if arena.mounted:
        possible += [fill, fill, lock]
    return possible


def torment(arena: Arena, seconds: float, chosen: list[Callable[[Arena], None]]) -> None:
    """Hurt one training after another until the time is over; finish and compare each."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for _ in range(FAULTS_OF_A_RUN):
            fault = arena.random.choice(chosen)
            fault(arena)
            arena.counts[fault.__name__] += 1
            if time.monotonic() > end:
                break
        if arena.attempt() != 0:
            raise UnclearError(arena.said())
        if results(arena.run) != arena.wanted:
            raise UnclearError(f"{arena.run} differs from the run that nothing happened to")
        arena.counts["runs with equal bytes"] += 1
        shutil.rmtree(arena.run)


def _mount(folder: Path) -> bool:
    command = [MOUNT, "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _remount(folder: Path, mode: str) -> None:
    subprocess.run([MOUNT, "-o", f"remount,{mode}", str(folder)], check=True)


def main() -> None:
    """Torment trainings for as long as asked and print what was done."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=random.randrange(2**31))
    parser.add_argument("--only", help="one kind of fault, such as kill or inject")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        arena = Arena(Path(folder), options.seed)
        try:
            chosen = [f for f in faults(arena) if options.only in (None, f.__name__)]
            torment(arena, options.seconds, chosen)
        finally:
            print(f"seed {options.seed}: {dict(arena.counts)}")
            arena.close()


if __name__ == "__main__":
    main()
