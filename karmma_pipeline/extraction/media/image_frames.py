"""Numbered pictures in a folder or inside a tar, found by number, read without unpacking.

They may lie in a folder of their own inside of it, and be called otherwise than the recipe says if
all of them are called alike. A tar is listed once; links, devices and sparse members in it are
never read, and member names are only compared, never used as paths. K pictures that are there, H
and W their size.
"""

import hashlib
import os
import re
import tarfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from string import Formatter

import cv2
import numpy as np
import numpy.typing as npt

from karmma_pipeline import files
from karmma_pipeline.data.datasets.listing import missing
from karmma_pipeline.data.sources import FrameSource
from karmma_pipeline.extraction.media.interface import MediaFaultError, MediaReader
from karmma_pipeline.extraction.types import ROUNDING_S, Numbers, Times
from karmma_pipeline.modalities import Reason

# Bytes of a picture file beyond which it is none.
_LARGEST = 256 << 20

_END_OF_JPEG = b"\xff\xd9"
_CUT = re.compile(rb"\xff\xd8\xff")
_PICTURE = re.compile(r"(.*?)(\d{1,18})(\.(?:jpe?g|png|bmp|webp|tiff?))", re.IGNORECASE | re.ASCII)
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"(\xb5/\xfd": "zstd"}

Table = npt.NDArray[np.int64]
"""Number, and per plane offset and size in the tar (zeros in a folder) [K, 1 + 2 * planes]."""

Places = Mapping[str, tuple[int, int]]
"""Names of files in a folder or tar, relative to it, and where their bytes lie in the tar."""

Found = tuple[tuple[str, ...], Table]
"""How the pictures are really called, per plane, and where they are."""


class ImageFrames(MediaReader):
    """The pictures of one video; planes are those of `FrameSource.names`.

    Raises:
        MediaFaultError: no such folder or tar, or none of the pictures is in it.
    """

    def __init__(self, source: FrameSource, index_folder: Path | None = None) -> None:
        self.path = source.path
        if source.path.is_dir():
            names, self._table = _in_folder(source.path, source.names)
        elif source.path.is_file():
            names, self._table = _in_tar(source.path, source.names, index_folder)
        else:
            raise MediaFaultError(Reason.FILE_MISSING, missing(source.path))
        # Numbers that begin before the first one's are a grid that begins there.
        base = min(source.base, int(self._table[0, 0]))
        self.source = replace(source, names=names, base=base)
        self.stores_flow = len(source.names) == 2  # one picture for u, one for v
        self._starts: Times = self._start(self._table[:, 0])

    def _start(self, number: "Numbers | np.int64 | int") -> npt.NDArray[np.float64]:
        return np.asarray(self.source.start_s(number), np.float64)

    @property
    def video_decoder(self) -> str:
        """What reads its pictures."""
        return "cv2"

    @property
    def frame_starts(self) -> Times:
        """When each picture's interval starts, seconds on the grid [K]."""
        return self._starts

    @property
    def stop_s(self) -> float:
        """End of the last picture, seconds."""
        return float(self._start(self._table[-1, 0] + 1))

    def span(self, first: int, last: int) -> tuple[float, float]:
        """Return the seconds that pictures ``first`` to ``last``, both included, take."""
        return float(self._start(first)), float(self._start(last + 1))

    def numbers(self, times: Times) -> Numbers:
        """Return which picture is shown at each moment, or the nearest that is there: [T]."""
        # Rounding must not move a moment that is a picture's own start to the picture before.
        rate = self.source.fps / self.source.stride
        wanted = np.floor((times + ROUNDING_S) * rate).astype(np.int64) + self.source.base
        there = self._table[:, 0]
        after = np.clip(np.searchsorted(there, wanted), 0, len(there) - 1)
        before = np.maximum(after - 1, 0)
        nearer = np.abs(wanted - there[before]) <= np.abs(there[after] - wanted)
        return np.where(nearer, before, after).astype(np.int64)

    def decode(self, numbers: Numbers) -> Iterator[tuple[int, npt.NDArray[np.uint8]]]:
        """Yield pictures by ascending place among those that are there: uint8 [H, W, 3], RGB.

        Raises:
            MediaFaultError: one of them is damaged.
        """
        with _Reader(self.source) as reader:
            for n in np.unique(numbers).tolist():
                yield n, reader.picture(self._table[n], 0, cv2.IMREAD_COLOR)[..., ::-1].copy()

    def motion(self, numbers: Numbers) -> npt.NDArray[np.float32]:
        """Return flow that is stored as bytes, float32 [T, 2, H, W]: px of the pictures per pair.

        Raises:
            MediaFaultError: a picture is damaged.
        """
        fields: dict[int, npt.NDArray[np.uint8]] = {}
        with _Reader(self.source) as reader:
            for n in np.unique(numbers).tolist():
                planes = [reader.picture(self._table[n], p, cv2.IMREAD_GRAYSCALE) for p in (0, 1)]
                if planes[0].shape != planes[1].shape:
                    raise MediaFaultError(
                        Reason.DECODE_ERROR, f"{self.path}: u and v differ in size"
                    )
                fields[n] = np.stack(planes)
        data = np.stack([fields[n] for n in numbers.tolist()]).astype(np.float32)
        bound = self.source.bound_px
        return data * np.float32(2 * bound / 255) - np.float32(bound)

    @property
    def gap_s(self) -> float:
        """Seconds between the two frames of a flow picture."""
        return self.source.dilation / self.source.fps


class _Reader:
    """Reads picture files of one source; a tar is opened once."""

    def __init__(self, source: FrameSource) -> None:
        self._source = source
        self._tar = None if source.path.is_dir() else source.path.open("rb")

    def __enter__(self) -> "_Reader":
        return self

    def __exit__(self, *_: object) -> None:
        if self._tar is not None:
            self._tar.close()

    def picture(self, row: Table, plane: int, mode: int) -> npt.NDArray[np.uint8]:
        """Return one picture, uint8 [H, W] or [H, W, 3] (BGR)."""
        name = self._source.names[plane].format(int(row[0]))
        where = f"{self._source.path}: {name}"
        try:
            data = self._bytes(name, row, plane)
            # A JPEG that was cut is filled up with grey, without an error.
            whole = not _CUT.match(data) or _END_OF_JPEG in data[-64:]
            picture = cv2.imdecode(
                np.frombuffer(data, np.uint8), mode | cv2.IMREAD_IGNORE_ORIENTATION
            )
        except (OSError, cv2.error) as error:
            raise MediaFaultError(Reason.DECODE_ERROR, f"{where}: {error}") from None
        if not whole or picture is None:
            raise MediaFaultError(Reason.DECODE_ERROR, f"{where}: damaged")
        return np.asarray(picture, np.uint8)

    def _bytes(self, name: str, row: Table, plane: int) -> bytes:
        if self._tar is None:
            path = self._source.path / name
            if path.stat().st_size > _LARGEST:
                raise MediaFaultError(Reason.UNSAFE_FILE, f"{path}: implausibly large for an image")
            return path.read_bytes()
        offset, size = row[1 + 2 * plane : 3 + 2 * plane].tolist()
        self._tar.seek(offset)
        return self._tar.read(size)


def _pattern(name: str) -> re.Pattern[str]:
    """Turn ``img_{:05d}.jpg`` into what matches such names; the number is its group."""
    parts = Formatter().parse(name)
    text = "".join(
        re.escape(a) + ("" if spec is None else r"(\d{1,18})") for a, _, spec, _ in parts
    )
    return re.compile(text)


def _in_folder(path: Path, names: tuple[str, ...]) -> Found:
    # A folder's time changes with its entries, so that a listing is never older than the folder.
    parents = dict.fromkeys((path, *((path / name).parent for name in names)))
    key = tuple(parent.stat().st_mtime_ns if parent.is_dir() else 0 for parent in parents)
    return _listed_folder(path, names, key)


@lru_cache(maxsize=8)
def _listed_folder(path: Path, names: tuple[str, ...], _key: tuple[int, ...]) -> Found:
    folders = dict.fromkeys(str(Path(name).parent) for name in names)
    places = {name: (0, 0) for folder in folders for name in _files(path, folder)}
    if not len(_table(_planes(places, names))):  # look one folder deeper
        inner = [entry.name for entry in os.scandir(path) if entry.is_dir(follow_symlinks=False)]
        inside = (f"{one}/{folder}" for one in inner for folder in (".", *folders))
        places = {name: (0, 0) for folder in (".", *inside) for name in _files(path, folder)}
    return _resolved(path, places, names)


def _files(path: Path, folder: str) -> Iterator[str]:
    place = os.path.normpath(folder)
    listed = os.listdir(path / place) if (path / place).is_dir() else ()  # noqa: PTH208  (a million)
    yield from (os.path.normpath(f"{place}/{name}") for name in listed)


def _resolved(path: Path, places: Places, names: tuple[str, ...]) -> Found:
    """Find the pictures by their stated names, in a folder inside, or by the names they have.

    Raises:
        MediaFaultError: there are none, or one cannot tell which.
    """
    places = {
        name: at for name, at in places.items() if not name.rpartition("/")[2].startswith(".")
    }
    depth = names[0].count("/")
    folders = {name.rsplit("/", depth + 1)[0] for name in places if name.count("/") > depth}
    inside = [tuple(f"{_plain(folder)}/{name}" for name in names) for folder in sorted(folders)]
    tried = [names, *(inside if len(inside) == 1 else []), *_as_they_are(places, names)]
    for some in tried:
        table = _table(_planes(places, some))
        if len(table):
            return some, table
    pictures = [name for name in places if _PICTURE.fullmatch(name)]
    holds = f"{len(pictures):,} others, such as {min(pictures)}" if pictures else "no images"
    raise MediaFaultError(Reason.FILE_MISSING, f"{path}: no {names[0]}; it contains {holds}")


def _as_they_are(places: Places, names: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """Yield the name that all pictures have in common, if they have one; flow is not guessed."""
    digits: dict[tuple[str, str], set[str]] = defaultdict(set)
    for name in places:
        if found := _PICTURE.fullmatch(name):
            digits[found[1], found[3]].add(found[2])
    if len(names) == len(digits) == 1:
        (((before, after), numbers),) = digits.items()
        widths = {len(number) for number in numbers}
        width = f"0{widths.pop()}" if len(widths) == 1 else ""
        yield (f"{_plain(before)}{{:{width}d}}{_plain(after)}",)


def _plain(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")


def _planes(places: Places, names: tuple[str, ...]) -> list[dict[int, tuple[int, int]]]:
    planes: list[dict[int, tuple[int, int]]] = [{} for _ in names]
    for plane, template in zip(planes, names, strict=True):
        pattern = _pattern(template)
        for name, place in places.items():
            match = pattern.fullmatch(name)
            if match and template.format(int(match[1])) == name:
                plane[int(match[1])] = place
    return planes


def _table(planes: list[dict[int, tuple[int, int]]]) -> Table:
    """Return rows for the numbers that every plane has."""
    numbers = sorted(set.intersection(*map(set, planes)))
    rows = [[n, *(x for plane in planes for x in plane[n])] for n in numbers]
    return np.array(rows, np.int64).reshape(len(rows), 1 + 2 * len(planes))


def _in_tar(path: Path, names: tuple[str, ...], index_folder: Path | None) -> Found:
    status = path.stat()
    key = (str(path.absolute()), status.st_size, status.st_mtime_ns, names)
    return _listed_tar(path, names, repr(key), index_folder)


@lru_cache(maxsize=8)
def _listed_tar(path: Path, names: tuple[str, ...], key: str, index_folder: Path | None) -> Found:
    """List a tar once for all processes: reading its headers means reading much of the disk."""
    if index_folder is None:
        return _resolved(path, _read_tar(path), names)
    kept = index_folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.npz"
    if kept.is_file():
        with np.load(kept, allow_pickle=False) as saved:
            return tuple(saved["names"].tolist()), saved["table"]
    real, table = _resolved(path, _read_tar(path), names)
    with files.replacing(kept) as temporary, temporary.open("wb") as file:
        np.savez(file, names=np.array(real), table=table)
    return real, table


def _read_tar(path: Path) -> Places:
    # "r:" and not "r": a compressed tar has no places to read from. Names are matched and never
    # used as paths, so a member called ../../x or /etc/x is nothing but a name that does not match;
    # links and devices are skipped, and what reaches past the end was cut off.
    places: dict[str, tuple[int, int]] = {}
    length = path.stat().st_size
    try:
        with path.open("rb") as file:
            head = file.read(8)
        with tarfile.open(path, "r:") as tar:
            for member in _members(tar):
                inside = member.offset_data + member.size <= length
                if not member.isreg() or member.issparse() or not inside or member.size > _LARGEST:
                    continue
                name = member.name.removeprefix("./")
                if not name.startswith("/") and ".." not in name.split("/"):
                    places[name] = (member.offset_data, member.size)
    except (tarfile.TarError, OSError, ValueError) as error:
        how = next((how for mark, how in _COMPRESSED.items() if head.startswith(mark)), None)
        why = (
            f"compressed with {how}, so single images cannot be read; decompress it"
            if how
            else error
        )
        raise MediaFaultError(
            Reason.DECODE_ERROR, f"{path}: not an uncompressed tar ({why})"
        ) from None
    return places


def _members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Yield members up to where the tar is cut; none is kept, a tar may hold a million."""
    while True:
        try:
            member = tar.next()
        except (tarfile.ReadError, tarfile.HeaderError):
            return
        if member is None:
            return
        # tarfile remembers every member that it has read.
        tar.members = []  # type: ignore[attr-defined]
        yield member
