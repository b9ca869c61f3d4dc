"""Files that are whole or not there: every small file is written through here."""

import errno
import hashlib
import json
import os
import re
import secrets
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
from tqdm import tqdm

from karmma_pipeline.errors import KarmmaError, StoreError

_FULL = {errno.ENOSPC, errno.EDQUOT}
_BROKEN = {errno.EIO, errno.ESTALE, errno.ENXIO, errno.EFBIG}


# Free space that is asked for, times the size of the files: folders take some too.
_ROOM = 1.02
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,119}")


def check_name(name: str) -> str:
    """Return the name of a clip, modality or head if it is safe as a file name everywhere.

    Raises:
        ValueError: it is not; the message says what is allowed.
    """
    if not _NAME.fullmatch(name):
        raise ValueError("use 1 to 120 characters of A-Z a-z 0-9 . _ - without a leading - or .")
    return name


def looked_in(path: Path) -> str:
    """Return where a path was looked for, to end a sentence: relative ones begin at this folder."""
    return "" if path.is_absolute() else f" in {Path.cwd()}"


def sync_folder(folder: Path) -> None:
    """Make renames inside a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success it becomes ``path``, durably.

    Raises:
        KarmmaError: the disk or the quota is full, or the folder cannot be written.
            What stood at ``path`` before is untouched.
    """
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = create_beside(path)
        try:
            yield temporary
            # First the bytes, then the name, then the folder that holds the name: after a power cut
            # the name leads to the old bytes or to the new ones, never to an empty file.
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
            sync_folder(path.parent)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise


def create_beside(path: Path) -> Path:
    """Create an empty file in the folder of ``path`` whose name says which process writes it.

    Not by `tempfile`, whose files are the owner's alone. The system itself applies the umask (or
    the folder's ACL) to 0666; to ask for the umask one has to set it, for all threads.
    """
    writer = f"{socket.gethostname()}.{os.getpid()}.{secrets.token_hex(8)}"
    temporary = path.with_name(f".{path.name}.{writer}.tmp")
    os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666))
    return temporary


def is_temporary(path: Path) -> bool:
    """Tell whether a file is one that `replacing` is writing, or left when it was killed."""
    return path.name.startswith(".") and path.suffix == ".tmp"


def sweep(folders: Iterable[Path], *, alone: bool = False) -> None:
    """Take away what killed processes of this machine were writing; of living ones nothing.

    Args:
        folders: looked into, but not into folders inside them.
        alone: nobody else writes there now, such as under a lock: what other machines have
            left goes too.
    """
    name = re.compile(rf"\..+\.{re.escape(socket.gethostname())}\.(\d{{1,9}})\.\w+\.tmp")
    for folder in folders:
        with suppress(OSError):
            for path in list(folder.iterdir()):
                writer = name.fullmatch(path.name)
                dead = writer is not None and not _lives(int(writer[1]))
                if dead or (alone and is_temporary(path)):
                    path.unlink()


def folders_of(root: Path) -> list[Path]:
    """Return a folder and all folders below it; links are not followed."""
    return [Path(folder) for folder, _, _ in os.walk(root)]


def _lives(process: int) -> bool:
    """Tell whether another process lives; a number like mine is of one before a restart."""
    return process != os.getpid() and psutil.pid_exists(process)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a full disk, quota or read-only folder into one clear error.

    Libraries report a failing disk in their own ways (torch.save: a RuntimeError about
    positions), so free space and inodes are looked at, not only the system's error number.
    """
    try:
        yield
    except KarmmaError:
        raise
    except Exception as error:
        number = _errno(error)
        if number in _FULL or _is_full(path):
            raise _full(path) from error
        if number in {errno.EROFS, errno.EACCES, errno.EPERM}:
            raise KarmmaError(
                f"{path}: the folder cannot be written ({os.strerror(number)}); "
                "choose another folder or change its permissions."
            ) from error
        if number in _BROKEN:
            raise KarmmaError(
                f"{path}: file system error ({os.strerror(number)}); everything saved before is "
                "kept. Fix the disk and run the same command again."
            ) from error
        raise


def _errno(error: Exception) -> int:
    """Return the system's number of an error; HDF5 and Rust only write it into their text."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    named = re.search(r"(?:errno =|os error) (\d{1,4})", str(error))
    return int(named[1]) if named else 0


def _is_full(path: Path) -> bool:
    with suppress(OSError):
        # What the user may use (bavail), not what root may; some file systems count no inodes.
        disk = os.statvfs(path.parent)
        return disk.f_bavail == 0 or (disk.f_files > 0 and disk.f_favail == 0)
    return False


def _full(path: Path) -> KarmmaError:
    with suppress(OSError):
        disk = os.statvfs(path.parent)
        left = f"{disk.f_bavail * disk.f_frsize / 1e6:.0f} MB and {disk.f_favail} inodes free"
        return KarmmaError(
            f"{path}: the disk or your quota is full ({left}); free some space and run the same "
            "command again."
        )
    return KarmmaError(f"{path}: the disk or your quota is full; free some space and try again.")


def write_bytes(path: Path, data: bytes) -> None:
    """Write a whole file durably, or leave the old one."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write a whole text file durably, or leave the old one."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write JSON durably: sorted keys and no NaN, so that equal values are equal bytes."""
    write_text(path, json_text(value))


def json_text(value: Any) -> str:
    """Return the text that `write_json` writes."""
    return json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n"


def exists(path: Path) -> bool:
    """Tell whether something lies at a path; where nobody may look, nothing does."""
    return os.path.exists(path)  # noqa: PTH110  (that of a Path raises below closed folders)


def existing(path: Path) -> Path:
    """Return a path, or the nearest folder above it that is there."""
    return next(place for place in (path, *path.absolute().parents) if exists(place))


def free_bytes(path: Path) -> int:
    """Return how many bytes the user may write at a path, whether it is there or not."""
    disk = os.statvfs(existing(path))
    return disk.f_bavail * disk.f_frsize


def check_space(folder: Path, size: int, inodes: int) -> None:
    """Refuse to begin what cannot end.

    Raises:
        StoreError: the folder's disk has not that many bytes or inodes free.
    """
    disk = os.statvfs(folder)
    free = free_bytes(folder)
    if free < size * _ROOM:
        raise StoreError(
            f"{folder}: {tqdm.format_sizeof(size, 'B')} needed, but only "
            f"{tqdm.format_sizeof(free, 'B')} free; choose another folder or free some space."
        )
    if disk.f_files and disk.f_favail < inodes:
        raise StoreError(
            f"{folder}: {inodes} files and folders needed, but only {disk.f_favail} inodes "
            "free; choose another folder or remove some files."
        )
