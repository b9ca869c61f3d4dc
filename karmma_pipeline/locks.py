"""Locks on folders, for all commands, on any file system, across machines.

A lock is a file that names its holder. It needs no locks of the system, which network disks lack
or keep to one machine (NFS, Lustre): of several processes that link a file to one name, one wins.
The holder touches the file as long as it lives, so that a lock whose holder was killed is free
again: at once on its own machine, whose processes can be looked up, and after `DEAD_S` elsewhere.
"""

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import psutil

from karmma_pipeline import files
from karmma_pipeline.errors import KarmmaError

BEAT_S, DEAD_S = 20.0, 180.0
"""Seconds between touches of a lock, and without any after which its holder counts as dead."""

# Lock to what this process wrote into it.
_held: dict[Path, str] = {}
_wake = threading.Condition()
_touching = [False]


def _forget() -> None:
    """Begin anew in a forked child, which has its parent's memory but not its locks."""
    global _wake
    _wake, _touching[0] = threading.Condition(), False
    _held.clear()


os.register_at_fork(after_in_child=_forget)


@contextmanager
def locked(path: Path, doing: str, remedy: str = "wait for it, or stop it") -> Iterator[None]:
    """Hold a lock; folders that are made for it go again if nothing else came into them.

    Args:
        path: the file that is the lock, inside the folder that is guarded.
        doing: what a holder does, for the message: "is training in this folder".
        remedy: what the other one is to do.

    Raises:
        KarmmaError: another living process holds it; it is named.
    """
    made = [folder for folder in path.parents if not folder.exists()]
    with files.disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        text = _take(path, doing, remedy)
    _begin_to_touch(path, text)
    try:
        yield
    finally:
        with _wake:
            mine = _held.pop(path, None) == text
            _wake.notify()
        with suppress(OSError):  # on a disk that fails; a dead process's lock counts for nothing
            if mine and path.read_text(encoding="utf-8", errors="replace") == text:
                path.unlink()
            for folder in made if mine else ():
                folder.rmdir()  # fails where something lies in it


def check(path: Path) -> None:
    """Check that this process still holds a lock: one that was suspended may have lost it.

    Raises:
        KarmmaError: another process took it over, thinking this one dead.
    """
    text = _held[path]
    with suppress(OSError):
        if (now := path.read_text(encoding="utf-8", errors="replace")) != text:
            raise KarmmaError(
                f"{path.parent}: {_name(now)} took over this folder while this process was "
                f"suspended for more than {DEAD_S:.0f} s; this process stops writing."
            )


def holder(path: Path) -> str:
    """Return who holds a lock, empty if nobody does."""
    try:
        text, touched = _read(path)
    except OSError:
        return ""
    return "" if _is_dead(text, time.time() - touched) else text


def _take(path: Path, doing: str, remedy: str) -> str:
    """Become the holder; return the lock's text."""
    job = os.environ.get("SLURM_JOB_ID", "-")
    restart = os.environ.get("SLURM_RESTART_COUNT", "0")
    pid = os.getpid()
    # What comes after the job is not known to programs before 0.1.0, which read three words.
    text = f"{socket.gethostname()} {pid} {job} {restart} {_machine()} {_started(pid)}"
    while True:
        mine = files.create_beside(path)
        try:
            mine.write_text(text, encoding="utf-8")
            if not _appear(mine, path):
                _take_over(path, mine, mine.stat().st_mtime, f"{doing}; {remedy}")
            return text
        except FileNotFoundError:
            continue  # whoever has just taken the lock has swept the folder
        finally:
            mine.unlink(missing_ok=True)


def _take_over(path: Path, mine: Path, now: float, message: str) -> None:
    """Replace the lock of a dead process; of several that find it dead, one does."""
    guard = path.with_name(f".{path.name}.taking")
    _refuse_living(path, now, message)
    while not _appear(mine, guard):
        _refuse_living(guard, now, message)
        guard.unlink(missing_ok=True)  # its process was killed in the lines below
    try:
        # Looked at again: whoever had the guard before may have taken the lock.
        _refuse_living(path, now, message)
        mine.replace(path)
    finally:
        guard.unlink(missing_ok=True)


def _appear(mine: Path, path: Path) -> bool:
    """Give a written file a second name, whole or not at all; false if the name is there."""
    try:
        os.link(mine, path)
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(mine.read_text(encoding="utf-8"))
        except FileExistsError:
            return False
    return True


def _refuse_living(path: Path, now: float, message: str) -> None:
    """Raise if a living process holds a lock; ``now`` is the file server's, as the lock's time."""
    with suppress(FileNotFoundError):
        text, touched = _read(path)
        if not _is_dead(text, now - touched):
            raise KarmmaError(
                f"{path.parent}: {_name(text)} {message}. If that process was killed, the lock "
                f"expires within {DEAD_S:.0f} s; to continue at once, remove {path}."
            )


def _read(path: Path) -> tuple[str, float]:
    with path.open(
        encoding="utf-8", errors="replace"
    ) as file:  # opening makes a network disk look again
        return file.read(), os.fstat(file.fileno()).st_mtime


def _is_dead(text: str, age_s: float) -> bool:
    """Tell whether the holder that a lock names is gone.

    Args:
        text: of the lock: host, process, Slurm job, its restarts, machine, start of the process.
        age_s: since the lock was last touched.
    """
    words = text.split()
    if len(words) < 2 or not words[1].isdecimal():
        return True  # locks are whole: this one was written by nobody, or damaged
    host, pid, job, restart, machine, started = [*words, *"-----"][:6]
    if job != "-" and job == os.environ.get("SLURM_JOB_ID"):
        # Slurm gives a requeued job its old number: the process that wrote the lock is gone.
        restarts = os.environ.get("SLURM_RESTART_COUNT", "0")
        if restart == "-" or restart != restarts:
            return True
    if machine == "-":  # of an older program, which does not touch its locks
        alive = psutil.pid_exists(int(pid)) and int(pid) != os.getpid()
        return host == socket.gethostname() and not alive
    if machine == _machine():
        return _started(int(pid)) != started
    return age_s > DEAD_S


def _name(text: str) -> str:
    host, pid, job = [*text.split(), "?", "?", "-"][:3]
    return f"process {pid} on {host}{f' (job {job})' if job != '-' else ''}"


@cache
def _machine() -> str:
    """Return what tells this machine, as booted now, and this container's processes from others."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{boot}.{Path('/proc/self/ns/pid').stat().st_ino}"
    except OSError:
        return socket.gethostname()


def _started(pid: int) -> str:
    """Return when a living process started, in ticks; its number alone may be given again."""
    try:
        words = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return "0" if psutil.pid_exists(pid) and not Path("/proc/self/stat").exists() else "gone"
    return "gone" if words[0] in "ZX" else words[19]


def _begin_to_touch(path: Path, text: str) -> None:
    """Touch a lock from now on; one thread does so for all locks, while there are any."""
    with _wake:
        _held[path] = text
        if not _touching[0]:
            _touching[0] = True
            threading.Thread(target=_touch, name="locks", daemon=True).start()


def _touch() -> None:
    while True:
        with _wake:
            _wake.wait_for(lambda: not _held, BEAT_S)
            if not _held:
                _touching[0] = False
                return
            paths = list(_held)
        for path in paths:  # outside: a disk that hangs must not hang whoever lets a lock go
            with suppress(OSError):
                os.utime(path)
