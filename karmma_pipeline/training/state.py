"""What a training keeps in its folder beside models: its states, and curves for TensorBoard.

Two newest states are kept, each written as a whole, and the newest that verifies is used.
"""

import hashlib
import io
import os
import pickle
import socket
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from karmma_pipeline import files
from karmma_pipeline.errors import CheckpointError

_DIGEST_BYTES = 32


def write_checksummed(path: Path, data: bytes) -> None:
    """Write data durably with its checksum in front, or leave the old file."""
    files.write_bytes(path, hashlib.sha256(data).digest() + data)


def read_checksummed(path: Path) -> memoryview:
    """Return the data of a file that `write_checksummed` wrote.

    Raises:
        CheckpointError: it is missing, cut or changed.
    """
    try:
        content = memoryview(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}).") from None
    data = content[_DIGEST_BYTES:]
    if len(content) <= _DIGEST_BYTES or hashlib.sha256(data).digest() != content[:_DIGEST_BYTES]:
        raise CheckpointError(f"{path}: the file is damaged (checksum mismatch).")
    return data


#: Two, because the newest may be the one that was hurt.
KEEP = 2

VERSION = 1


def save_state(folder: Path, step: int, state: Mapping[str, Any]) -> None:
    """Write the state after a step, and drop the oldest."""
    buffer = io.BytesIO()
    torch.save({"version": VERSION, **state}, buffer)
    write_checksummed(folder / f"{step:09d}.pt", buffer.getvalue())
    # Only now: a kill before this line leaves one state too many, never one too few.
    for old in _newest_first(folder)[KEEP:]:
        old.unlink()


def load_state(folder: Path) -> tuple[dict[str, Any] | None, list[str]]:
    """Return the newest state that can be used, and why newer ones cannot; never runs code.

    Raises:
        CheckpointError: there are states and none can be used.
    """
    faults: list[str] = []
    for path in _newest_first(folder):
        try:
            return _read(path), faults
        except CheckpointError as error:
            faults.append(str(error))
    if faults:
        raise CheckpointError(
            f"{folder}: no usable training state: {' '.join(faults)} Restore a copy, or remove "
            f"{folder} to restart the training, which overwrites {folder.parent}."
        )
    return None, faults


def _read(path: Path) -> dict[str, Any]:
    data = io.BytesIO(read_checksummed(path))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of pickles that it did not write
            state = torch.load(data, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0][:120]
        raise CheckpointError(
            f"{path}: not a training state: it is truncated or contains more than tensors and "
            f"numbers, and was not loaded ({reason})."
        ) from None
    if not isinstance(state, dict) or state.get("version") != VERSION:
        raise CheckpointError(f"{path}: not a training state of this version ({VERSION}).")
    return state


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.pt"), reverse=True)


class TensorboardWriter:
    """Curves for TensorBoard, an event file of one start of a training; a context manager.

    TensorBoard's own writer has a thread, which on a full disk prints a traceback of its own and
    tells the training only later. This one writes from the thread that trains.

    Args:
        folder: of the events of all runs of a training.
        first: step from which on this run's values replace those of runs before.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(self, folder: Path, first: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        host = socket.gethostname()
        # TensorBoard reads files in the order of their names and drops what comes before what it
        # has read. The clock of this machine may be behind that of the one before.
        stamp = max([int(time.time()), *(s + 1 for s in map(_stamp, folder.iterdir()))])
        self._ahead_s = max(0.0, stamp - time.time())
        name = f"events.out.tfevents.{stamp}.{host}.{os.getpid()}"
        self._file = (folder / name).open("ab", buffering=0)
        self._records = RecordWriter(self._file)
        self._add(Event(step=first, file_version="brain.Event:2"))
        self._add(Event(step=first, session_log=SessionLog(status=SessionLog.START)))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, values: Mapping[str, Any], step: int) -> None:
        """Add a point to the curve of each value that is a number."""
        numbers = {k: v for k, v in values.items() if isinstance(v, int | float)}
        points = [Summary.Value(tag=key, simple_value=value) for key, value in numbers.items()]
        self._add(Event(step=step, summary=Summary(value=points)))

    def _add(self, event: Event) -> None:
        event.wall_time = time.time() + self._ahead_s
        self._records.write(event.SerializeToString())


def _stamp(events: Path) -> int:
    """Return the time in the name of an events file, s."""
    words = events.name.split(".")
    return int(words[3]) if len(words) > 3 and words[3].isdecimal() else 0
