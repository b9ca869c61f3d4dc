"""Hurts karmma's commands at every call that touches the disk, and at random moments.

    PYTHONPATH=tests python -m faults                          # a minute of everything
    PYTHONPATH=tests python -m faults --sweep --only extract   # every call: killed, and failing
    PYTHONPATH=tests python -m faults --kills 100 --only extract train-teacher

Whatever is done to it, a command must end with success, one clear sentence or the signal, must
not have lost what was saved, and run again must end with the bytes of an undisturbed run. Each
defect is printed with the options that repeat it, and makes the exit code 1.
"""

import argparse
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from faults.calls import FAULTS, Calls, build

if TYPE_CHECKING:
    from faults.trials import Trials

FOLDER = "KARMMA_FAULTS_FOLDER"
_TELL_S = 30.0
SCENARIOS = ("extract", "train-teacher", "distill", "evaluate", "convert", "stage")


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser("faults", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=None, help="no longer than that")
    parser.add_argument("--kills", type=int, default=0, help="so many random moments instead")
    parser.add_argument("--sweep", action="store_true", help="every call once instead")
    parser.add_argument("--part", default="1/1", metavar="I/N", help="every N-th call of a sweep")
    parser.add_argument("--call", type=int, nargs="+", help="of a sweep these calls only")
    parser.add_argument("--list", action="store_true", help="print the calls and do nothing")
    parser.add_argument("--fault", choices=FAULTS, nargs="+", help="of a sweep all these faults")
    parser.add_argument("--only", nargs="+", choices=SCENARIOS, default=SCENARIOS)
    parser.add_argument("--seed", type=int, default=None, help="of what is chosen by chance")
    return parser.parse_args()


def main() -> int:
    """Build the library that makes calls fail, and begin again with it preloaded."""
    options = parse()
    if FOLDER in os.environ:
        return hurt_all(options, Path(os.environ[FOLDER]))
    with tempfile.TemporaryDirectory() as name:
        again = {FOLDER: name, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        command = [sys.executable, "-m", "faults", *sys.argv[1:]]
        environment = {**os.environ, **again, **build(Path(name))}
        return subprocess.run(command, env=environment, check=False).returncode


def hurt_all(options: argparse.Namespace, folder: Path) -> int:
    """Hurt the scenarios as asked, print how that went, and return the exit code."""
    from faults.scenarios import warm
    from faults.trials import Trials

    began = time.monotonic()
    calls = Calls.preloaded()
    if calls is None:
        print("no C compiler: no call is made to fail", file=sys.stderr)
    warm()
    with ExitStack() as stack:
        trials = []
        for name in options.only:
            one = Trials(name, folder / name, calls)
            stack.callback(one.close)
            trials.append(one)
            print(f"{name}: {len(one.made)} calls change files", flush=True)
            for number, call in enumerate(one.made if options.list else [], start=1):
                print(f"{number:5} {call}")
        return 0 if options.list else _hurt(options, trials, began)


def _hurt(options: argparse.Namespace, trials: "Sequence[Trials]", began: float) -> int:
    from faults.schedule import schedule
    from faults.trials import DefectError

    seed = random.SystemRandom().randrange(10**6) if options.seed is None else options.seed
    defects, ended, told = 0, Counter[str](), began
    chosen = options.sweep or options.kills or options.call
    limit = options.seconds or (math.inf if chosen else 60)
    for one, again, hurt in schedule(options, trials, random.Random(seed)):
        now = time.monotonic()
        if now - began > limit:
            print(f"out of time before {one.name} ({again})")
            break
        if now - told > _TELL_S:
            print(f"{ended.total()} trials until now, next {one.name} ({again})", flush=True)
            told = now
        try:
            ended[f"{one.name}: {hurt()}"] += 1
        except DefectError as defect:
            defects += 1
            print(f"DEFECT {one.name} ({again}): {defect}\n", flush=True)
    for line, count in sorted(ended.items()):
        print(f"{count:5} {line}")
    print(f"{ended.total()} trials ended with the same bytes, {defects} did not")
    print(f"seed {seed}, {time.monotonic() - began:.0f} s")
    return 1 if defects else 0


if __name__ == "__main__":
    raise SystemExit(main())
