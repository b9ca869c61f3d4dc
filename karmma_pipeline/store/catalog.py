"""The list of clips of a store: made once before any job writes, the same for all of them."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from karmma_pipeline import config, files
from karmma_pipeline.errors import StoreError
from karmma_pipeline.store.format import clip_table, layout
from karmma_pipeline.store.format.clip_table import Record, parse_record, write_column
from karmma_pipeline.store.format.layout import zarr_group, zarr_shards
from karmma_pipeline.store.spec import ClipRow, StoreSpec


def create_store(root: Path, spec: StoreSpec, clips: Sequence[ClipRow]) -> None:
    """Make an empty store, or check that the one that is there is the same.

    Raises:
        StoreError: the folder holds a store of another recipe or other clips (the first
            differences are named), or something else, or a clip id is unsafe.
    """
    # All parts of an array job come here at once and write equal bytes, each file by a rename; the
    # description is written last and says that the rest is there.
    description = _describe(spec, clips)
    path = root / layout.SPEC
    if path.is_file():
        there = layout.read_json(root, path)
        layout.check_version(path, there)
        differing = sorted(config.differences(there, description))
        if differing:
            raise StoreError(
                f"{root}: was made differently: {'; '.join(differing[:5])}; "
                "choose another folder, or the recipe that it was made with."
            )
        if _has_all(root, spec):
            return
    # zarr.json alone was left by a run that was stopped right here
    elif (
        not (root / layout.ROOT).is_file()
        and root.is_dir()
        and any(not files.is_temporary(p) for p in root.iterdir())
    ):
        raise StoreError(f"{root}: the folder holds other files; choose an empty one.")
    files.write_json(
        root / layout.ROOT, zarr_group({"format": layout.FORMAT, "version": layout.VERSION})
    )
    _write_table(root, clips, spec)
    shards = shard_total(spec, len(clips))
    for modality, one in spec.modalities.items():
        folder = root / modality
        files.write_json(folder / "zarr.json", zarr_group(one.provenance))
        for array in one.arrays:
            meta = zarr_shards(one, array, spec.clips_per_shard, shards)
            files.write_json(folder / array.name / "zarr.json", meta)
    files.write_json(path, description)  # last: its being there means that the rest is


def described_files(spec: StoreSpec) -> dict[str, int]:
    """Return the names of the files that `create_store` writes; columns by dimensions.

    Names are relative to the store; the value is the number of dimensions of a column of the
    clip table, 0 for other files.
    """
    names = {layout.ROOT: 0, f"{clip_table.FOLDER}/zarr.json": 0}
    for m, array in spec.arrays:
        names |= {f"{m}/zarr.json": 0, f"{m}/{array.name}/zarr.json": 0}
    for name in ("clip_id", *(f"label_{h}" for h in spec.heads), *PLAIN):
        dimensions = 2 if name == "clip_id" else 1
        names[f"{clip_table.FOLDER}/{name}/zarr.json"] = 0
        path = clip_table.column_file(Path(), name, dimensions)
        names[str(path)] = dimensions
    return names


def _has_all(root: Path, spec: StoreSpec) -> bool:
    """Tell whether nothing was taken away, as `karmma store verify --repair` does."""
    return all((root / name).is_file() for name in described_files(spec))


#: Columns that every clip table has beside ids and labels.
PLAIN = ("split", "group", "start_s", "stop_s")

_MAX_CLIPS = 100_000_000
_MAX_ID_BYTES = 120


def shard_total(spec: StoreSpec, clips: int) -> int:
    """Return how many shards that many clips make."""
    return -(-clips // spec.clips_per_shard)


def _describe(spec: StoreSpec, clips: Sequence[ClipRow]) -> dict[str, Any]:
    sha = hashlib.sha256()
    for clip in clips:
        labels = [clip.labels.get(head, -1) for head in spec.heads]
        sha.update(repr((clip.clip_id, labels, clip.split, clip.group)).encode())
        sha.update(np.array([clip.start_s, clip.stop_s], "<f8").tobytes())
    return {
        "format": layout.FORMAT,
        "version": layout.VERSION,
        "spec": spec.model_dump(mode="json"),
        "clips": len(clips),
        "clips_sha256": sha.hexdigest(),
        "id_bytes": max((len(c.clip_id) for c in clips), default=1),
        "splits": sorted({c.split for c in clips}),
        "groups": sorted({c.group for c in clips}),
    }


def _write_table(root: Path, clips: Sequence[ClipRow], spec: StoreSpec) -> None:
    seen: set[str] = set()
    for clip in clips:
        try:
            files.check_name(clip.clip_id)
        except ValueError as error:
            raise StoreError(f"{root}: clip_id={clip.clip_id!r}: {error}.") from None
        if clip.clip_id.casefold() in seen:
            raise StoreError(f"{root}: duplicate clip_id={clip.clip_id!r}.")
        seen.add(clip.clip_id.casefold())
    N = len(clips)
    width = max((len(c.clip_id) for c in clips), default=1)
    ids = np.array([c.clip_id.encode() for c in clips], f"S{width}")
    files.write_json(root / clip_table.FOLDER / "zarr.json", zarr_group({}))
    write_column(root, "clip_id", ids.view(np.uint8).reshape(N, width), encoding="ascii")
    for head, names in spec.heads.items():
        labels = np.array([c.labels.get(head, -1) for c in clips], np.int32)
        if N and labels.max(initial=-1) >= len(names):
            raise StoreError(f"{root}: head {head}: label {labels.max()} of {len(names)} classes.")
        write_column(root, f"label_{head}", labels, classes=list(names))
    for column in ("split", "group"):
        values = [getattr(c, column) for c in clips]
        names = tuple(sorted(set(values)))
        code = {name: i for i, name in enumerate(names)}
        codes = np.array([code[v] for v in values], np.int32)
        write_column(root, column, codes, names=list(names))
    for column in ("start_s", "stop_s"):
        times = np.array([getattr(c, column) for c in clips], np.float64)
        write_column(root, column, times, unit="second")


class Catalog:
    """A store's description and its clips, complete or not.

    Raises:
        StoreError: there is no store, or its description does not hold together.
    """

    def __init__(self, root: Path) -> None:
        path = root / layout.SPEC
        if not path.is_file():
            raise StoreError(f"{root}: no feature store is there; `karmma extract` makes one.")
        try:
            description = layout.read_json(root, path)
            layout.check_version(path, description)
            self.root = root
            self.spec = config.build(StoreSpec, description["spec"], str(path))
            for name in (*self.spec.modalities, *self.spec.heads):
                files.check_name(name)
            self.count = int(description["clips"])
            self.shards = shard_total(self.spec, self.count)
            self.digest: str = description["clips_sha256"]
            self.splits: list[str] = description["splits"]
            self.groups: list[str] = description["groups"]
            width = int(description["id_bytes"])
            if not (0 <= self.count <= _MAX_CLIPS and 0 < width <= _MAX_ID_BYTES):
                raise StoreError(
                    f"{path}: clips={self.count} with ids of {width} bytes: implausible."
                )
            raw = clip_table.map_column(root, "clip_id", np.uint8, (self.count, width))
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
            return clip_table.map_column(self.root, name, dtype, (self.count, *shape))
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
        size = self.spec.clips_per_shard
        return range(shard * size, min((shard + 1) * size, self.count))

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
            f"{what}: {values.min()} to {values.max()} must lie in {low}..{high - 1}; "
            "the clip table is damaged."
        )
