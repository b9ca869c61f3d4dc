"""Files that carry their own SHA-256, so that a flipped or missing byte is always noticed."""

import hashlib
from pathlib import Path

from karmma_pipeline import files
from karmma_pipeline.errors import CheckpointError

_DIGEST_BYTES = 32


def write(path: Path, data: bytes) -> None:
    """Write data durably with its digest in front, or leave the old file."""
    files.write_bytes(path, hashlib.sha256(data).digest() + data)


def read(path: Path) -> memoryview:
    """Return the data of a sealed file.

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
