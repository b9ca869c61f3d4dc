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

from pebble import ProcessExpired, ProcessFuture, ProcessPool

from karmma_pipeline import jobs
from karmma_pipeline.extraction.media.errors import MediaFaultError
from karmma_pipeline.logs import progress_bar

State = Literal["fine", "missing", "empty", "truncated", "damaged"]

_AT_ONCE = 64
"""Files of one task."""

_PATIENCE_S = 60.0
"""Seconds for a task, and for a file of its own after a task has failed."""

_MOST_PROCESSES = 8
_BOXED = {b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"uuid", b"moof", b"sidx"}
_SEGMENT = 0x18538067
_ARRAYS = {".hdf5", ".h5"}


@dataclass(frozen=True, slots=True)
class Probe:
    """What a file says of itself; seconds, Hz; None where it does not say."""

    state: State
    detail: str = ""
    duration_s: float | None = None
    fps: float | None = None
    has_video: bool | None = None
    has_audio: bool | None = None


def probe_all(paths: Sequence[Path]) -> dict[Path, Probe]:
    """Probe every path, in at most eight processes, with a bar on stderr."""
    tasks = [list(paths[i : i + _AT_ONCE]) for i in range(0, len(paths), _AT_ONCE)]
    workers = max(1, min(_MOST_PROCESSES, jobs.cpu_count(), len(tasks)))
    found: dict[Path, Probe] = {}
    with (
        ProcessPool(workers, initializer=jobs.become_worker, context=get_context("spawn")) as pool,
        progress_bar(total=len(paths), desc="probe", unit="file") as bar,
    ):
        futures = [(task, _submit(pool, task)) for task in tasks]
        for task, future in futures:
            for path, probe in zip(task, _results(pool, task, future), strict=True):
                found[path] = probe
                bar.update()
    return found


def _submit(pool: ProcessPool, task: list[Path]) -> "ProcessFuture[list[Probe]]":
    return pool.schedule(probe_each, args=[task], timeout=_PATIENCE_S)


def _results(
    pool: ProcessPool, task: list[Path], future: "ProcessFuture[list[Probe]]"
) -> Iterator[Probe]:
    """Yield a task's probes; if it failed, each of its files is tried alone."""
    try:
        yield from future.result()
        return
    except (FutureTimeoutError, TimeoutError, ProcessExpired):
        alone = [_submit(pool, [path]) for path in task]
    for one in alone:
        try:
            yield from one.result()
        except (FutureTimeoutError, TimeoutError):
            yield Probe("damaged", f"opening it took more than {_PATIENCE_S:.0f} s")
        except ProcessExpired:
            yield Probe("damaged", "it kills the library that opens it")


def probe_each(paths: Iterable[Path]) -> list[Probe]:
    """Probe paths one after another, in this process."""
    return [probe(path) for path in paths]


def probe(path: Path) -> Probe:
    """Look at one file or folder; whatever is wrong with it is said, not raised."""
    try:
        if path.is_dir():
            return Probe("fine")
        size = path.stat().st_size
        if size == 0:
            return Probe("empty", "0 bytes")
        if path.suffix == ".tar":
            return _tar(path, size)
        if path.suffix in _ARRAYS:
            return _array(path)
        stated = _stated_size(path, size)
    except FileNotFoundError:
        return Probe("missing")
    except (OSError, ValueError) as error:
        return Probe("damaged", str(error))
    if stated > size:
        return Probe("truncated", f"{size:,} of {stated:,} bytes")
    return _container(path)


def _container(path: Path) -> Probe:
    import av

    from karmma_pipeline.extraction.media.container import open_container

    try:
        with open_container(path) as container:
            video, audio = (container.streams.best(kind) for kind in ("video", "audio"))
            duration = container.duration
            rate = video.average_rate if isinstance(video, av.VideoStream) else None
            return Probe(
                "fine",
                duration_s=None if duration is None else duration / av.time_base,
                fps=float(rate) if rate else None,
                has_video=video is not None,
                has_audio=audio is not None,
            )
    except MediaFaultError as fault:
        return Probe("damaged", f"no media file ({fault.reason.name.lower()})")
    except (av.error.FFmpegError, OSError, ValueError) as error:
        return Probe("damaged", f"no media file ({error})")


def _tar(path: Path, size: int) -> Probe:
    """A whole tar ends with 1024 zero bytes; one whose download was cut does not."""
    with path.open("rb") as file:
        file.seek(max(0, size - 1024))
        whole = size % 512 == 0 and size >= 1024 and not any(file.read())
    return Probe("fine") if whole else Probe("truncated", f"{size:,} bytes, no end mark")


def _array(path: Path) -> Probe:
    import h5py

    try:
        with h5py.File(path, "r", locking=False):
            return Probe("fine", has_video=False, has_audio=True)
    except (OSError, RuntimeError) as error:
        state: State = "truncated" if "truncated" in str(error) else "damaged"
        return Probe(state, "no whole HDF5 file")


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
    width = 9 - data[at].bit_length()
    raw = int.from_bytes(data[at : at + width], "big")
    if not keep_mark:
        bits = 7 * width
        raw &= (1 << bits) - 1
        if raw == (1 << bits) - 1:
            raw = -1
    return raw, at + width
