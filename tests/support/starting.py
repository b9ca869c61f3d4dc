"""A process that never comes further than to what it is told as it starts."""

import signal
import threading
from pathlib import Path


class Started:
    """Unpickled in a process, it writes that one's blocked signals into a file, and waits."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return _started, (self.path,)


def _started(path: Path) -> None:
    path.with_suffix(".part").write_text(" ".join(map(str, blocked())))
    path.with_suffix(".part").rename(path)
    threading.Event().wait()


def blocked() -> list[int]:
    """Return the signals that the calling thread blocks."""
    return sorted(map(int, signal.pthread_sigmask(signal.SIG_BLOCK, [])))


def ignored() -> list[int]:
    """Return the signals that this process ignores."""
    return sorted(n for n in signal.valid_signals() if signal.getsignal(n) == signal.SIG_IGN)
