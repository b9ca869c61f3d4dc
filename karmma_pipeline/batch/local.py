"""Commands side by side on this machine, each with CPUs and GPUs of its own."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from karmma_pipeline.batch.recipe import Resources, Site
from karmma_pipeline.batch.slurm import threads
from karmma_pipeline.errors import ExitCode
from karmma_pipeline.jobs import StopFlag, cpu_count
from karmma_pipeline.jobs.batch_system import ONE_OF_SEVERAL, without

_POLL_INTERVAL_S = 0.2


@dataclass(frozen=True)
class Slot:
    """A place where one command can run: its CPUs, and its GPUs if there are any to share out."""

    cpus: tuple[int, ...]
    devices: tuple[str, ...] | None = None


@dataclass
class LocalCommand:
    """One ``karmma`` command.

    Attributes:
        name: of the command.
        words: after ``karmma``.
        log: file that takes what it says.
        retries: how often it is tried again when it was killed.
        after: names of the commands that must have ended well before it begins.
        gpus: that it sees, as ``CUDA_VISIBLE_DEVICES`` names them; None: those of its place.
    """

    name: str
    words: list[str]
    log: Path
    retries: int
    after: frozenset[str] = frozenset()
    gpus: tuple[str, ...] | None = None
    process: "subprocess.Popen[bytes] | None" = None
    slot: Slot = field(default=Slot(()))
    started: float = 0.0

    @property
    def seconds(self) -> float:
        """How long it has been running."""
        return time.monotonic() - self.started


def devices() -> tuple[str, ...]:
    """Return the GPUs that this process may use, as ``CUDA_VISIBLE_DEVICES`` names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return tuple(name.strip() for name in named.split(",") if name.strip())
    import torch  # takes a second, which only a chain that runs here should cost

    return tuple(map(str, range(torch.cuda.device_count())))


def slots(resources: Resources, most: int, gpus: Sequence[str]) -> Iterator[Slot]:
    """Yield at most so many places; they share no CPU and no GPU if there are enough."""
    mine = sorted(os.sched_getaffinity(0))
    size = min(resources.cpus, len(mine))
    each = min(resources.gpus, len(gpus))
    places = max(1, min(most, cpu_count() // size, len(gpus) // each if each else len(mine)))
    for place in range(places):
        yield Slot(
            tuple(mine[place * size : (place + 1) * size]),
            tuple(gpus[place * each : (place + 1) * each]) if gpus else None,
        )


def run_all(
    commands: Sequence[LocalCommand],
    resources: Resources,
    most: int,
    site: Site,
    stop: StopFlag,
    ended: Callable[[LocalCommand, int], None],
) -> set[str]:
    """Run commands, as many at once as there are places; return the names of those that went well.

    Args:
        commands: in the order in which they begin, as far as what they come after lets them.
        resources: of each.
        most: that run at once.
        site: its environment.
        stop: when to end all.
        ended: told of each command and its exit code; if it raises, the others are ended. A command
            that stopped or was killed is tried again first.

    Raises:
        StoppedError: a stop was asked for; the commands have saved and ended.
    """
    waiting, running, done = list(commands), list[LocalCommand](), set[str]()
    places = list(slots(resources, most, devices()))
    try:
        while waiting or running:
            while places and not stop.requested and (command := _next(waiting, done)):
                waiting.remove(command)
                running.append(_start(command, places.pop(), resources, site))
            if not running and not stop.requested:
                break  # all that is left comes after one that failed
            for command in [command for command in running if _ended(command)]:
                running.remove(command)
                places.append(command.slot)
                code = command.process.returncode if command.process else 0
                if _is_tried_again(command, code):
                    waiting.append(command)
                    continue
                if not code:
                    done.add(command.name)
                ended(command, code)
            if stop.requested:
                _end(running)
                stop.check("each command has saved its progress")
            time.sleep(_POLL_INTERVAL_S)
    finally:
        _end(running)
    return done


def _next(waiting: Sequence[LocalCommand], done: set[str]) -> LocalCommand | None:
    return next((command for command in waiting if command.after <= done), None)


def _is_tried_again(command: LocalCommand, code: int) -> bool:
    """Tell whether a command that has ended is to run again, and count that."""
    # A negative code is the signal that killed it, out of memory perhaps: worth another try, as
    # Slurm would requeue it. A command that saved and stopped is taken up again without counting.
    if code < 0 and command.retries > 0:
        command.retries -= 1
        return True
    return code == ExitCode.STOPPED


def _start(command: LocalCommand, slot: Slot, resources: Resources, site: Site) -> LocalCommand:
    values = {
        "HDF5_USE_FILE_LOCKING": "FALSE",
        "OMP_NUM_THREADS": str(threads(resources, 1)),
        **site.env,
    }
    gpus = slot.devices if command.gpus is None else command.gpus
    if gpus is not None:
        values["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    everything = os.sched_getaffinity(0)
    command.log.parent.mkdir(parents=True, exist_ok=True)
    with command.log.open("ab") as log:
        # A child inherits the affinity of the thread that starts it; a `preexec_fn` would do it in
        # the child, but must not be used in a process with threads.
        os.sched_setaffinity(0, slot.cpus)
        try:
            command.process = subprocess.Popen(
                [sys.executable, "-m", "karmma_pipeline.cli", *command.words],
                # The caller says which part is whose, whatever array or ranks this process is of.
                env={**without(ONE_OF_SEVERAL), **values},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        finally:
            os.sched_setaffinity(0, everything)
    command.slot, command.started = slot, time.monotonic()
    return command


def _ended(command: LocalCommand) -> bool:
    return command.process is not None and command.process.poll() is not None


def _end(running: Sequence[LocalCommand]) -> None:
    """Ask the commands to stop and wait until they have saved."""
    for command in running:
        if command.process and command.process.poll() is None:
            command.process.terminate()
    for command in running:
        if command.process:
            command.process.wait()


def last_line(log: Path) -> str:
    """Return what a log says at its end; progress bars write lines that end in a return."""
    if not log.is_file():
        return ""
    lines = log.read_bytes()[-4096:].decode(errors="replace").replace("\r", "\n").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
