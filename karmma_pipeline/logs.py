"""Log lines and progress bars: a library keeps both to itself, a command shows them.

Modules log through ``logging.getLogger(__name__)``, below the logger ``karmma_pipeline``. Whoever
uses the package from Python sets up logging as for any other library; `show` is for commands.
"""

import io
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from tqdm import tqdm

_PACKAGE = "karmma_pipeline"
# What `progress_bar` draws, if anything; a list, for it is the process's state, not a constant.
_bar_kind: "list[type[tqdm[Any]] | None]" = [None]


class _Console(io.TextIOBase):
    """Whatever stderr is now; a terminal, pipe or disk that is gone or full ends no work.

    stderr is looked up each time, for tests and notebooks replace it. It may be None: closed.
    """

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return getattr(sys.stderr, "encoding", None) or "ascii"

    def write(self, text: str) -> int:
        """Write text; characters that the console's encoding lacks become escapes."""
        safe = text.encode(self.encoding, "backslashreplace").decode(self.encoding)
        self._try(lambda: sys.stderr.write(safe))
        return len(text)

    def flush(self) -> None:
        """Flush what was written."""
        self._try(lambda: sys.stderr.flush())

    def isatty(self) -> bool:
        """Whether somebody watches."""
        return sys.stderr is not None and sys.stderr.isatty()

    def fileno(self) -> int:
        """Return the descriptor, of which tqdm asks the width."""
        return sys.stderr.fileno()

    def _try(self, write: Callable[[], object]) -> None:
        try:
            if sys.stderr is not None:
                write()
        except (OSError, ValueError):
            # What could not be written would be tried again when the interpreter ends, which then
            # would report a failure (120) of a run that has none.
            sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115


CONSOLE = _Console()


class _ConsoleHandler(logging.Handler):
    """Writes each record as a line on stderr, above the progress bars that are drawn there."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record."""
        tqdm.write(self.format(record), file=CONSOLE)


def show() -> None:
    """Show log lines of level INFO and progress bars on stderr, as the ``karmma`` command does.

    A second call changes nothing. Lines are printed as they are, without level or time: run
    folders keep a ``log.txt`` that has both.
    """
    logger = logging.getLogger(_PACKAGE)
    if not any(isinstance(handler, _ConsoleHandler) for handler in logger.handlers):
        logger.addHandler(_ConsoleHandler())
        logger.setLevel(logging.INFO)
    _bar_kind[0] = tqdm


@contextmanager
def bars(shown: bool) -> Iterator[None]:
    """Draw progress bars inside a function of the public API, a notebook's own in a notebook."""
    before = _bar_kind[0]
    if shown:
        from tqdm.auto import tqdm as auto

        _bar_kind[0] = auto
    try:
        yield
    finally:
        _bar_kind[0] = before


def bars_cleared() -> AbstractContextManager[None]:
    """Clear the bars of stderr while something else is printed, which would share their line."""
    return tqdm.external_write_mode(file=CONSOLE)


def progress_bar(*args: Any, **kwargs: Any) -> "tqdm[Any]":
    """Return a `tqdm` bar that draws only in a command, see `show`, or if asked, see `bars`.

    Args:
        *args: tqdm's own: the iterable, the description.
        **kwargs: tqdm's own; ``disable`` says when a command, too, draws no bar.
    """
    kind = _bar_kind[0]
    if kind is None:
        kwargs["disable"] = True
    return (kind or tqdm)(*args, **kwargs | {"file": CONSOLE})
