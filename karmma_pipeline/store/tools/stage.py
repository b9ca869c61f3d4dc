"""Copies of stores: staged on a node's own disk or in its memory, and unpacked ones.

Older programs packed stores: the same tree, each file as zstd frames of at most 4 MB, which
``zstd -d`` reads too. Such archives are read here and no longer written: ``tar --zstd`` packs a
store as well, and every system has it.
"""

import fcntl
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from karmma_pipeline import files
from karmma_pipeline.errors import StoreError
from karmma_pipeline.jobs import StopFlag
from karmma_pipeline.logs import progress_bar
from karmma_pipeline.store.catalog import Catalog
from karmma_pipeline.store.format import layout
from karmma_pipeline.store.integrity import foreign_files, verify
from karmma_pipeline.store.reader import FeatureStore

_PIECE = 16 << 20


def stage(
    store: Path, folder: Path, stop: StopFlag | None = None, *, check_again: bool = False
) -> Path:
    """Copy a store into a folder, verify every byte of the copy, and return where it lies.

    A copy that was verified is used again if none of its files has changed since, by size, inode
    and time of change; else it is verified again, and repaired. Of several processes that ask at
    once one copies and the others wait. A stopped copy goes on with the files that it lacks.

    Args:
        store: what to copy.
        folder: where the copy's folder is made.
        stop: stops the copying.
        check_again: verify every byte of a copy that is there, as against bytes that flipped on
            the disk itself, which change no time.

    Raises:
        StoreError: there is not the space (bytes or inodes), or the copy differs.
        StoppedError: a stop was asked for.
    """
    stop = stop or StopFlag()
    opened = FeatureStore.open(store)
    place = folder / f"karmma-{opened.digest[:16]}"
    layout.check_outside(folder)
    with files.disk_errors(folder / "x"):
        folder.mkdir(parents=True, exist_ok=True)
        _refuse_strangers(place)
        with _alone(folder / f".{place.name}.lock"):
            if check_again or not _is_unchanged(place, store):
                _make(store, place, stop)
            files.sweep([folder])
    return place


def _refuse_strangers(place: Path) -> None:
    """Where everybody may write (/dev/shm, /tmp), use no copy that another user has put there.

    The list of verified files lies beside the copy, so whoever made both could have other tokens
    used in a training.
    """
    if place.parent.stat().st_mode & stat.S_IWOTH:
        for path in (place, _done(place)):
            if path.exists() and path.lstat().st_uid != os.getuid():
                raise StoreError(f"{path}: belongs to another user; choose another folder.")


def _make(store: Path, place: Path, stop: StopFlag) -> None:
    """Copy what is missing and verify all; what was there and is damaged is copied once more."""
    used_again = _copy(store, place, stop)
    # States first: a file that changes while it is verified then differs from what is noted.
    states, damages = _states(place), verify(place, stop)
    if damages and used_again:
        forget(place)
        _copy(store, place, stop)
        states, damages = _states(place), verify(place, stop)
    if damages:
        forget(place)
        raise StoreError(
            f"{place}: the copy of {store} is damaged ({damages[0]}) and was removed. Check the "
            "store with `karmma store verify`."
        )
    files.write_json(
        _done(place), {"manifest": files.sha256(store / layout.MANIFEST), "files": states}
    )


def forget(place: Path) -> None:
    """Take a copy away."""
    _done(place).unlink(missing_ok=True)
    shutil.rmtree(place, ignore_errors=True)


def _done(place: Path) -> Path:
    """Return the file that means that a copy was verified; beside it, not inside."""
    return place.with_name(f"{place.name}.verified")


def _is_unchanged(place: Path, store: Path) -> bool:
    """Tell whether a copy of just this store was verified and not touched since."""
    try:
        done = json.loads(_done(place).read_text(encoding="utf-8"))
        return bool(
            done["manifest"] == files.sha256(store / layout.MANIFEST)
            and done["files"] == _states(place)
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _states(place: Path) -> dict[str, list[int]]:
    """Return size, inode and time of change (which nobody can set) of every file of a copy."""
    states, start = {}, len(str(place)) + 1
    for folder, _, names in os.walk(place):
        for path in (f"{folder}/{name}" for name in names):
            state = os.lstat(path)
            states[path[start:]] = [state.st_size, state.st_ino, state.st_ctime_ns]
    return states


def _sizes(store: Path) -> dict[str, int]:
    """Return every file of a store with its size, the manifest last; no foreign ones."""
    foreign = {name for _, name in foreign_files(Catalog(store))}
    sizes = {}
    for folder, _, names in os.walk(store):
        for name in names:
            path = Path(folder, name)
            relative = str(path.relative_to(store))
            if relative not in foreign:
                sizes[relative] = path.stat().st_size
    # The manifest last: a copy without it is no store, wherever the copying was killed.
    sizes[layout.MANIFEST] = sizes.pop(layout.MANIFEST)
    return sizes


def _copy(store: Path, place: Path, stop: StopFlag) -> bool:
    """Copy the files that a copy lacks; return whether it had any."""
    sizes = _sizes(store)
    missing = {n: s for n, s in sizes.items() if not _has(place / n, s)}
    # A shard's file lies in a folder of its own, and each file has a temporary one while it is
    # copied: four inodes a file is more than is needed.
    files.check_space(place.parent, sum(missing.values()), 4 * len(missing))
    _done(place).unlink(missing_ok=True)  # from here on nothing counts as verified
    files.sweep(files.folders_of(place), alone=True)  # of a copy that was killed
    with progress_bar(total=sum(sizes.values()), desc="stage", unit="B", unit_scale=True) as bar:
        bar.update(sum(sizes.values()) - sum(missing.values()))
        for name in missing:
            with (
                os.fdopen(layout.open_inside(store, store / name), "rb") as source,
                files.replacing(place / name) as temporary,
                temporary.open("wb") as target,
            ):
                while data := source.read(_PIECE):
                    stop.check("the files copied so far are kept")
                    target.write(data)
                    bar.update(len(data))
    return len(missing) < len(sizes)


def _has(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Let one process at a time work; the kernel frees the lock of one that dies."""
    with path.open("w", encoding="utf-8") as file:
        # The file is never removed: whoever waits for it would hold the lock of a file that the
        # next one does not find.
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


LIST = "archive.json"
_FRAME = 4 << 20
# A skippable zstd frame of four bytes, which hold the length of the next frame.
_SKIP = b"\x50\x2a\x4d\x18\x04\x00\x00\x00"


def decompress(archive: Path, out: Path, stop: StopFlag | None = None) -> None:
    """Write the store that an archive was made of; every byte is checked.

    Raises:
        StoreError: the archive is damaged, or there is not the space.
        StoppedError: a stop was asked for; run again to go on.
    """
    stop = stop or StopFlag()
    try:
        listed = layout.read_json(archive, archive / LIST)["files"]
        sizes = {name: int(one["bytes"]) for name, one in listed.items()}
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise StoreError(f"{archive / LIST}: not an archive, or damaged ({error}).") from None
    for name in sizes:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise StoreError(f"{archive / LIST}: {name!r} is outside the store.")
    out.mkdir(parents=True, exist_ok=True)
    files.check_space(out, sum(sizes.values()), 4 * len(sizes))
    for name, size in progress_bar(sizes.items(), "decompress", unit="file"):
        stop.check("the files unpacked so far are kept")
        target = out / name
        if not (target.is_file() and files.sha256(target) == listed[name]["sha256"]):
            _decompress_file(archive, archive / f"{name}.zst", target, size, listed[name]["sha256"])


def is_archive(folder: Path) -> bool:
    """Tell whether a folder is a compressed copy."""
    return (folder / LIST).is_file()


def _decompress_file(archive: Path, source: Path, target: Path, size: int, sha: str) -> None:
    digest, left = hashlib.sha256(), size
    with (
        os.fdopen(layout.open_inside(archive, source), "rb") as file,
        files.replacing(target) as temporary,
        temporary.open("wb") as out,
    ):
        while head := file.read(len(_SKIP) + 4):
            length = int.from_bytes(head[-4:], "little")
            if head[:-4] != _SKIP or length > 2 * _FRAME:
                raise StoreError(f"{source}: the archive is damaged.")
            data = _decode(file.read(length), min(_FRAME, left), source)
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
