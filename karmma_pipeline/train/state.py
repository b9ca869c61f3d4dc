"""The training state on disk: two newest kept, written whole, the newest that verifies is used."""

import hashlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from karmma_pipeline import files

KEEP = 2
_DIGEST_BYTES = 32


def save_state(folder: Path, step: int, state: Mapping[str, Any]) -> None:
    """Write the state after a step, with its digest before it, and drop the oldest."""
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    data = buffer.getvalue()
    files.write_bytes(folder / f"{step:09d}.pt", hashlib.sha256(data).digest() + data)
    for old in _newest_first(folder)[KEEP:]:
        old.unlink()


def load_state(folder: Path) -> dict[str, Any] | None:
    """Return the newest state that is whole, None if there is none; never runs code."""
    for path in _newest_first(folder):
        data = path.read_bytes()
        if hashlib.sha256(data[_DIGEST_BYTES:]).digest() == data[:_DIGEST_BYTES]:
            state: dict[str, Any] = torch.load(
                io.BytesIO(data[_DIGEST_BYTES:]), map_location="cpu", weights_only=True
            )
            return state
    return None


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.pt"), reverse=True)
