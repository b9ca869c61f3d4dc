"""Stores and runs in which the old program was killed, and which the new one finishes."""

import json
import os
import shutil
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from equivalence.compare import compare
from equivalence.program import FailedError, Kill, Side, alone
from equivalence.work import HANDED, Step


@dataclass(frozen=True)
class Handover:
    """One kill: at a share of the calls that the old program's undisturbed step made."""

    step: Step
    share: float
    old: Side
    new: Side

    @property
    def name(self) -> str:
        """What is printed of it."""
        return f"{self.step.name} killed at {self.share:.3f} of its calls"

    def do(self) -> None:
        """Kill the old program, unless that was done, and let the new one go on in a copy."""
        half = self.old.folder / "killed" / f"{self.step.name}-{self.share:.3f}"
        with alone(half.with_name(f"{half.name}.lock")):
            if not (half / "killed.json").is_file():
                self._kill(half)
        shutil.copytree(half, self._folder)
        self._link(self._folder)
        log = self._folder / "log.txt"
        codes = [self.new.program.run(c, self._folder, log) for c in self.step.commands]
        (self._folder / "codes.json").write_text(json.dumps(codes))

    def differences(self) -> list[str]:
        """Return how the end differs from the old program's undisturbed one."""
        lines = compare(self.old.folder, self._folder, self.step.writes, killed=True)
        codes = json.loads((self._folder / "codes.json").read_text())
        if codes != self.old.codes(self.step):
            lines.append(f"exit codes were {self.old.codes(self.step)} and are {codes}")
        return lines

    @property
    def _folder(self) -> Path:
        return self.new.folder / "handed" / f"{self.step.name}-{self.share:.3f}"

    def _kill(self, half: Path) -> None:
        shutil.rmtree(half, ignore_errors=True)
        self._link(half)
        at = max(1, round(self.share * self.old.count(self.step)))
        kill = Kill(half / self.step.writes, at)
        code = self.old.program.run(self.step.commands[0], half, half / "log.txt", kill)
        if code != -signal.SIGKILL:
            raise FailedError(f"{self.name}: it ended with {code} instead; see {half / 'log.txt'}.")
        for part in ("inputs", "recipes", *self.step.reads):
            shutil.rmtree(half / part)
        (half / "killed.json").write_text(json.dumps(kill.made[at - 1 : at]))

    def _link(self, folder: Path) -> None:
        """Put what the step reads into a folder; nothing is ever written into it."""
        for part in ("inputs", "recipes", *self.step.reads):
            source = self.old.folder / part
            shutil.copytree(source, folder / part, copy_function=os.link, dirs_exist_ok=True)


def handovers(chosen: Sequence[Step], old: Side, new: Side, count: int) -> list[Handover]:
    """Share out so many kills among the steps, and evenly over the calls of each."""
    steps = {step.name: step for step in chosen}
    names = [name for name in HANDED if name in steps]
    found = []
    for place, name in enumerate(names):
        kills = len(range(place, count, len(names)))
        found += [Handover(steps[name], (i + 0.5) / kills, old, new) for i in range(kills)]
    return found
