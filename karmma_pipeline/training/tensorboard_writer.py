"""Curves for TensorBoard, written by the thread that trains.

TensorBoard's own writer has a thread, which on a full disk prints a traceback of its own and
tells the training only later.
"""

import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter


class TensorboardWriter:
    """An event file of one run of a training; a context manager.

    Args:
        folder: of the events of all runs of a training.
        first: step from which on this run's values replace those of runs before.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(self, folder: Path, first: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        host = socket.gethostname()
        name = f"events.out.tfevents.{time.time():.0f}.{host}.{os.getpid()}"
        self._file = (folder / name).open("ab", buffering=0)
        self._records = RecordWriter(self._file)
        self._add(Event(step=first, file_version="brain.Event:2"))
        self._add(Event(step=first, session_log=SessionLog(status=SessionLog.START)))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def write(self, values: Mapping[str, float], step: int) -> None:
        """Add a point to the curve of each value."""
        points = [Summary.Value(tag=key, simple_value=value) for key, value in values.items()]
        self._add(Event(step=step, summary=Summary(value=points)))

    def _add(self, event: Event) -> None:
        event.wall_time = time.time()
        self._records.write(event.SerializeToString())
