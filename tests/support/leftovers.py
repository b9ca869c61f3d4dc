"""What processes that were killed leave behind."""

import socket
from pathlib import Path

_NO_PROCESS = 999_999_999


def leave(path: Path) -> Path:
    """Leave what `files.replacing` would, had its process been killed while it wrote a path."""
    name = f".{path.name}.{socket.gethostname()}.{_NO_PROCESS}.abcdefgh.tmp"
    left = path.with_name(name)
    left.write_bytes(b"half")
    return left
