"""The clips of a store: fixed before any job writes, and the same for all jobs."""

import hashlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from karmma_pipeline import config, files
from karmma_pipeline.errors import StoreError, counted
from karmma_pipeline.modalities import Reason
from karmma_pipeline.store.format import layout
from karmma_pipeline.store.format.layout import (
    Record,
    parse_record,
    write_column,
    zarr_group,
    zarr_shards,
)
from karmma_pipeline.store.spec import ClipRow, StoreSpec


def create_store(
    root: Path,
    spec: StoreSpec,
    clips: Sequence[ClipRow],
    grown_from: Sequence[int] = (),
    moved: Collection[str] = (),
) -> None:
    """Make an empty store, or check that the one that is there is the same, or let it grow.

    Args:
        root: its folder.
        spec: what it is made of.
        clips: in the order in which they lie in shards, see `continue_list`.
        grown_from: how many clips the list had each time before it grew.
        moved: ids of clips that may have other times than before, as they are made again.

    Raises:
        StoreError: the folder holds a store of another recipe or other clips (the first
            differences are named), or something else, or a clip id is unsafe.
    """
    # All parts of an array job come here at once and write equal bytes, each file by a rename; the
    # description is written last and says that the rest is there.
    layout.check_outside(root, here=False)
    description = _describe(spec, clips, grown_from)
    table, path = _table(root, spec, clips), root / layout.SPEC
    if path.is_file():
        there = layout.read_json(root, path)
        layout.check_version(path, there)
        if there != description:
            _check_grew(root, there, description, clips, moved)
            # The description first, which says what the list was before: whoever finds the table
            # of that one, or half of it, knows what to do. And no reader may come before the end.
            (root / layout.MANIFEST).unlink(missing_ok=True)
            files.write_json(path, description)
        if _has_all(root, spec, table):
            return
    # zarr.json alone was left by a run that was stopped right here
    elif (
        not (root / layout.ROOT).is_file()
        and root.is_dir()
        and any(not files.is_temporary(p) for p in root.iterdir())
    ):
        raise StoreError(f"{root}: the folder contains other files; choose an empty one.")
    version = {"format": layout.FORMAT, "version": description["version"]}
    files.write_json(root / layout.ROOT, zarr_group(version))
    shards = len(shard_starts(spec, len(clips), grown_from))
    for modality, one in spec.modalities.items():
        folder = root / modality
        files.write_json(folder / "zarr.json", zarr_group(one.provenance))
        for array in one.arrays:
            meta = zarr_shards(one, array, spec.clips_per_shard, shards)
            files.write_json(folder / array.name / "zarr.json", meta)
    files.write_json(root / layout.CLIPS / "zarr.json", zarr_group({}))
    for name, (values, attributes) in table.items():
        write_column(root, name, values, **attributes)
    files.write_json(path, description)  # last: its being there means that the rest is


def _check_grew(
    root: Path,
    there: dict[str, Any],
    wanted: dict[str, Any],
    clips: Sequence[ClipRow],
    moved: Collection[str],
) -> None:
    """See that a store is as wanted but for clips, and names of classes, at the end."""
    before, lists = _list_of(there), [*wanted.get(_GROWN_FROM, ()), _list_of(wanted)]
    heads = there["spec"].get("heads", {})
    ours = wanted["spec"]["heads"].items()
    spec = wanted["spec"] | {"heads": {h: names[: len(heads.get(h, ()))] for h, names in ours}}
    differing = sorted(map(str, config.differences(there["spec"], spec, "spec")))
    if not differing and before in lists:
        return
    if not differing and before["clips"] in {one["clips"] for one in lists}:
        rows = list(_changed_rows(root, clips))
        differing = [
            text for clip_id, name, text in rows if not (clip_id in moved and name in TIMES)
        ]
        if rows and not differing:
            return
    differing = differing or sorted(map(str, config.differences(there, wanted)))
    raise StoreError(
        f"{root}: was made with a different recipe: {'; '.join(differing[:5])}; choose another "
        "folder, or use the original recipe."
    )


def _changed_rows(root: Path, clips: Sequence[ClipRow]) -> Iterator[tuple[str, str, str]]:
    """Yield clip, column and a text for each row that a store was made of and that is another."""
    with suppress(StoreError):  # the table itself may be damaged; then digests are told
        there = Catalog(root)
        columns: dict[str, Any] = {head: there.labels(head) for head in there.spec.heads}
        columns |= {name: there.names(name) for name in ("split", "group")}
        columns |= {name: there.column(name, np.float64) for name in TIMES}
        for number, clip in enumerate(clips[: there.count]):
            for name, column in columns.items():
                names = there.spec.heads.get(name)
                old = column[number]
                new = clip.labels.get(name, -1) if names else getattr(clip, name)
                if old != new and not (old != old and new != new):  # NaN: the file's end
                    text = f"clip {clip.clip_id!r}: {name} was {old}, now {new}"
                    yield clip.clip_id, name, text


@dataclass(frozen=True)
class ClipList:
    """The clips of the stores of an extraction, as they lie in shards.

    heads: class names. rows: the clips. grown_from: how many there were each time before the
    list grew: there a new shard begins.
    """

    heads: dict[str, tuple[str, ...]]
    rows: list[ClipRow]
    grown_from: tuple[int, ...] = ()


def continue_list(
    roots: Iterable[Path], heads: Mapping[str, tuple[str, ...]], clips: Sequence[ClipRow]
) -> ClipList:
    """Arrange clips as stores list them that are there already: new ones at the end.

    So are the names of new classes; ids of those that were there stay.

    Args:
        roots: of the stores of one extraction, there or not.
        heads: class names, as the list has them now.
        clips: of the list.

    Raises:
        StoreError: clips of a store are in the list no more.
    """
    found = [_read_list(root) for root in roots if (root / layout.SPEC).is_file()]
    if not found:
        return ClipList(dict(heads), list(clips))
    there = max(found, key=lambda one: len(one.ids))
    by_id = {clip.clip_id: clip for clip in clips}
    ids = there.ids or [clip.clip_id for clip in clips]
    if gone := [clip_id for clip_id in ids if clip_id not in by_id]:
        raise StoreError(
            f"{there.root}: the manifest no longer lists {counted(len(gone), 'clip')} of the "
            f"store, such as {gone[0]!r}. Clips can be added but not removed: restore them, or "
            "choose another folder with --set out=FOLDER."
        )
    known = set(ids)
    rows = [by_id[i] for i in ids] + [clip for clip in clips if clip.clip_id not in known]
    old = {head: there.heads.get(head, ()) for head in heads}
    names = {h: (*old[h], *(n for n in new if n not in old[h])) for h, new in heads.items()}
    number = {h: {name: i for i, name in enumerate(names[h])} for h in heads}
    rows = [
        replace(
            row,
            labels={
                h: number[h][heads[h][label]] if label >= 0 else label
                for h, label in row.labels.items()
            },
        )
        for row in rows
    ]
    grown = len(rows) > len(ids)
    return ClipList(names, rows, (*there.grown_from, *((len(ids),) if grown else ())))


@dataclass(frozen=True)
class _Listed:
    """The clips that the table of a store lists; empty where it was taken away."""

    root: Path
    ids: list[str]
    heads: dict[str, tuple[str, ...]]
    grown_from: tuple[int, ...]


def _read_list(root: Path) -> _Listed:
    path, column = root / layout.SPEC, layout.column_file(root, "clip_id", 2)
    try:
        for _ in range(2):  # another part may let it grow just between the two reads
            there = layout.read_json(root, path)
            layout.check_version(path, there)
            heads = {head: tuple(names) for head, names in there["spec"]["heads"].items()}
            lists = [*there.get(_GROWN_FROM, ()), _list_of(there)]
            counts = tuple(int(one["clips"]) for one in lists)
            if not column.is_file():
                return _Listed(root, [], heads, counts[:-1])
            data = layout.read_bytes(root, column)
            for place in reversed(range(len(lists))):
                width = int(lists[place]["id_bytes"])
                if counts[place] * width == len(data):
                    ids = np.frombuffer(data, f"S{width}").tolist()
                    return _Listed(root, [i.decode() for i in ids], heads, counts[:place])
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(f"{path}: the store's description is damaged ({error}).") from None
    raise StoreError(f"{column}: its size does not match {path}; the clip table is damaged.")


_GROWN_FROM = "grown_from"


def _list_of(description: Mapping[str, Any]) -> dict[str, Any]:
    return {key: description.get(key) for key in ("clips", "clips_sha256", "id_bytes")}


def described_files(spec: StoreSpec) -> dict[str, int]:
    """Return the names of the files that `create_store` writes; columns by dimensions.

    Names are relative to the store; the value is the number of dimensions of a column of the
    clip table, 0 for other files.
    """
    names = {layout.ROOT: 0, f"{layout.CLIPS}/zarr.json": 0}
    for m, array in spec.arrays:
        names |= {f"{m}/zarr.json": 0, f"{m}/{array.name}/zarr.json": 0}
    for name in ("clip_id", *(f"label_{h}" for h in spec.heads), *PLAIN):
        dimensions = 2 if name == "clip_id" else 1
        names[f"{layout.CLIPS}/{name}/zarr.json"] = 0
        path = layout.column_file(Path(), name, dimensions)
        names[str(path)] = dimensions
    return names


def _has_all(root: Path, spec: StoreSpec, table: "_Table") -> bool:
    """Tell whether all is there, as it may not be after a kill or `verify --repair`."""
    files_of_columns = (
        (layout.column_file(root, name, values.ndim), values) for name, (values, _) in table.items()
    )
    return all((root / name).is_file() for name in described_files(spec)) and all(
        path.read_bytes() == values.tobytes() for path, values in files_of_columns
    )


#: Columns that every clip table has beside ids and labels.
TIMES = ("start_s", "stop_s")
PLAIN = ("split", "group", *TIMES)

_MAX_CLIPS = 100_000_000
_MAX_ID_BYTES = 120


def shard_starts(spec: StoreSpec, clips: int, grown_from: Sequence[int] = ()) -> list[int]:
    """Return the number of the first clip of each shard; what a list grew by has its own."""
    ends = [*grown_from, clips]
    return [
        first
        for start, end in pairwise([0, *ends])
        for first in range(start, end, spec.clips_per_shard)
    ]


def _describe(
    spec: StoreSpec, clips: Sequence[ClipRow], grown_from: Sequence[int]
) -> dict[str, Any]:
    sha, width, lists = hashlib.sha256(), 1, []
    for number, clip in enumerate(clips):
        if number in grown_from:
            lists.append({"clips": number, "clips_sha256": sha.hexdigest(), "id_bytes": width})
        labels = [clip.labels.get(head, -1) for head in spec.heads]
        sha.update(repr((clip.clip_id, labels, clip.split, clip.group)).encode())
        sha.update(np.array([clip.start_s, clip.stop_s], "<f8").tobytes())
        width = max(width, len(clip.clip_id)) if number else len(clip.clip_id)
    return {
        "format": layout.FORMAT,
        "version": _version(spec, grown=bool(lists)),
        "spec": spec.model_dump(mode="json"),
        "clips": len(clips),
        "clips_sha256": sha.hexdigest(),
        "id_bytes": width,
        "splits": sorted({c.split for c in clips}),
        "groups": sorted({c.group for c in clips}),
        **({_GROWN_FROM: lists} if lists else {}),
    }


def _version(spec: StoreSpec, *, grown: bool) -> int:
    if any(one.dtype == "int8_affine" for one in spec.modalities.values()):
        return layout.VERSION_AFFINE
    if any(len(one.windows) > 1 for one in spec.modalities.values()):
        return layout.VERSION_FRAMES
    if any(one.is_cut for one in spec.modalities.values()):
        return layout.VERSION_CUT
    return layout.VERSION_GROWN if grown else layout.VERSION


#: Columns by name: values, little-endian, and attributes.
_Table = dict[str, tuple[npt.NDArray[Any], dict[str, Any]]]


def _table(root: Path, spec: StoreSpec, clips: Sequence[ClipRow]) -> _Table:
    """Return the columns that a list of clips makes.

    Raises:
        StoreError: an id is unsafe or comes twice, or a label is beyond its classes.
    """
    _check_ids(root, clips)
    N = len(clips)
    width = max((len(c.clip_id) for c in clips), default=1)
    ids = np.array([c.clip_id.encode() for c in clips], f"S{width}")
    table: _Table = {"clip_id": (ids.view(np.uint8).reshape(N, width), {"encoding": "ascii"})}
    for head, names in spec.heads.items():
        labels = np.array([c.labels.get(head, -1) for c in clips], "<i4")
        if N and labels.max(initial=-1) >= len(names):
            raise StoreError(f"{root}: head {head}: label {labels.max()} of {len(names)} classes.")
        table[f"label_{head}"] = labels, {"classes": list(names)}
    for column in ("split", "group"):
        values = [getattr(c, column) for c in clips]
        names = tuple(sorted(set(values)))
        code = {name: i for i, name in enumerate(names)}
        table[column] = np.array([code[v] for v in values], "<i4"), {"names": list(names)}
    for column in ("start_s", "stop_s"):
        times = np.array([getattr(c, column) for c in clips], "<f8")
        table[column] = times, {"unit": "second"}
    return table


def _check_ids(root: Path, clips: Sequence[ClipRow]) -> None:
    seen: set[str] = set()
    for clip in clips:
        try:
            files.check_name(clip.clip_id)
        except ValueError as error:
            raise StoreError(f"{root}: clip_id={clip.clip_id!r}: {error}.") from None
        if clip.clip_id.casefold() in seen:
            raise StoreError(f"{root}: duplicate clip_id={clip.clip_id!r}.")
        seen.add(clip.clip_id.casefold())


class Catalog:
    """A store's description and its clips, complete or not.

    Raises:
        StoreError: there is no store, or its description does not hold together.
    """

    def __init__(self, root: Path) -> None:
        path = root / layout.SPEC
        if not path.is_file():
            inside = ", ".join(sorted(p.parent.name for p in root.glob(f"*/{layout.SPEC}")))
            if inside:
                raise StoreError(
                    f"{root}: not a feature store, but it contains the stores {inside}."
                )
            where = files.looked_in(root)
            raise StoreError(
                f"{root}: no feature store found{where}; `karmma extract` creates one."
            )
        try:
            description = layout.read_json(root, path)
            layout.check_version(path, description)
            self.root = root
            self.spec = config.build(StoreSpec, description["spec"], str(path))
            for name in (*self.spec.modalities, *self.spec.heads):
                files.check_name(name)
            self.count = int(description["clips"])
            grown = [int(one["clips"]) for one in description.get(_GROWN_FROM, ())]
            self.digest: str = description["clips_sha256"]
            self.splits: list[str] = description["splits"]
            self.groups: list[str] = description["groups"]
            width = int(description["id_bytes"])
            if not (0 <= self.count <= _MAX_CLIPS and 0 < width <= _MAX_ID_BYTES):
                raise StoreError(
                    f"{path}: clips={self.count} with ids of {width} bytes: implausible."
                )
            if grown != sorted({*grown}) or not all(0 < clips < self.count for clips in grown):
                raise StoreError(f"{path}: {_GROWN_FROM} of {grown} clips: implausible.")
            self._starts = [*shard_starts(self.spec, self.count, grown), self.count]
            self.shards = len(self._starts) - 1
            self.version = int(description.get("version", layout.VERSION))
            raw = layout.map_column(root, "clip_id", np.uint8, (self.count, width))
            self.clip_ids: npt.NDArray[np.bytes_] = raw.view(f"S{width}").reshape(self.count)
        except (OSError, KeyError, TypeError, ValueError) as error:
            if isinstance(error, StoreError):
                raise
            raise StoreError(f"{path}: the store's description is damaged ({error}).") from None

    def column(self, name: str, dtype: Any, *shape: int) -> Any:
        """Map a column of the clip table, [clips, *shape].

        Raises:
            StoreError: it is missing or has the wrong size.
        """
        try:
            return layout.map_column(self.root, name, dtype, (self.count, *shape))
        except OSError as error:
            raise StoreError(f"{self.root}: the clip table is damaged ({error}).") from None

    def names(self, column: str) -> npt.NDArray[np.str_]:
        """Return the ``split`` or ``group`` of each clip, [clips]."""
        names = np.array({"split": self.splits, "group": self.groups}[column], np.str_)
        codes = self.column(column, "<i4")
        _check_range(f"{self.root}: {column}", codes, 0, len(names))
        return names[codes]

    def labels(self, head: str) -> npt.NDArray[np.int32]:
        """Map the labels of a head [clips], -1 unknown.

        Raises:
            StoreError: a label lies outside the head's classes.
        """
        labels: npt.NDArray[np.int32] = self.column(f"label_{head}", "<i4")
        _check_range(f"{self.root}: head {head}: label", labels, -1, len(self.spec.heads[head]))
        return labels

    def shard_range(self, shard: int) -> range:
        """Return the clip numbers of a shard."""
        return range(self._starts[shard], self._starts[shard + 1])

    @property
    def shard_of(self) -> npt.NDArray[np.int64]:
        """The shard of each clip [clips]."""
        return np.repeat(np.arange(self.shards), np.diff(self._starts))

    def clips_in(self, shard: int) -> list[str]:
        """Return the ids of a shard's clips, in order; damaged bytes show as escapes."""
        return [
            self.clip_ids[i].decode("ascii", "backslashreplace") for i in self.shard_range(shard)
        ]

    def read_record(self, shard: int) -> Record:
        """Read the commit record of a shard.

        Raises:
            StoreError: it is missing, damaged, or does not fit the store.
        """
        path = layout.record_file(self.root, shard)
        try:
            return self.parse_record(shard, layout.read_bytes(self.root, path))
        except FileNotFoundError:
            raise StoreError(
                f"{path}: shard {shard} is missing; run `karmma extract` with the same recipe "
                "again."
            ) from None
        except OSError as error:
            raise StoreError(f"{path}: the commit record cannot be read ({error}).") from None

    def parse_record(self, shard: int, data: bytes) -> Record:
        """Check the bytes of a shard's commit record; see `read_record`."""
        path = layout.record_file(self.root, shard)
        return parse_record(path, data, self.spec, len(self.shard_range(shard)))

    def absent(self, shard: int) -> Iterator[tuple[str, str, Reason]]:
        """Yield clip, modality and reason of everything that a committed shard lacks."""
        ids, reasons = self.clips_in(shard), self.read_record(shard).reason
        for clip, column in np.argwhere(reasons != Reason.PRESENT).tolist():
            yield ids[clip], self.spec.order[column], Reason(int(reasons[clip, column]))

    def committed(self) -> set[int]:
        """Return the shards that are whole."""
        try:
            names = {path.name for path in layout.record_file(self.root, 0).parent.iterdir()}
        except FileNotFoundError:
            return set()
        return {s for s in range(self.shards) if layout.record_file(self.root, s).name in names}


def _check_range(what: str, values: npt.NDArray[np.int32], low: int, high: int) -> None:
    if len(values) and not (low <= values.min() and values.max() < high):
        raise StoreError(
            f"{what}: {values.min()} to {values.max()} must be between {low} and {high - 1}; "
            "the clip table is damaged."
        )
