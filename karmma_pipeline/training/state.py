"""The training state on disk: two newest kept, written whole, the newest that verifies is used."""

import hashlib
import io
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

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
        raise CheckpointError(f"{path}: the file is damaged, its digest does not match.")
    return data


KEEP = 2
"""Two, because the newest may be the one that was hurt."""

VERSION = 1


def save_state(folder: Path, step: int, state: Mapping[str, Any]) -> None:
    """Write the state after a step, and drop the oldest."""
    buffer = io.BytesIO()
    torch.save({"version": VERSION, **state}, buffer)
    write_checksummed(folder / f"{step:09d}.pt", buffer.getvalue())
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
            f"{folder}: no training state can be used: {' '.join(faults)} Put back a copy of one, "
            f"or remove {folder} to train from the first step over what is in {folder.parent}."
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
            f"{path}: is no training state of ours; it holds more than tensors and numbers, "
            f"or is cut, and was not run ({reason})."
        ) from None
    if not isinstance(state, dict) or state.get("version") != VERSION:
        raise CheckpointError(f"{path}: is no training state of this version ({VERSION}).")
    return state


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.pt"), reverse=True)
