"""Acts at the n-th call that changes a file: a moment that no busy machine moves.

Python's own audit events name the calls, so that no compiler is needed. What libraries call by
themselves is not seen (HDF5, safetensors, torch's zip files): `faults.calls` counts that as well.
"""

import io
import os
import sys
from collections.abc import Callable
from fnmatch import fnmatch
from itertools import count
from pathlib import Path
from typing import Any

_CHANGES = {
    "os.rename": 1,
    "os.link": 1,
    "os.remove": 0,
    "os.rmdir": 0,
    "os.mkdir": 0,
    "os.truncate": 0,
}
"""Audit events, and which of their arguments is the path that changes."""


def at_call(root: Path, act: Callable[[int, str], object]) -> None:
    """Call ``act`` with number and name of each change under a folder, just before it is made.

    An exception of ``act`` is that of the call. Of this process only, and until its end: an audit
    hook cannot be taken away, so this is for processes that a test has started.
    """
    folder, process, made = os.fspath(root.resolve()), os.getpid(), 0

    def seen(call: str, path: str) -> None:
        nonlocal made
        if os.getpid() == process and (path == folder or path.startswith(folder + "/")):
            made += 1
            act(made, f"{call} {path[len(folder) :]}")

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            seen("open", _path(arguments[0]))
        elif event in _CHANGES:
            folder_of = arguments[-1] if event != "os.truncate" else -1
            seen(event.removeprefix("os."), _path(arguments[_CHANGES[event]], folder_of))

    sys.addaudithook(hook)
    _count_syncs(seen)
    _count_writes(seen)


def kill_at_call(root: Path, number: int, pattern: str = "*") -> None:
    """Kill the process group at the n-th call that a pattern fits, such as "write */journal"."""
    fitting = count(1)

    def act(_: int, call: str) -> None:
        if fnmatch(call, pattern) and next(fitting) == number:
            os.killpg(0, 9)

    at_call(root, act)


def _path(value: Any, folder: int = -1) -> str:
    if isinstance(value, int):
        return str(_open_as(value))
    return os.path.normpath((_open_as(folder) if folder >= 0 else Path.cwd()) / os.fsdecode(value))


def _open_as(descriptor: int) -> Path:
    return Path(f"/proc/self/fd/{descriptor}").readlink()


def _count_syncs(seen: Callable[[str, str], None]) -> None:
    """Count fsync, which raises no audit event."""
    original = os.fsync

    def fsync(descriptor: int) -> None:
        seen("fsync", _path(descriptor))
        original(descriptor)

    os.fsync = fsync  # type: ignore[assignment]


def _count_writes(seen: Callable[[str, str], None]) -> None:
    """Count each write to a file without a buffer; of one that is hit only half is written."""
    original = io.open

    class Counted(io.FileIO):
        def write(self, data: Any) -> int:
            half = len(memoryview(data)) // 2
            place = self.tell()
            super().write(memoryview(data)[:half])
            seen("write", _path(self.fileno()))
            self.seek(place)
            return super().write(data)

    def opened(file: Any, mode: str = "r", buffering: int = -1, *more: Any, **named: Any) -> Any:
        if buffering == 0:
            return Counted(file, mode.replace("b", ""))
        return original(file, mode, buffering, *more, **named)

    io.open = opened
