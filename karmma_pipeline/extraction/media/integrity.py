"""Looks at media files cheaply: is it there, is it whole, how long, what is in it.

Containers are opened, never decoded, in processes of their own: FFmpeg has died on cut headers,
and a network disk may hang. A cut file is told by the sizes that its own header states.
"""

import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

import av
import h5py
from pebble import ProcessExpired, ProcessFuture, ProcessPool

from karmma_pipeline import jobs
from karmma_pipeline.extraction.media.container import MediaInfo, StreamInfo, read_info
from karmma_pipeline.extraction.media.interface import MediaFaultError
from karmma_pipeline.logs import progress_bar

State = Literal["fine", "missing", "empty", "truncated", "damaged"]

_FILES_PER_TASK = 64

# Seconds for a task, and for a file of its own after a task has failed.
_TIMEOUT_S = 60.0

_MAX_PROCESSES = 8
_BOXED = {b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"uuid", b"moof", b"sidx"}
_SEGMENT = 0x18538067
_ARRAYS = {".hdf5", ".h5"}
_SOUND_ONLY = MediaInfo(None, StreamInfo(0, 0.0, 0.0, None, default=True), indexed=True)


@dataclass(frozen=True, slots=True)
class FileCheck:
    """Whether a file is whole, and what it says of itself; None for tars and folders."""

    state: State
    detail: str = ""
    info: MediaInfo | None = None

    @property
    def duration_s(self) -> float | None:
        """Seconds; None where it does not say."""
        return None if self.info is None else self.info.duration_s

    @property
    def fps(self) -> float | None:
        """Frames per second; None where it does not say."""
        return None if self.info is None else self.info.fps

    def lacks(self, kind: Literal["video", "audio"]) -> bool:
        """Tell whether it is known to hold no such stream."""
        return self.info is not None and getattr(self.info, kind) is None


def check_files(paths: Sequence[Path]) -> dict[Path, FileCheck]:
    """Check every path, in at most eight processes, with a bar on stderr."""
    tasks = [list(paths[i : i + _FILES_PER_TASK]) for i in range(0, len(paths), _FILES_PER_TASK)]
    workers = max(1, min(_MAX_PROCESSES, jobs.cpu_count(), len(tasks)))
    checks: dict[Path, FileCheck] = {}
    with (
        ProcessPool(workers, initializer=jobs.become_worker, context=get_context("spawn")) as pool,
        progress_bar(total=len(paths), desc="probe", unit="file") as bar,
    ):
        futures = [(task, _submit(pool, task)) for task in tasks]
        for task, future in futures:
            for path, check in zip(task, _results(pool, task, future), strict=True):
                checks[path] = check
                bar.update()
    return checks


def _submit(pool: ProcessPool, task: list[Path]) -> "ProcessFuture[list[FileCheck]]":
    return pool.schedule(_check_each, args=[task], timeout=_TIMEOUT_S)


def _results(
    pool: ProcessPool, task: list[Path], future: "ProcessFuture[list[FileCheck]]"
) -> Iterator[FileCheck]:
    """Yield a task's checks; if it failed, each of its files is tried alone."""
    try:
        yield from future.result()
        return
    except (FutureTimeoutError, TimeoutError, ProcessExpired):
        alone = [_submit(pool, [path]) for path in task]
    for one in alone:
        try:
            yield from one.result()
        except (FutureTimeoutError, TimeoutError):
            yield FileCheck("damaged", f"opening it took more than {_TIMEOUT_S:.0f} s")
        except ProcessExpired:
            yield FileCheck("damaged", "it kills the library that opens it")


def _check_each(paths: Iterable[Path]) -> list[FileCheck]:
    return [check_file(path) for path in paths]


def check_file(path: Path) -> FileCheck:
    """Look at one file or folder; whatever is wrong with it is said, not raised."""
    try:
        if path.is_dir():
            return FileCheck("fine")
        size = path.stat().st_size
        if size == 0:
            return FileCheck("empty", "0 bytes")
        if path.suffix == ".tar":
            return _tar(path, size)
        if path.suffix in _ARRAYS:
            return _array(path)
        stated = _stated_size(path, size)
    except FileNotFoundError:
        return FileCheck("missing")
    except (OSError, ValueError) as error:
        return FileCheck("damaged", str(error))
    # FFmpeg opens a file whose index lies in front and whose end is missing as if it were whole.
    if stated > size:
        return FileCheck("truncated", f"{size:,} of {stated:,} bytes")
    return _container(path)


def _container(path: Path) -> FileCheck:
    try:
        return FileCheck("fine", info=read_info(path))
    except MediaFaultError as fault:
        return FileCheck("damaged", f"no media file ({fault.reason.name.lower()})")
    except (av.error.FFmpegError, OSError, ValueError) as error:
        return FileCheck("damaged", f"no media file ({error})")


def _tar(path: Path, size: int) -> FileCheck:
    """A whole tar ends with 1024 zero bytes; one whose download was cut does not."""
    with path.open("rb") as file:
        file.seek(max(0, size - 1024))
        whole = size % 512 == 0 and size >= 1024 and not any(file.read())
    return FileCheck("fine") if whole else FileCheck("truncated", f"{size:,} bytes, no end mark")


def _array(path: Path) -> FileCheck:
    try:
        with h5py.File(path, "r", locking=False):
            return FileCheck("fine", info=_SOUND_ONLY)
    except (OSError, RuntimeError) as error:
        state: State = "truncated" if "truncated" in str(error) else "damaged"
        return FileCheck(state, "truncated or not an HDF5 file")


def _stated_size(path: Path, size: int) -> int:
    """Return how many bytes the file's own structure asks for; 0 if it does not say."""
    with path.open("rb") as file:
        head = file.read(16)
        if head[4:8] in _BOXED:
            return _boxes_end(file.fileno(), size)
        if head[:4] == b"\x1a\x45\xdf\xa3":
            file.seek(0)
            return _segment_end(file.read(4096))
        if head[:4] == b"RIFF":
            stated = int(struct.unpack("<I", head[4:8])[0])
            return stated + 7 if 0 < stated < 2**32 - 1 else 0  # the last may be padding
    return 0


def _boxes_end(descriptor: int, size: int) -> int:
    """Return where the last top-level box of an MP4 or MOV file ends."""
    # A box is its length (4 bytes, big end first), its name (4), and its content. Length 1: the
    # real one follows in 8 bytes. Length 0: to the end of the file. Boxes are jumped over, and
    # their number is bounded, as a hostile file may hold a million of nothing.
    end = 0
    for _ in range(10_000):
        head = os.pread(descriptor, 16, end)
        if len(head) < 8:
            return end if not head else end + 8
        length, kind = struct.unpack(">I4s", head[:8])
        if kind not in _BOXED and end == 0:
            return 0
        if length == 1 and len(head) == 16:
            length = struct.unpack(">Q", head[8:])[0]
        if length == 0:
            return size  # to the end of the file, wherever it is
        if length < 8:
            return 0
        end += length
        if end >= size:
            return end
    return 0


def _segment_end(head: bytes) -> int:
    """Return where the segment of a Matroska or WebM file ends, 0 where that is left open."""
    # EBML: name, length, content; the one segment holds all media. Live recordings leave its
    # length open, and void elements may stand before it.
    at = 0
    for _ in range(8):
        name, at = _number(head, at, keep_mark=True)
        length, at = _number(head, at, keep_mark=False)
        if length < 0 or at > len(head):
            return 0
        if name == _SEGMENT:
            return at + length
        at += length
    return 0


def _number(data: bytes, at: int, *, keep_mark: bool) -> tuple[int, int]:
    """Read an EBML number; -1 where it is unknown or not there."""
    if at >= len(data) or data[at] == 0:
        return -1, at + 1
    # The zero bits before the first one bit tell how many bytes belong to the number. That bit
    # stays in names and is taken off lengths; a length of nothing but ones is unknown.
    width = 9 - data[at].bit_length()
    raw = int.from_bytes(data[at : at + width], "big")
    if not keep_mark:
        bits = 7 * width
        raw &= (1 << bits) - 1
        if raw == (1 << bits) - 1:
            raw = -1
    return raw, at + width
