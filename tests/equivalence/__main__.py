"""Lets an older program and this one do the same work, and compares all that they write.

    PYTHONPATH=tests python -m equivalence                          # against revision 8f5794a
    PYTHONPATH=tests python -m equivalence FOLDER --cache /tmp/net  # against a checkout

Demo clips, odd files, two sets in one pass, RAFT, a network of one's own, one process and three,
one part and three; then all trainings and an evaluation. Stores and runs in which the older
program was killed are finished by this one. rules.py lists what may differ; anything else is
printed, and makes the exit code 1.
"""

import argparse
import shutil
import signal
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from equivalence.compare import compare, count
from equivalence.handover import Handover, handovers
from equivalence.inputs import digest, write_inputs
from equivalence.program import HERE, FailedError, Program, Schedule, Side, alone, checkout
from equivalence.work import Step, steps
from faults.calls import build


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser("equivalence", description=__doc__.splitlines()[0])
    parser.add_argument("old", nargs="?", default="8f5794a", help="revision, or a checkout")
    parser.add_argument("--media", type=Path, help="folder with more clips")
    parser.add_argument("--handover", type=int, default=4, metavar="N", help="so many are killed")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="keeps what the old program made")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="compare these steps only")
    parser.add_argument("--jobs", type=int, default=2, help="commands that run at once")
    return parser.parse_args()


def main() -> int:
    """Do the work twice and compare."""
    options = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that nothing is left running
    try:
        with checkout(options.old) as old, tempfile.TemporaryDirectory() as name:
            return net(options, old, options.cache or Path(name), Path(name) / "library")
    except FailedError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2


def net(options: argparse.Namespace, old_tree: Path, folder: Path, library: Path) -> int:
    """Do in a folder what the old program has not done there, then the new one's, and compare."""
    began = time.monotonic()
    library.mkdir()
    old, new = Program(old_tree, build(library)), Program(HERE)
    if not old.built and options.handover:
        raise FailedError("there is no C compiler, and so no kill: give --handover 0.")
    for program in (old, new):
        program.check()
    folder.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix="new-", dir=folder.resolve()))
    new = new.copied(fresh / "program")
    kept = folder.resolve() / f"{old.digest()}-{digest(options.media)}"
    with alone(kept / "lock"):
        if not (kept / "recipes/report.yaml").is_file():
            write_inputs(kept, options.media)
    for part in ("inputs", "recipes"):
        shutil.copytree(kept / part, fresh / part)
    sides = Side(old, kept, calls=bool(old.built)), Side(new, fresh)
    chosen = _chosen(steps(options.media is not None), options.only)
    handed = handovers(chosen, *sides, options.handover)
    schedule = Schedule(options.jobs)
    for step in chosen:
        for label, side in zip(("old", "new"), sides, strict=True):
            needs = [f"{label} {s.name}" for s in chosen if s.writes in step.reads]
            schedule.add(f"{label} {step.name}", partial(side.do, step), needs)
    for one in handed:
        schedule.add(one.name, one.do, [f"old {one.step.name}"])
    schedule.wait()
    code = report(sides, chosen, handed, began)
    if code and options.cache:
        print(f"old: {kept}\nnew: {fresh}")
    else:
        shutil.rmtree(fresh)
    return code


def report(
    sides: tuple[Side, Side], chosen: list[Step], handed: list[Handover], began: float
) -> int:
    """Print what differs, and return the exit code."""
    old, new = sides
    differences, files = 0, 0
    for step in chosen:
        lines = compare(old.folder, new.folder, step.writes)
        if old.codes(step) != new.codes(step):
            lines.append(f"exit codes were {old.codes(step)} and are {new.codes(step)}")
            lines += new.said(step)
        differences += _told(step.name, lines)
        files += count(old.folder, step.writes)
    for one in handed:
        differences += _told(one.name, one.differences())
    minutes = (time.monotonic() - began) / 60
    print(
        f"{len(chosen)} steps of {files} files and {len(handed)} handovers: "
        f"{differences} differences ({minutes:.1f} min)"
    )
    return 1 if differences else 0


def _told(name: str, lines: list[str]) -> int:
    print(f"{name}: {len(lines) or 'no'} differences", flush=True)
    for line in lines:
        print(f"    {line}", flush=True)
    return len(lines)


def _chosen(all_steps: list[Step], only: list[str] | None) -> list[Step]:
    """Return the steps that are asked for, and those that they read from."""
    wanted = set(only or [step.name for step in all_steps])
    if unknown := wanted - {step.name for step in all_steps}:
        raise FailedError(f"--only: {min(unknown)} is no step.")
    for step in reversed(all_steps):
        if step.name in wanted:
            wanted |= {other.name for other in all_steps if other.writes in step.reads}
    return [step for step in all_steps if step.name in wanted]


if __name__ == "__main__":
    raise SystemExit(main())
