"""Kills and failing calls while a store is written, staged and rewritten; by hand, for long.

    python tests/faults/store.py --seconds 60

Each trial runs one of the store's writers in a process of its own and breaks it: SIGKILL at a
random moment, or with strace an error or a SIGKILL exactly at the n-th rename, fsync, write or
link; with root also on a full disk and one without inodes. Then the same command runs
undisturbed. It must end with the same bytes as a run that nothing disturbed, and until then
the store must say that it is not complete. Needs nothing but Python; strace where it is there.
"""

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve()
CALLS = ("rename,renameat,renameat2", "fsync", "write", "link,linkat", "openat", "ftruncate")
ERRORS = ("ENOSPC", "EIO", "EDQUOT", "EROFS")
MOUNT, UMOUNT = (shutil.which(name) or name for name in ("mount", "umount"))
WORK = ("write", "convert", "stage")


def work(name: str, folder: Path) -> None:
    """Do one of the jobs; run again, it goes on."""
    sys.path[:0] = [str(HERE.parents[2]), str(HERE.parents[1])]
    from support.any_store import IDS, fill_store

    from karmma_pipeline.data.store import stage
    from karmma_pipeline.data.store.rewrite import convert
    from karmma_pipeline.errors import KarmmaError

    shapes = {"rgb": (16, 512), "audio": (4, 64)}
    try:
        if name == "write":
            fill_store(folder / "out", IDS, shapes, dtype="int8", per_shard=5)
        elif name == "convert":
            convert(folder / "in", folder / "out", "int8")
        else:
            (folder / "out").mkdir(exist_ok=True)
            place = stage(folder / "in", folder / "staged")
            shutil.copytree(place, folder / "out", dirs_exist_ok=True)
    except KarmmaError as error:
        print(error, file=sys.stderr)
        raise SystemExit(1) from None


def prepare(name: str, folder: Path) -> None:
    """Make what the job reads."""
    sys.path[:0] = [str(HERE.parents[2]), str(HERE.parents[1])]
    from support.any_store import IDS, fill_store

    if name != "write":
        fill_store(folder / "in", IDS, {"rgb": (16, 512), "audio": (4, 64)}, per_shard=5)


def tree(root: Path) -> dict[str, bytes]:
    """Return a store's files but for what `karmma store gc` takes away."""
    found = {}
    for path in root.rglob("*"):
        if path.is_file() and path.suffix != ".tmp" and "spool" not in path.parts:
            found[str(path.relative_to(root))] = path.read_bytes()
    return found


@dataclass(frozen=True)
class Outcome:
    """How a disturbed run ended."""

    fault: str
    code: int
    stderr: str


def command(name: str, folder: Path) -> list[str]:
    """Return the command of a job."""
    return [sys.executable, str(HERE), "--work", name, str(folder)]


def run(words: list[str], **options: object) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    return subprocess.run(words, capture_output=True, text=True, **options)  # type: ignore[call-overload]


def killed(name: str, folder: Path, seconds: float, rng: random.Random) -> Outcome:
    """Kill the job at a random moment."""
    with subprocess.Popen(command(name, folder), stderr=subprocess.DEVNULL) as process:
        try:
            code = process.wait(seconds * rng.uniform(0.3, 1.0))
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
    return Outcome("SIGKILL at a random moment", code, "")


def injected(name: str, folder: Path, seconds: float, rng: random.Random) -> Outcome:
    """Let the n-th call of a kind on the job's folder fail, or kill the job there."""
    calls = rng.choice(CALLS)
    how = rng.choice(["signal=KILL", *(f"error={e}" for e in ERRORS)])
    number = rng.randint(1, 60)
    inject = f"inject={calls}:{how}:when={number}"
    # only calls on files of the job: those before the interpreter has started are not ours
    strace = ["strace", "-f", "-qq", "-o", os.devnull, "-e", f"trace={calls}", "-e", inject]
    paths = [w for p in sorted(folder.rglob("*"))[:200] for w in ("-P", str(p))]
    done = run([*strace, "-P", str(folder / "out"), *paths, *command(name, folder)])
    return Outcome(f"{calls.split(',')[0]} {how.split('=')[0]}", done.returncode, done.stderr)


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[None]:
    """Mount a small tmpfs; needs root."""
    folder.mkdir(exist_ok=True)
    subprocess.run([MOUNT, "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run([UMOUNT, "-l", str(folder)], check=True)


def full_disk(name: str, folder: Path, seconds: float, rng: random.Random) -> Outcome:
    """Run the job on a disk that fills up, then give it room and move what it left."""
    options = rng.choice([f"size={rng.randint(8, 400)}k", f"nr_inodes={rng.randint(8, 60)}"])
    small = folder / "small"
    with mounted(small, options):
        if name != "write":
            (small / "in").symlink_to(folder / "in")
        done = run(command(name, small))
        for left in ("out", "staged"):
            if (small / left).is_dir():
                shutil.copytree(small / left, folder / left)
    return Outcome(f"full disk ({options.split('=')[0]})", done.returncode, done.stderr)


def judge(outcome: Outcome) -> str:
    """Return what is wrong with the end of a disturbed run."""
    if outcome.code == 1 and "Traceback" in outcome.stderr and "full disk" in outcome.fault:
        return f"a traceback: {outcome.stderr[-1500:]}"
    return ""


def trial(
    name: str,
    wanted: dict[str, bytes],
    seconds: float,
    fault: Callable[[str, Path, float, random.Random], Outcome],
    rng: random.Random,
    base: Path,
) -> Outcome:
    """Disturb a job twice, then let it finish and compare."""
    folder = Path(tempfile.mkdtemp(dir=base))
    try:
        prepare(name, folder)
        outcome = fault(name, folder, seconds, rng)
        wrong = judge(outcome)
        complete = (folder / "out" / "manifest.json").is_file()
        if complete and name != "stage" and tree(folder / "out") != wanted:
            wrong = wrong or "it says that it is complete and is not the same"
        done = run(command(name, folder))
        if done.returncode:
            wrong = wrong or f"the same command again failed: {done.stderr[-1500:]}"
        elif tree(folder / "out") != wanted:
            wrong = wrong or "the bytes differ"
        if wrong:
            raise SystemExit(f"{name}: {outcome.fault}: {wrong}")
        return outcome
    finally:
        shutil.rmtree(folder)


def main() -> None:
    """Disturb jobs for some seconds and print how the runs ended."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60, help="for how long")
    parser.add_argument("--seed", type=int, default=None, help="of the faults")
    parser.add_argument("--work", nargs=2, metavar=("JOB", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options.work[0], Path(options.work[1]))
        return
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(10**6)
    rng = random.Random(seed)
    faults = [killed]
    if shutil.which("strace"):
        faults.append(injected)
    else:
        print("no strace: calls are not made to fail", file=sys.stderr)
    if os.geteuid() == 0 and shutil.which("mount"):
        faults.append(full_disk)
    else:
        print("not root: no disk is filled", file=sys.stderr)
    print(f"seed {seed}")
    ended: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as place:
        base = Path(place)
        wanted, lengths = {}, {}
        for name in WORK:
            folder = base / f"whole_{name}"
            folder.mkdir()
            prepare(name, folder)
            started = time.monotonic()
            run(command(name, folder), check=True)
            lengths[name] = time.monotonic() - started
            wanted[name] = tree(folder / "out")
        until = time.monotonic() + options.seconds
        while time.monotonic() < until:
            name, fault = rng.choice(WORK), rng.choice(faults)
            outcome = trial(name, wanted[name], lengths[name], fault, rng, base)
            ended[f"{name}: {outcome.fault}: exit {outcome.code}"] += 1
    for line, count in sorted(ended.items()):
        print(f"{count:4} {line}")
    print(f"{ended.total()} trials: byte-identical after each")


if __name__ == "__main__":
    main()
