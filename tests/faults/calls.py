"""Lets the n-th call that changes a file under a folder fail, or kill its process group there.

A small C library is preloaded into a run and all its processes, so that every call counts,
whoever makes it: Python, HDF5, a compiler's runtime. `calls.c` names the calls.
"""

import errno
import mmap
import os
import shutil
import signal
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path

from support import nth_call

_SOURCE = Path(__file__).with_name("calls.c")
_PLAN = "<QQii4096s"
_PLACE = "KARMMA_FAULTS"


@dataclass(frozen=True)
class Fault:
    """What happens at the call: ``error`` 0 is SIGKILL, below 0 another signal, to one process.

    See ``enum stays`` for how long an error lasts.
    """

    name: str
    error: int
    stays: int = 0


KILL = Fault("SIGKILL", 0)
ERRORS = (
    Fault("EIO", errno.EIO),
    Fault("ENOSPC", errno.ENOSPC, 1),
    Fault("EDQUOT", errno.EDQUOT, 1),
    Fault("EROFS", errno.EROFS, 2),
)
STOPS = tuple(Fault(number.name, -number) for number in (signal.SIGTERM, signal.SIGUSR1))
FAULTS = {fault.name: fault for fault in (KILL, *STOPS, *ERRORS)}


def build(folder: Path) -> dict[str, str]:
    """Compile the library and return the environment that preloads it; empty without a compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        return {}
    library, plan = folder / "calls.so", folder / "plan"
    flags = ["-O1", "-shared", "-fPIC", "-o", str(library)]
    subprocess.run([compiler, *flags, str(_SOURCE), "-ldl"], check=True)
    plan.write_bytes(bytes(struct.calcsize(_PLAN)))
    return {"LD_PRELOAD": str(library), _PLACE: str(plan)}


class Calls:
    """What the preloaded library is told, and what it has seen."""

    def __init__(self, plan: Path) -> None:
        self._path = plan
        with plan.open("r+b") as file:
            self._plan = mmap.mmap(file.fileno(), 0)

    @classmethod
    def preloaded(cls) -> "Calls | None":
        """Return the library of this process; None if it has none."""
        return cls(Path(os.environ[_PLACE])) if _PLACE in os.environ else None

    def watch(self, root: Path, at: int = 0, fault: Fault = KILL) -> None:
        """Count from now on under a folder; the ``at``-th call is hit, 0: none."""
        folder = os.fsencode(root.resolve())
        Path(f"{self._path}.list").write_bytes(b"")
        self._plan[:] = struct.pack(_PLAN, 0, at, fault.error, fault.stays, folder)

    def rest(self) -> list[str]:
        """Stop counting and return the calls until now, such as ``fsync /out/recipe.yaml``."""
        self._plan[:] = bytes(len(self._plan))
        return Path(f"{self._path}.list").read_text().splitlines()

    def begin(self) -> None:
        """Called in the fork that is to be watched."""


class PythonCalls(Calls):
    """The same where nothing is preloaded: only calls that Python makes, in the fork alone."""

    def __init__(self, log: Path) -> None:
        self._log, self._fault, self._at = log, KILL, 0
        self._root: Path | None = None

    def watch(self, root: Path, at: int = 0, fault: Fault = KILL) -> None:
        self._root, self._at, self._fault = root, at, fault
        self._log.write_bytes(b"")

    def rest(self) -> list[str]:
        self._root = None
        return self._log.read_text().splitlines()

    def begin(self) -> None:
        if self._root is not None:
            log = os.open(self._log, os.O_WRONLY | os.O_APPEND)

            def act(number: int, call: str) -> None:
                os.write(log, f"{call}\n".encode())
                if number == self._at:
                    self._strike()

            nth_call.at_call(self._root, act)

    def _strike(self) -> None:
        error = self._fault.error
        if error > 0:
            raise OSError(error, os.strerror(error))
        if error == 0:
            os.killpg(0, signal.SIGKILL)
        os.kill(os.getpid(), -error)
