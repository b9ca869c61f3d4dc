"""Compressed copies of stores, which older programs wrote: read here, and no longer written.

The tree is that of the store, each file as zstd frames of at most 4 MB, which ``zstd -d`` reads
too. Today ``tar --zstd`` packs a store: it is as small, and every system has it.
"""

import hashlib
import os
from pathlib import Path

import numpy as np

from karmma_pipeline import files
from karmma_pipeline.errors import StoreError
from karmma_pipeline.jobs import StopFlag
from karmma_pipeline.logs import progress_bar
from karmma_pipeline.store.format import paths
from karmma_pipeline.store.tools.stage import check_space

LIST = "archive.json"
_PIECE = 4 << 20
_SKIP = b"\x50\x2a\x4d\x18\x04\x00\x00\x00"
"""A skippable zstd frame of four bytes, which hold the length of the next frame."""


def decompress(archive: Path, out: Path, stop: StopFlag | None = None) -> None:
    """Write the store that an archive was made of; every byte is checked.

    Raises:
        StoreError: the archive is damaged, or there is not the space.
        StoppedError: a stop was asked for; run again to go on.
    """
    stop = stop or StopFlag()
    try:
        listed = paths.read_json(archive, archive / LIST)["files"]
        sizes = {name: int(one["bytes"]) for name, one in listed.items()}
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise StoreError(f"{archive / LIST}: no archive, or damaged ({error}).") from None
    for name in sizes:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise StoreError(f"{archive / LIST}: {name!r} leads out of the store.")
    out.mkdir(parents=True, exist_ok=True)
    check_space(out, sum(sizes.values()), 4 * len(sizes))
    for name, size in progress_bar(sizes.items(), "decompress", unit="file"):
        stop.check("the files that are there are kept")
        target = out / name
        if not (target.is_file() and files.sha256(target) == listed[name]["sha256"]):
            _decompress_file(archive, archive / f"{name}.zst", target, size, listed[name]["sha256"])


def is_archive(folder: Path) -> bool:
    """Tell whether a folder is a compressed copy."""
    return (folder / LIST).is_file()


def _decompress_file(archive: Path, source: Path, target: Path, size: int, sha: str) -> None:
    digest, left = hashlib.sha256(), size
    with (
        os.fdopen(paths.open_inside(archive, source), "rb") as file,
        files.replacing(target) as temporary,
        temporary.open("wb") as out,
    ):
        while head := file.read(len(_SKIP) + 4):
            length = int.from_bytes(head[-4:], "little")
            if head[:-4] != _SKIP or length > 2 * _PIECE:
                raise StoreError(f"{source}: the archive is damaged.")
            data = _decode(file.read(length), min(_PIECE, left), source)
            digest.update(data)
            left -= len(data)
            out.write(data)
        if left or digest.hexdigest() != sha:
            raise StoreError(f"{source}: the archive is damaged; nothing was written.")


def _decode(frame: bytes, size: int, source: Path) -> bytes:
    """Decode a frame that must hold ``size`` bytes, whatever size it claims."""
    # Of zarr's own requirements: no reason for one more of ours, and only old archives need it.
    from numcodecs import Zstd

    try:
        # The size in a frame's header may lie; into a buffer of ours no more than fits is written.
        return bytes(Zstd().decode(frame, np.zeros(size, np.uint8)))
    except (RuntimeError, ValueError) as error:
        raise StoreError(f"{source}: the archive is damaged ({error}).") from None
