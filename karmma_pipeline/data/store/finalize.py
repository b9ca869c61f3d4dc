"""Joins the shards of all jobs into a store that knows its clips without opening its shards."""

import hashlib
from pathlib import Path

import h5py
import numpy as np

from karmma_pipeline import files
from karmma_pipeline.data.store import layout
from karmma_pipeline.data.store.catalog import Catalog
from karmma_pipeline.data.store.record import Record, read_record
from karmma_pipeline.errors import StoreError


def finalize(root: Path) -> None:
    """Complete a store; run again, it changes nothing.

    Raises:
        StoreError: a shard is missing (all of them are named) or damaged.
    """
    catalog = Catalog(root)
    missing = sorted(set(range(catalog.shards)) - catalog.committed())
    if missing:
        listed = ", ".join(map(str, missing[:20])) + (", ..." if len(missing) > 20 else "")
        raise StoreError(
            f"{root}: {len(missing)} of {catalog.shards} shards are missing ({listed}); "
            "run `karmma extract` with the same recipe again, it makes only these."
        )
    manifest = root / layout.MANIFEST
    records = [read_record(catalog, shard) for shard in range(catalog.shards)]
    digest = _digest(catalog)
    if manifest.is_file() and layout.read_json(manifest).get("digest") == digest:
        return
    _write_presence(catalog, records)
    _write_index(catalog, records)
    files.write_json(
        manifest,
        {
            "format": layout.FORMAT,
            "version": layout.VERSION,
            "digest": digest,
            "shards": catalog.shards,
            "clips": catalog.count,
        },
    )  # last: its being there means that the store is complete


def _digest(catalog: Catalog) -> str:
    sha = hashlib.sha256((catalog.root / layout.SPEC).read_bytes())
    for shard in range(catalog.shards):
        sha.update(layout.record_file(catalog.root, shard).read_bytes())
    return sha.hexdigest()


def _write_presence(catalog: Catalog, records: list[Record]) -> None:
    order, spec = catalog.spec.order, catalog.spec
    empty = np.zeros((0, len(order)))
    reason = np.concatenate([empty.astype(np.uint8), *(r.reason for r in records)])
    crc = np.concatenate([empty.astype(np.uint32), *(r.crc32c for r in records)])
    layout.write_column(catalog.root, "reason", reason, modalities=list(order))
    layout.write_column(catalog.root, "crc32c", crc, modalities=list(order))
    for column, m in enumerate(order):
        one = spec.modalities[m]
        capacity = layout.capacity_rows(one, spec.clips_per_shard)
        starts = [
            shard * capacity + one.tokens * (np.cumsum(r.present(column)) - r.present(column))
            for shard, r in enumerate(records)
        ]
        present = reason[:, column] == 0
        start = np.concatenate([np.zeros(0), *starts]).astype(np.int64)
        layout.write_column(catalog.root, f"start_{m}", np.where(present, start, -1))
        layout.write_column(
            catalog.root, f"tokens_{m}", np.where(present, one.tokens, 0).astype(np.int32)
        )
        shape = (0, 2, one.frames)
        times = np.concatenate([np.zeros(shape), *(r.times[m] for r in records)])
        layout.write_column(
            catalog.root, f"times_{m}", times, unit="second", rows=["requested", "real"]
        )


def _write_index(catalog: Catalog, records: list[Record]) -> None:
    """Write the HDF5 view: virtual datasets over the shards, and the clip table."""
    spec = catalog.spec
    with (
        files.replacing(catalog.root / layout.INDEX) as temporary,
        h5py.File(temporary, "w", libver=("v110", "v110"), locking=False) as index,
    ):
        for column, m in enumerate(spec.order):
            one = spec.modalities[m]
            capacity = layout.capacity_rows(one, spec.clips_per_shard)
            shape = (len(records) * capacity, one.width)
            plan = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
            plan.set_obj_track_times(False)
            for shard, record in enumerate(records):
                clips = int(record.present(column).sum())
                rows = layout.file_rows(one, spec.clips_per_shard, clips)
                source = h5py.h5s.create_simple((rows, one.width))
                target = h5py.h5s.create_simple(shape)
                target.select_hyperslab((shard * capacity, 0), (rows, one.width))
                name = str(layout.shard_file(Path(), m, shard)).encode()
                plan.set_virtual(target, name, b"tokens", source)
            kind = h5py.h5t.py_create(one.disk_dtype)
            space = h5py.h5s.create_simple(shape)
            tokens = h5py.h5d.create(_group(index, m).id, b"tokens", kind, space, plan)
            h5py.Dataset(tokens).attrs["logical_dtype"] = one.dtype
        for folder in sorted((catalog.root / "clips").iterdir()):
            if folder.is_dir():
                meta = layout.read_json(folder / "zarr.json")
                raw = layout.map_column(
                    catalog.root, folder.name, meta["data_type"], tuple(meta["shape"])
                )
                _group(index, "clips").create_dataset(folder.name, data=raw, track_times=False)


def _group(index: h5py.File, name: str) -> h5py.Group:
    """Return a group, made without the time of day that h5py would record."""
    if name not in index:
        plan = h5py.h5p.create(h5py.h5p.GROUP_CREATE)
        plan.set_obj_track_times(False)
        h5py.h5g.create(index.id, name.encode(), gcpl=plan)
    return index[name]
