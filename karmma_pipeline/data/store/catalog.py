"""The list of clips of a store: made once before any job writes, the same for all of them."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from karmma_pipeline import config, files
from karmma_pipeline.data.manifest import check_clip_id
from karmma_pipeline.data.store import layout
from karmma_pipeline.data.store.spec import ClipRow, StoreSpec
from karmma_pipeline.errors import StoreError


def create_store(root: Path, spec: StoreSpec, clips: Sequence[ClipRow]) -> None:
    """Make an empty store, or check that the one that is there is the same.

    Raises:
        StoreError: the folder holds a store of another recipe or other clips (the first
            differences are named), or something else, or a clip id is unsafe.
    """
    description = _describe(spec, clips)
    path = root / layout.SPEC
    if path.is_file():
        found = layout.read_json(path)
        differences = list(_differences(found, description))
        if differences:
            raise StoreError(
                f"{root}: was made differently: {'; '.join(differences[:5])}; "
                "choose another folder, or the recipe that it was made with."
            )
        return
    ours = (root / "zarr.json").is_file()  # left by a run that was stopped right here
    if not ours and root.is_dir() and any(not files.is_temporary(p) for p in root.iterdir()):
        raise StoreError(f"{root}: the folder holds other files; choose an empty one.")
    files.write_json(
        root / "zarr.json", layout.zarr_group({"format": layout.FORMAT, "version": layout.VERSION})
    )
    _write_table(root, clips, spec)
    shards = shard_total(spec, len(clips))
    for modality, one in spec.modalities.items():
        folder = root / modality
        files.write_json(folder / "zarr.json", layout.zarr_group(one.provenance))
        tokens = layout.zarr_tokens(one, spec.clips_per_shard, shards)
        files.write_json(folder / "tokens" / "zarr.json", tokens)
    files.write_json(path, description)  # last: its being there means that the rest is


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


def _differences(there: Any, wanted: Any, path: str = "") -> Iterator[str]:
    if isinstance(there, Mapping) and isinstance(wanted, Mapping):
        for key in sorted({*there, *wanted}, key=str):
            name = f"{path}.{key}" if path else str(key)
            yield from _differences(there.get(key), wanted.get(key), name)
    elif there != wanted:
        yield f"{path} is {there!r} there and {wanted!r} here"


def _write_table(root: Path, clips: Sequence[ClipRow], spec: StoreSpec) -> None:
    seen: set[str] = set()
    for clip in clips:
        try:
            check_clip_id(clip.clip_id)
        except ValueError as error:
            raise StoreError(f"{root}: clip_id={clip.clip_id!r}: {error}.") from None
        if clip.clip_id.casefold() in seen:
            raise StoreError(f"{root}: clip_id={clip.clip_id!r} stands twice.")
        seen.add(clip.clip_id.casefold())
    N = len(clips)
    width = max((len(c.clip_id) for c in clips), default=1)
    ids = np.array([c.clip_id.encode() for c in clips], f"S{width}")
    files.write_json(root / "clips" / "zarr.json", layout.zarr_group({}))
    layout.write_column(root, "clip_id", ids.view(np.uint8).reshape(N, width), encoding="ascii")
    for head, names in spec.heads.items():
        labels = np.array([c.labels.get(head, -1) for c in clips], np.int32)
        if N and labels.max(initial=-1) >= len(names):
            raise StoreError(f"{root}: head {head}: label {labels.max()} of {len(names)} classes.")
        layout.write_column(root, f"label_{head}", labels, classes=list(names))
    for column in ("split", "group"):
        values = [getattr(c, column) for c in clips]
        names = tuple(sorted(set(values)))
        code = {name: i for i, name in enumerate(names)}
        codes = np.array([code[v] for v in values], np.int32)
        layout.write_column(root, column, codes, names=list(names))
    for column in ("start_s", "stop_s"):
        times = np.array([getattr(c, column) for c in clips], np.float64)
        layout.write_column(root, column, times, unit="second")


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
            found = layout.read_json(path)
            if (found.get("format"), found.get("version")) != (layout.FORMAT, layout.VERSION):
                raise StoreError(
                    f"{path}: format {found.get('format')!r} version {found.get('version')!r}, "
                    f"this program reads {layout.FORMAT!r} version {layout.VERSION}."
                )
            self.root = root
            self.spec = config.build(StoreSpec, found["spec"], str(path))
            for name in (*self.spec.modalities, *self.spec.heads):
                check_clip_id(name)
            self.count = int(found["clips"])
            self.shards = shard_total(self.spec, self.count)
            self.digest: str = found["clips_sha256"]
            self.splits: list[str] = found["splits"]
            self.groups: list[str] = found["groups"]
            width = int(found["id_bytes"])
            raw = layout.map_column(root, "clip_id", np.uint8, (self.count, width))
            self.clip_ids = np.ascontiguousarray(raw).view(f"S{width}").reshape(self.count)
        except (OSError, KeyError, TypeError, ValueError) as error:
            if isinstance(error, StoreError):
                raise
            raise StoreError(f"{path}: the store's description is damaged ({error}).") from None

    def column(self, name: str, dtype: Any) -> Any:
        """Map a column of the clip table, [clips]."""
        try:
            return layout.map_column(self.root, name, dtype, (self.count,))
        except OSError as error:
            raise StoreError(f"{self.root}: the clip table is damaged ({error}).") from None

    def shard_range(self, shard: int) -> range:
        """Return the clip numbers of a shard."""
        size = self.spec.clips_per_shard
        return range(shard * size, min((shard + 1) * size, self.count))

    def clips_in(self, shard: int) -> list[str]:
        """Return the ids of a shard's clips, in order."""
        return [self.clip_ids[i].decode() for i in self.shard_range(shard)]

    def committed(self) -> set[int]:
        """Return the shards that are whole."""
        return {s for s in range(self.shards) if layout.record_file(self.root, s).is_file()}
