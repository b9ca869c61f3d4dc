"""Log lines and progress bars: a library keeps both to itself, a command shows them.

Modules log through ``logging.getLogger(__name__)``, below the logger ``karmma_pipeline``. Whoever
uses the package from Python sets up logging as for any other library; `show` is for commands.
"""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

_PACKAGE = "karmma_pipeline"
# What `progress_bar` draws, if anything; a list, for it is the process's state, not a constant.
_bar_kind: "list[type[tqdm[Any]] | None]" = [None]


class _ConsoleHandler(logging.Handler):
    """Writes each record as a line on stderr, above the progress bars that are drawn there."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record; stderr is looked up each time, for tests and notebooks replace it."""
        try:
            tqdm.write(self.format(record), file=sys.stderr)
        except (OSError, ValueError):
            # The terminal or the pipe behind it is gone: that must not end hours of work.
            return


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


def progress_bar(*args: Any, **kwargs: Any) -> "tqdm[Any]":
    """Return a `tqdm` bar that draws only in a command, see `show`, or if asked, see `bars`.

    Args:
        *args: tqdm's own: the iterable, the description.
        **kwargs: tqdm's own; ``disable`` says when a command, too, draws no bar.
    """
    kind = _bar_kind[0]
    if kind is None:
        kwargs["disable"] = True
    return (kind or tqdm)(*args, **kwargs)
