"""Commands of karmma in process groups of their own, which can be killed as a batch job is."""

import multiprocessing.context
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
from support.forks import fork

import karmma_pipeline.evaluation.evaluate
import karmma_pipeline.extraction.pipeline
import karmma_pipeline.training.stages  # noqa: F401  (a fork has what is imported before)
from karmma_pipeline.cli import main

PATIENCE_S = 600.0
"""No run here takes that long, on a busy machine either: it hangs."""


@dataclass(frozen=True)
class Ended:
    """How a command ended, negative for a signal, and all it printed."""

    code: int
    said: str


@dataclass(frozen=True)
class Run:
    """A running command; ``pid`` is its process group as well."""

    pid: int
    log: Path

    def wait(self, seconds: float = PATIENCE_S) -> Ended | None:
        """Return how it ended; None if it goes on after some seconds."""
        until = time.monotonic() + seconds
        while True:
            found, status = os.waitpid(self.pid, os.WNOHANG)
            if found:
                return Ended(os.waitstatus_to_exitcode(status), self.log.read_text())
            if time.monotonic() > until:
                return None
            time.sleep(0.002)

    def signal(self, number: int, only: str = "") -> None:
        """Send a signal to the whole group, or ``only`` to its "main" process or a "worker"."""
        if not only:
            try:
                os.killpg(self.pid, number)
            except ProcessLookupError:  # a fork that has not yet made its group
                os.kill(self.pid, number)
        elif only == "main":
            os.kill(self.pid, number)
        elif workers := [pid for pid in self.members() if pid != self.pid and not _tracks(pid)]:
            os.kill(workers[-1], number)

    def members(self) -> list[int]:
        """Return the processes of the group that live."""
        found = []
        for process in psutil.process_iter(["status"]):
            try:
                alive = process.info["status"] != psutil.STATUS_ZOMBIE
                if alive and os.getpgid(process.pid) == self.pid:
                    found.append(process.pid)
            except ProcessLookupError:
                continue
        return found


def _tracks(pid: int) -> bool:
    """Return whether a process is Python's own tracker of semaphores, not one of our workers.

    Killed alone, it is started again by Python, whose tracker then prints tracebacks.
    """
    try:
        return any("resource_tracker" in word for word in psutil.Process(pid).cmdline())
    except psutil.NoSuchProcess:
        return False


def _nothing() -> None:
    pass


def start(
    arguments: Sequence[str], log: Path, fresh: bool, begin: Callable[[], None] = _nothing
) -> Run:
    """Start a command: ``fresh`` in a new interpreter, else in a fork of this one, at once.

    ``begin`` is called first, in the fork.
    """
    child = fork()
    if child:
        return Run(child, log)
    try:
        os.setsid()
        for number, path, flags in (
            (0, os.devnull, os.O_RDONLY),
            (1, log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
        ):
            os.dup2(os.open(path, flags), number)
        os.dup2(1, 2)
        if fresh:
            words = [sys.executable, "-m", "karmma_pipeline.cli", *arguments]
            os.execv(sys.executable, words)  # noqa: S606
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        begin()
        _forked(arguments)
    finally:
        os._exit(98)


def _forked(arguments: Sequence[str]) -> None:
    """Run a command as its process would; decoders are forked as well, which takes no time."""
    contexts = multiprocessing.context._concrete_contexts  # type: ignore[attr-defined]
    contexts["spawn"] = contexts["fork"]
    code = 0
    try:
        main.main(list(arguments), prog_name="karmma")
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def apart(work: Callable[[], None]) -> None:
    """Do something in a fork, so that it leaves no threads or files open here."""
    child = fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    if os.waitpid(child, 0)[1]:
        raise RuntimeError("the preparation failed; see above")
