"""Stopping: signals set a flag that loops check."""

import multiprocessing
import os
import signal
import threading
from contextlib import suppress
from multiprocessing.connection import wait
from types import FrameType
from typing import Self

from karmma_pipeline.errors import ExitCode, StoppedError

#: With what a terminal, Slurm, PBS, LSF, Grid Engine and a limit of CPU time ask for an end.
STOP_SIGNALS = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGXCPU,
)


class StopFlag:
    """Turns `STOP_SIGNALS` into a flag that loops look at between steps.

    The first SIGINT says so at once; a second one ends the process there and then, which costs no
    more than what was not saved yet. A SIGHUP that is ignored, as under ``nohup``, stays so. Used
    as a context manager in the main thread; elsewhere it only holds the flag.

    Args:
        resumes: whether the command goes on where it stopped if it is run again.
    """

    def __init__(self, resumes: bool = True) -> None:
        self._again = "run the same command again" + (" to resume" if resumes else "")
        self._signal: int | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> Self:
        # Python lets only the main thread set handlers; a flag made elsewhere is set by `request`.
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                    continue
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        # Whoever calls a command from Python gets the handlers back that were there before.
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # A handler runs between any two instructions of the main thread, so it may do no more
        # than set the flag: a lock that it took could be held by the code that it interrupted.
        # os.write takes none.
        if self._signal == signal.SIGINT == number:
            _say(f"stopped immediately; {self._again}.")
            os._exit(ExitCode.STOPPED)
        if number == signal.SIGINT:
            _say("stopping after this batch; press Ctrl-C again to stop now")
        self._signal = number

    def request(self) -> None:
        """Ask for a stop from inside the program."""
        self._signal = self._signal or signal.SIGTERM

    @property
    def requested(self) -> bool:
        """Whether a stop was asked for."""
        return self._signal is not None

    def check(self, saved: str) -> None:
        """Raise StoppedError if a stop was asked for; ``saved`` says what is safe."""
        if self._signal is not None:
            name = signal.Signals(self._signal).name
            raise StoppedError(f"stopped by {name}: {saved}; {self._again}.")


def _say(line: str) -> None:
    with suppress(OSError):  # the terminal may be gone
        os.write(2, f"\n{line}\n".encode())


def become_worker() -> None:
    """Leave the stop signals to the main process, and end when that is gone.

    A parent killed with SIGKILL cannot notify its workers: they would wait for ever.
    """
    # Ctrl-C and a batch system's warning reach every process of the job. A worker that died of one
    # would take the clip in its hands with it, and the parent would blame the clip. SIGXCPU alone
    # still ends it: with it the kernel enforces the CPU seconds of a clip, and does not insist.
    for number in STOP_SIGNALS:
        ends = number == signal.SIGXCPU
        signal.signal(number, signal.SIG_DFL if ends else signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)  # see `processes`
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=[parent.sentinel], daemon=True).start()


def _end_with(sentinel: int) -> None:
    # The sentinel becomes readable when the parent's end of a pipe closes, which the kernel does
    # for a killed process too. PR_SET_PDEATHSIG would follow the *thread* that started the worker,
    # and end workers whose parent is alive. os._exit: nothing of a worker is worth cleaning up,
    # and the main thread may hang inside a decoder.
    wait([sentinel])
    os._exit(1)
