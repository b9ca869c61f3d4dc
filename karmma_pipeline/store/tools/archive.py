"""Compressed copies of stores: the same tree, each file as zstd frames of at most 4 MB.

``zstd -d`` reads every file too. fp16 features hardly shrink (LayerNorm 7 %, ReLU half), and a
compressed store cannot be mapped: for keeping and sending, not for training.
"""

import hashlib
import os
from pathlib import Path

import numpy as np
from numcodecs import Zstd

from karmma_pipeline import files
from karmma_pipeline.errors import StoreError
from karmma_pipeline.jobs import StopFlag
from karmma_pipeline.logs import progress_bar
from karmma_pipeline.store.catalog import Catalog
from karmma_pipeline.store.format import paths
from karmma_pipeline.store.integrity import foreign_files, verify
from karmma_pipeline.store.reader import FeatureStore
from karmma_pipeline.store.tools.stage import check_space

LIST = "archive.json"
_PIECE = 4 << 20
_LEVEL = 3
_SKIP = b"\x50\x2a\x4d\x18\x04\x00\x00\x00"
"""A skippable zstd frame of four bytes, which hold the length of the next frame."""


def compress(store: Path, out: Path, stop: StopFlag | None = None) -> tuple[int, int]:
    """Write a compressed copy, and return bytes before and after; run again, it goes on.

    Raises:
        StoreError: the store is not whole, or the folder holds another archive.
        StoppedError: a stop was asked for.
    """
    stop, digest = stop or StopFlag(), FeatureStore.open(store).digest
    mark = out / "archive.of"
    if out.is_dir() and any(out.iterdir()) and not (mark.is_file() and mark.read_text() == digest):
        raise StoreError(f"{out}: holds other files; choose an empty folder.")
    damages = verify(store, stop)
    if damages:
        raise StoreError(f"{store}: is damaged ({damages[0]}); an archive would keep that.")
    files.write_text(mark, digest)
    before, after, listed = 0, 0, {}
    for name in progress_bar(_names(store), "compress", unit="file"):
        stop.check("the files that are compressed are kept")
        source, target = store / name, out / f"{name}.zst"
        if not target.is_file():
            _compress_file(source, target)
        listed[name] = {"bytes": source.stat().st_size, "sha256": _sha(source)}
        before, after = before + source.stat().st_size, after + target.stat().st_size
    files.write_json(out / LIST, {"digest": digest, "files": listed})
    return before, after


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
        if not (target.is_file() and _sha(target) == listed[name]["sha256"]):
            _decompress_file(archive, archive / f"{name}.zst", target, size, listed[name]["sha256"])


def is_archive(folder: Path) -> bool:
    """Tell whether a folder is a compressed copy."""
    return (folder / LIST).is_file()


def _names(store: Path) -> list[str]:
    """Return the store's files, the manifest last."""
    foreign = {path for path, _ in foreign_files(Catalog(store))}
    found = sorted(
        str(path.relative_to(store))
        for path in store.rglob("*")
        if path.is_file() and path not in foreign
    )
    return [*(name for name in found if name != paths.MANIFEST), paths.MANIFEST]


def _compress_file(source: Path, target: Path) -> None:
    codec = Zstd(level=_LEVEL)
    with (
        source.open("rb") as file,
        files.replacing(target) as temporary,
        temporary.open("wb") as out,
    ):
        while data := file.read(_PIECE):
            frame = bytes(codec.encode(data))
            out.write(_SKIP + len(frame).to_bytes(4, "little") + frame)


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
    try:
        return bytes(Zstd().decode(frame, np.zeros(size, np.uint8)))
    except (RuntimeError, ValueError) as error:
        raise StoreError(f"{source}: the archive is damaged ({error}).") from None


def _sha(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
