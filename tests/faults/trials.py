"""One command is hurt, its end is judged, and it runs again; then all must be as if untouched."""

import json
import os
import random
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from faults.calls import KILL, Calls, Fault
from faults.process import PATIENCE_S, Ended, apart, start
from faults.scenarios import SCENARIOS, losses

MOUNT, UMOUNT = (shutil.which(name) or name for name in ("mount", "umount"))

CLEAR = ("is full", "file system error", "cannot be written", "free some", "remove some")
"""One of these is in the sentence that a failing disk ends a command with."""


class DefectError(AssertionError):
    """Something that must hold did not."""


@dataclass
class Trials:
    """A scenario in a folder of its own, and what an undisturbed run of it is like.

    calls: None where no call can be made to fail (no C compiler).
    """

    name: str
    folder: Path
    calls: Calls | None

    def __post_init__(self) -> None:
        self.scenario = SCENARIOS[self.name]
        self.folder.mkdir(parents=True)
        self.work, self.log = self.folder / "work", self.folder / "log"
        self.work.mkdir()
        self.mounted = os.geteuid() == 0 and _mount(self.work)
        apart(self._prepare)
        self.arguments: list[str] = json.loads((self.folder / "arguments.json").read_text())
        self.clear()
        if self.calls is not None:
            self.calls.watch(self.work)
        self._finish("at first")
        self.made = self.calls.rest() if self.calls is not None else []
        self.wanted = self.scenario.tree(self.work)
        self._seconds: dict[bool, float] = {}

    def _prepare(self) -> None:
        arguments = self.scenario.prepare(self.folder)
        (self.folder / "arguments.json").write_text(json.dumps(arguments))

    def clear(self) -> None:
        """Begin anew."""
        for path in self.work.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def close(self) -> None:
        """Give the disk back."""
        if self.mounted:
            subprocess.run([UMOUNT, "-l", str(self.work)], check=True)

    def seconds(self, fresh: bool = True) -> float:
        """Return how long the command takes, in a new process or in a fork; work is cleared."""
        if fresh not in self._seconds:
            self.clear()
            began = time.monotonic()
            self._finish("at first", fresh)
            self._seconds[fresh] = time.monotonic() - began
        return self._seconds[fresh]

    def hit(self, number: int, fault: Fault) -> str:
        """Hurt the n-th call of a run that begins anew; return what happened."""
        assert self.calls is not None
        self.clear()
        self.calls.watch(self.work, number, fault)
        ended = self.run()
        made = self.calls.rest()
        call = made[number - 1] if number <= len(made) else "no call"
        what = f"{fault.name} at call {number}, {call}"
        self.judge(what, ended, fault is KILL, max(0, -fault.error))
        self.end(what)
        return f"{fault.name} at {call.split()[0]}: exit {ended.code}"

    def kill_at(self, number: int) -> None:
        """Leave behind what a kill at the n-th call leaves."""
        assert self.calls is not None
        self.calls.watch(self.work, number)
        self.run()
        self.calls.rest()

    def kill(
        self,
        rng: random.Random,
        number: int = signal.SIGKILL,
        only: str = "",
        fresh: bool = True,
    ) -> str:
        """Signal the command at a random moment, run it to the end; return what happened."""
        moment = rng.uniform(0, self.seconds(fresh))
        self.clear()
        ended = self.interrupt(moment, number, only, fresh)
        what = f"{signal.Signals(number).name} to {only or 'all'}"
        self.end(f"{what} after {moment:.3f} s")
        return f"{what} of {'a new process' if fresh else 'a fork'}: exit {ended.code}"

    def interrupt(self, moment: float, number: int, only: str, fresh: bool) -> Ended:
        """Signal the command after some seconds and see that all its processes end well."""
        what = f"{signal.Signals(number).name} to {only or 'all'} after {moment:.3f} s"
        run = start(self.arguments, self.log, fresh)
        ended = run.wait(moment)
        if ended is None:
            run.signal(number, only)
            ended = run.wait()
        if ended is None:
            run.signal(signal.SIGKILL)
            run.wait()
            raise DefectError(f"{what}: hangs\n{self.log.read_text()}")
        until = time.monotonic() + PATIENCE_S
        while run.members():
            if time.monotonic() > until:
                raise DefectError(f"{what}: processes are left: {run.members()}")
            time.sleep(0.05)
        self.judge(what, ended, number == signal.SIGKILL and only != "worker", number)
        return ended

    def run(self, fresh: bool = False) -> Ended:
        """Run the command to its end."""
        begin = [self.calls.begin] if self.calls is not None else []
        run = start(self.arguments, self.log, fresh, *begin)
        ended = run.wait()
        if ended is None:
            run.signal(signal.SIGKILL)
            run.wait()
            raise DefectError(f"{self.name} hangs\n{self.log.read_text()}")
        return ended

    def judge(self, what: str, ended: Ended, killed: bool, number: int = 0) -> None:
        """See that a disturbed run ended clearly and lost nothing."""
        said, code = ended.said, ended.code
        stopped = number in (signal.SIGTERM, signal.SIGUSR1)
        allowed = {0, -signal.SIGKILL} if killed else {0, 75, -number} if stopped else {0, 1}
        if code not in allowed:
            raise DefectError(f"{what}: exit code {code}\n{said}")
        if "Traceback" in said:
            raise DefectError(f"{what}: a traceback\n{said}")
        if code == 1 and not any(words in said for words in CLEAR):
            raise DefectError(f"{what}: no clear sentence\n{said}")
        try:
            lost = list(losses(self.work, self.wanted))
        except (ValueError, OSError) as error:
            lost = [repr(error)]
        if lost:
            raise DefectError(f"{what}: exit code {code}, and then: {lost}\n{said}")
        if code == 0:
            self.compare(what, left_over=True)

    def compare(self, what: str, left_over: bool = False) -> None:
        """See that everything is as if nothing had happened; more may be there if left over."""
        found = self.scenario.tree(self.work)
        missing, more = sorted(self.wanted.keys() - found), sorted(found.keys() - self.wanted)
        other = sorted(n for n in self.wanted.keys() & found if found[n] != self.wanted[n])
        if missing or other or (more and not left_over):
            raise DefectError(f"{what}: missing {missing}, different {other}, left over {more}")

    def end(self, what: str) -> None:
        """Run undisturbed to the end and see that everything is as it must be."""
        self._finish(what)
        self.compare(what)

    def _finish(self, what: str, fresh: bool = False) -> None:
        ended = self.run(fresh)
        if ended.code != 0 or "Traceback" in ended.said:
            raise DefectError(f"{what}: the run to the end: exit code {ended.code}\n{ended.said}")


def _mount(folder: Path) -> bool:
    """Mount a small disk of memory, which can be filled; False where that is not allowed."""
    command = [MOUNT, "-t", "tmpfs", "-o", "size=64m,nr_inodes=100000", "tmpfs", str(folder)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0
