"""Which part of the work is mine, and when to stop: what a batch system tells a process."""

import os
import signal
import threading
from dataclasses import dataclass
from types import FrameType
from typing import Self

from karmma_pipeline.errors import ConfigError, StoppedError

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@dataclass(frozen=True)
class Part:
    """Part ``index`` (from 0) of ``count`` equal parts of the work."""

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ConfigError(
                f"part={self.index + 1}/{self.count}: the part must lie in 1..{self.count}."
            )

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``i/n`` with i from 1 to n, as a person counts."""
        try:
            index, count = (int(x) for x in text.split("/"))
        except ValueError:
            raise ConfigError(
                f"part={text!r}: write i/n with i from 1 to n, such as 1/4."
            ) from None
        return cls(index - 1, count)

    @classmethod
    def from_environment(cls) -> Self:
        """Read Slurm's array variables; without them, the whole work is one part."""
        if "SLURM_ARRAY_TASK_ID" not in os.environ:
            return cls()
        first = int(os.environ.get("SLURM_ARRAY_TASK_MIN", "0"))
        step = int(os.environ.get("SLURM_ARRAY_TASK_STEP") or 1)
        count = int(os.environ["SLURM_ARRAY_TASK_COUNT"])
        return cls((int(os.environ["SLURM_ARRAY_TASK_ID"]) - first) // step, count)

    def owns(self, item: int) -> bool:
        """Tell whether item number ``item`` belongs to this part."""
        return item % self.count == self.index


class StopFlag:
    """Turns SIGINT, SIGTERM and SIGUSR1 into a flag that loops look at between steps.

    A second SIGINT interrupts at once. Used as a context manager in the main thread;
    elsewhere it only holds the flag.
    """

    def __init__(self) -> None:
        self._signal: int | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._signal == signal.SIGINT == number:
            raise KeyboardInterrupt
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
            raise StoppedError(f"stopped by {name}: {saved}; run the same command again to go on.")


def cpu_count() -> int:
    """Return how many CPUs this job may use (its affinity, not the machine's size)."""
    return len(os.sched_getaffinity(0))
