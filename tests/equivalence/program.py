"""A checkout of the program, and the commands that are run with it."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

from equivalence.work import Step
from faults.calls import Calls

HERE = Path(__file__).resolve().parents[2]
"""The checkout that this package lies in."""

_TIMEOUT_S = 900.0
"""No command takes that long, on however busy a machine: it hangs."""


_SAID = 8
"""Lines of a command that are shown where its exit code is another one."""


class FailedError(Exception):
    """The net itself could not work."""


@contextmanager
def checkout(old: str) -> Iterator[Path]:
    """Give the folder of the old program: itself, or a revision in a worktree for the while."""
    if (Path(old) / "karmma_pipeline").is_dir():
        yield Path(old).resolve()
        return
    git = ["git", "-C", str(HERE)]
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "old"
        add = [*git, "worktree", "add", "--quiet", "--detach", str(path), old]
        if subprocess.run(add, check=False).returncode:
            raise FailedError(f"{old}: is neither a folder with karmma_pipeline nor a revision.")
        try:
            yield path
        finally:
            subprocess.run([*git, "worktree", "remove", "--force", str(path)], check=True)


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Let only one at a time in: several may compare with one cache of old results."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@dataclass(frozen=True)
class Preloaded:
    """The library of tests/faults and one run's plan for it."""

    environment: dict[str, str]
    calls: Calls

    @classmethod
    def make(cls, built: dict[str, str], folder: Path) -> "Preloaded":
        """Return a plan of its own beside a library that was built."""
        (name,) = built.keys() - {"LD_PRELOAD"}
        plan = folder / "plan"
        shutil.copy(built[name], plan)
        return cls({**built, name: str(plan)}, Calls(plan))


@dataclass(frozen=True)
class Program:
    """A checkout, run as `python -m karmma_pipeline.cli`."""

    tree: Path
    built: dict[str, str] = field(default_factory=dict)

    def copied(self, folder: Path) -> "Program":
        """Return a copy, so that whoever works on the tree meanwhile changes nothing here."""
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(self.tree / "karmma_pipeline", folder / "karmma_pipeline", ignore=ignored)
        return Program(folder, self.built)

    def digest(self) -> str:
        """Return a digest of the whole program."""
        total = sha256()
        for path in sorted((self.tree / "karmma_pipeline").rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                total.update(f"{path.relative_to(self.tree)}\n".encode() + path.read_bytes())
        return total.hexdigest()[:12]

    def check(self) -> None:
        """See that it is this tree's program that runs.

        Raises:
            FailedError: it is another one.
        """
        code = "import karmma_pipeline; print(karmma_pipeline.__file__)"
        command = [sys.executable, "-P", "-c", code]
        environment = self._environment(self.tree)
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        if not Path(done.stdout.strip()).resolve().is_relative_to(self.tree):
            raise FailedError(f"{self.tree}: {done.stdout.strip()} would run instead of it.")

    def run(
        self, arguments: Sequence[str], folder: Path, log: Path, kill: "Kill | None" = None
    ) -> int:
        """Run a command in a folder and return its exit code, negative for a signal."""
        log.parent.mkdir(parents=True, exist_ok=True)
        environment = self._environment(folder)
        with tempfile.TemporaryDirectory() as name, log.open("ab") as file:
            preloaded = None
            if kill is not None:
                preloaded = Preloaded.make(self.built, Path(name))
                environment |= preloaded.environment
                preloaded.calls.watch(kill.root, kill.at)
            file.write(f"$ karmma {' '.join(arguments)}\n".encode())
            file.flush()
            code, seconds = _wait(
                subprocess.Popen(
                    [sys.executable, "-P", "-m", "karmma_pipeline.cli", *arguments],
                    cwd=folder,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=file,
                    start_new_session=True,
                )
            )
            file.write(f"exit code {code}, {seconds:.1f} CPU s\n".encode())
            if kill is not None and preloaded is not None:
                kill.made += preloaded.calls.rest()
        return code

    def _environment(self, folder: Path) -> dict[str, str]:
        return {
            **os.environ,
            "PYTHONPATH": f"{self.tree}{os.pathsep}{folder / 'inputs'}",
            "OMP_NUM_THREADS": "1",
        }


@dataclass
class Kill:
    """Which call under ``root`` kills the command, 0: none; and the calls that were made."""

    root: Path
    at: int = 0
    made: list[str] = field(default_factory=list)


_running: set[int] = set()
_ending = threading.Event()
"""What ends from now on was ended by us, and says nothing about the program."""


def _wait(process: "subprocess.Popen[bytes]") -> tuple[int, float]:
    """Return the exit code of a command, and the CPU seconds of all its processes."""
    hangs = threading.Timer(_TIMEOUT_S, os.killpg, (process.pid, signal.SIGKILL))
    hangs.start()
    _running.add(process.pid)
    try:
        _, status, used = os.wait4(process.pid, 0)
    finally:
        _running.discard(process.pid)
        hangs.cancel()
    process.returncode = os.waitstatus_to_exitcode(status)
    if _ending.is_set():
        raise FailedError("stopped")
    return process.returncode, used.ru_utime + used.ru_stime


@dataclass(frozen=True)
class Side:
    """A folder in which one program does all the work; ``calls``: count those of its steps."""

    program: Program
    folder: Path
    calls: bool = False

    def do(self, step: Step) -> None:
        """Do a step, unless it was done; leave its exit codes and calls in ``facts``."""
        facts = self.folder / "facts" / f"{step.name}.json"
        with alone(facts.with_suffix(".lock")):
            if not facts.is_file():
                self._do(step, facts)

    def _do(self, step: Step, facts: Path) -> None:
        shutil.rmtree(self.folder / step.writes, ignore_errors=True)
        log = self.folder / "logs" / f"{step.name}.txt"
        log.unlink(missing_ok=True)
        codes, calls = [], []
        for arguments in step.commands:
            kill = Kill(self.folder / step.writes) if self.calls else None
            codes.append(self.program.run(arguments, self.folder, log, kill))
            calls.append(len(kill.made) if kill else 0)
        facts.write_text(json.dumps({"codes": codes, "calls": calls}))

    def codes(self, step: Step) -> list[int]:
        """Return the exit codes of a step's commands."""
        return list(self._facts(step)["codes"])

    def said(self, step: Step) -> list[str]:
        """Return the last lines that a step's commands printed."""
        log = self.folder / "logs" / f"{step.name}.txt"
        return log.read_text(errors="replace").replace("\r", "\n").splitlines()[-_SAID:]

    def count(self, step: Step) -> int:
        """Return how many calls the first command of a step made."""
        return self._facts(step)["calls"][0]

    def _facts(self, step: Step) -> dict[str, list[int]]:
        facts: dict[str, list[int]] = json.loads(
            (self.folder / "facts" / f"{step.name}.json").read_text()
        )
        return facts


class Schedule:
    """Does things side by side, each after those that it needs.

    What is needed is added first, so that whatever waits, waits for something that runs.
    """

    def __init__(self, jobs: int) -> None:
        self._pool = ThreadPoolExecutor(jobs)
        self._futures: dict[str, Future[None]] = {}

    def add(self, name: str, work: Callable[[], None], needs: Sequence[str] = ()) -> None:
        """Do something under a name."""
        awaited = [self._futures[need] for need in needs]

        def run() -> None:
            for future in awaited:
                future.result()
            work()

        self._futures[name] = self._pool.submit(run)

    def wait(self) -> None:
        """Wait for all; the first thing that fails is raised, and what still runs is ended."""
        try:
            for future in self._futures.values():
                future.result()
        except BaseException:
            _ending.set()
            self._pool.shutdown(wait=False, cancel_futures=True)
            for group in list(_running):
                os.killpg(group, signal.SIGKILL)
            raise
        finally:
            self._pool.shutdown()
