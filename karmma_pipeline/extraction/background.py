"""Threads beside the networks of an extraction: one prefetches, one writes.

Both are daemons: should the interpreter end without leaving the ``with`` (a second Ctrl-C), it
does not wait for a thread that waits for a decoder. What was appended to a store until then
counts, as after a kill.
"""

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, Self, TypeVar

T = TypeVar("T")

_POLL_INTERVAL_S = 0.2
"""How often a thread that cannot hand over an item looks whether anybody still wants it."""


class Prefetcher(Generic[T]):
    """Runs an iterable in a thread, at most ``depth`` items ahead of whoever iterates over it.

    A context manager; an error of the iterable is raised where it is iterated over.
    """

    def __init__(self, source: Iterable[T], depth: int = 1) -> None:
        self._source = source
        # None is the end, whether the source is exhausted or has failed.
        self._queue: queue.Queue[T | None] = queue.Queue(depth)
        self._closed = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._thread.join()

    def __iter__(self) -> Iterator[T]:
        while (item := self._queue.get()) is not None:
            yield item
        if self._error:
            raise self._error

    def _run(self) -> None:
        try:
            for item in self._source:
                if not self._put(item):
                    return
        except BaseException as error:
            self._error = error
        self._put(None)

    def _put(self, item: T | None) -> bool:
        """Hand over an item; False if nobody will come for it.

        A put without a timeout would wait for ever for a consumer that has left with an error,
        and `__exit__` for this thread.
        """
        while not self._closed.is_set():
            try:
                self._queue.put(item, timeout=_POLL_INTERVAL_S)
            except queue.Full:
                continue
            return True
        return False


class BackgroundWriter(Generic[T]):
    """Hands items to a function that runs in a thread, in order, at most ``depth`` behind.

    A context manager; leaving it without an error waits until all items are done. An error of
    the function is raised from `put`, or on leaving.
    """

    def __init__(self, write: Callable[[T], None], depth: int = 2) -> None:
        self._write = write
        self._queue: queue.Queue[T | None] = queue.Queue(depth)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        # Also after an error: what the networks have computed is written, not lost.
        self._queue.put(None)
        self._thread.join()
        if self._error and kind is None:
            raise self._error

    def put(self, item: T) -> None:
        """Hand over one item; waits while the function is too far behind."""
        if self._error:
            raise self._error
        self._queue.put(item)

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            # After an error the queue is still emptied, or `put` would wait for ever for room.
            if self._error is None:
                try:
                    self._write(item)
                except BaseException as error:
                    self._error = error
