"""Finalizes a store: combines the shards of all jobs and writes the clip table."""

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, BinaryIO

import h5py
import numpy as np
import numpy.typing as npt

from karmma_pipeline import files
from karmma_pipeline.errors import StoreError, counted
from karmma_pipeline.modalities import Reason
from karmma_pipeline.store.catalog import Catalog, described_files
from karmma_pipeline.store.format import layout
from karmma_pipeline.store.format.layout import Record, column_writer, crc32c
from karmma_pipeline.store.spec import StoreSpec


def finalize(root: Path) -> None:
    """Complete a store; run again, it changes nothing.

    Raises:
        StoreError: a shard is missing (all of them are named) or damaged.
    """
    catalog = Catalog(root)
    # A missing shard would read as zeros in every Zarr library: it is an error here.
    missing = sorted(set(range(catalog.shards)) - catalog.committed())
    if missing:
        listed = ", ".join(map(str, missing[:20])) + (", ..." if len(missing) > 20 else "")
        raise StoreError(
            f"{root}: {len(missing)} of {counted(catalog.shards, 'shard')} missing ({listed}); run "
            "`karmma extract` with the same recipe again to extract only these."
        )
    # Several last parts may come here at once, and runs come again: where the manifest is that of
    # these records all is done. Others write equal bytes, each file by a rename.
    digest, checksums = _digest(catalog)
    with suppress(StoreError):
        manifest = layout.read_manifest(root)
        if manifest["digest"] == digest and manifest["records"] == checksums:
            return
    present = _write_presence(catalog)
    _write_index(catalog, present)
    content = {
        "format": layout.FORMAT,
        "version": catalog.version,
        "digest": digest,
        "shards": catalog.shards,
        "clips": catalog.count,
        "records": checksums,
        "files": {name: files.sha256(root / name) for name in digested_files(catalog.spec)},
    }
    shutil.rmtree(root / layout.SPOOL, ignore_errors=True)  # of a writer killed after its commit
    files.sweep(files.folders_of(root))
    layout.write_manifest(root, content)  # last: its being there means a complete store
    # Another part may have begun to make a shard again since its record was read above. It takes
    # the manifest away after the record, so that one of the two sees what the other did.
    with suppress(StoreError):
        if len(catalog.committed()) == catalog.shards and _digest(catalog) == (digest, checksums):
            return
    (root / layout.MANIFEST).unlink(missing_ok=True)
    raise StoreError(f"{root}: another process is rebuilding shards and will finalize the store.")


def digested_files(spec: StoreSpec) -> list[str]:
    """Return the files, relative to the store, whose digests the manifest keeps."""
    names = [layout.SPEC, layout.INDEX, *described_files(spec)]
    for name, (_, shape) in _presence_columns(spec, 0).items():
        names.append(f"{layout.CLIPS}/{name}/zarr.json")
        names.append(str(layout.column_file(Path(), name, len(shape))))
    return names


def _digest(catalog: Catalog) -> tuple[str, list[int]]:
    """Return the store's digest, and the checksum of each commit record."""
    sha = hashlib.sha256((catalog.root / layout.SPEC).read_bytes())
    checksums = []
    for shard in range(catalog.shards):
        path = layout.record_file(catalog.root, shard)
        data = layout.read_bytes(catalog.root, path)
        sha.update(catalog.parse_record(shard, data).content(with_files=False))
        checksums.append(crc32c(data))
    return sha.hexdigest(), checksums


def _presence_columns(spec: StoreSpec, count: int) -> dict[str, tuple[Any, tuple[int, ...]]]:
    """Return type and shape of the columns that are made from the commit records."""
    M = len(spec.order)
    columns: dict[str, tuple[Any, tuple[int, ...]]] = {
        "reason": (np.uint8, (count, M)),
        "crc32c": (np.uint32, (count, M)),
    }
    for m, one in spec.modalities.items():
        columns[f"start_{m}"] = (np.int64, (count,))
        columns[f"tokens_{m}"] = (np.int32, (count,))
        columns[f"times_{m}"] = (np.float64, (count, 2, one.frames))
    return columns


def _write_presence(catalog: Catalog) -> npt.NDArray[np.int64]:
    """Write these columns shard by shard, and return present clips, int64 [shards, M]."""
    spec = catalog.spec
    present = np.zeros((catalog.shards, len(spec.order)), np.int64)
    with ExitStack() as stack:
        writers: dict[str, BinaryIO] = {}
        for name, (dtype, shape) in _presence_columns(spec, catalog.count).items():
            attributes: dict[str, Any] = {}
            if name in {"reason", "crc32c"}:
                attributes = {"modalities": list(spec.order)}
            elif name.startswith("times_"):
                attributes = {"unit": "second", "rows": ["requested", "real"]}
            writer = column_writer(catalog.root, name, dtype, shape, **attributes)
            writers[name] = stack.enter_context(writer)
        # A shard at a time: a column is never in memory as a whole, however many clips there are.
        for shard in range(catalog.shards):
            record = catalog.read_record(shard)
            present[shard] = (record.reason == Reason.PRESENT).sum(axis=0)
            for name, values in _shard_columns(spec, shard, record):
                writers[name].write(values.astype(values.dtype.newbyteorder("<")).tobytes())
    return present


def _shard_columns(
    spec: StoreSpec, shard: int, record: Record
) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    yield "reason", record.reason
    yield "crc32c", record.crc32c
    for column, m in enumerate(spec.order):
        one, here = spec.modalities[m], record.present(column)
        first = shard * layout.capacity_rows(one.arrays[0], spec.clips_per_shard)
        # Shards lie at fixed distances in the Zarr array, present clips one behind another in each.
        starts = first + one.tokens * (np.cumsum(here, dtype=np.int64) - here)
        yield f"start_{m}", np.where(here, starts, -1).astype(np.int64)
        yield f"tokens_{m}", np.where(here, one.tokens, 0).astype(np.int32)
        yield f"times_{m}", record.times[m]


def _write_index(catalog: Catalog, present: npt.NDArray[np.int64]) -> None:
    """Write the HDF5 view: virtual datasets over the shards, and the clip table.

    Made in memory: the HDF5 library ends the process where a write of its own fails.
    """
    settings: dict[str, Any] = {"driver": "core", "backing_store": False, "locking": False}
    with h5py.File(layout.INDEX, "w", libver=("v110", "v110"), **settings) as index:
        _fill_index(index, catalog, present)
        index.flush()
        image = index.id.get_file_image()
    files.write_bytes(catalog.root / layout.INDEX, image)


def _fill_index(index: h5py.File, catalog: Catalog, present: npt.NDArray[np.int64]) -> None:
    spec = catalog.spec
    for m, array in spec.arrays:
        clips = present[:, spec.order.index(m)]
        capacity = layout.capacity_rows(array, spec.clips_per_shard)
        shape = (catalog.shards * capacity, array.width)
        plan = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plan.set_obj_track_times(False)
        for shard in range(catalog.shards):
            rows = layout.file_rows(array, spec.clips_per_shard, int(clips[shard]))
            source = h5py.h5s.create_simple((rows, array.width))
            target = h5py.h5s.create_simple(shape)
            target.select_hyperslab((shard * capacity, 0), (rows, array.width))
            name = str(layout.shard_file(Path(), m, shard, array.name)).encode()
            plan.set_virtual(target, name, array.name.encode(), source)
        kind = h5py.h5t.py_create(array.dtype)
        space = h5py.h5s.create_simple(shape)
        group = _group(index, m).id
        made = h5py.h5d.create(group, array.name.encode(), kind, space, plan)
        if array.name == "tokens":
            h5py.Dataset(made).attrs["logical_dtype"] = spec.modalities[m].dtype
    table = _group(index, layout.CLIPS)
    names = [Path(n).parts for n in digested_files(spec) if n.startswith(layout.CLIPS)]
    for column in sorted({parts[1] for parts in names if len(parts) > 2}):
        meta = layout.read_json(catalog.root, catalog.root / layout.CLIPS / column / "zarr.json")
        shape = tuple(meta["shape"])
        raw = layout.map_column(catalog.root, column, meta["data_type"], shape)
        table.create_dataset(column, data=raw, track_times=False)


def _group(index: h5py.File, name: str) -> h5py.Group:
    """Return a group, made without the time of day that h5py would record."""
    if name not in index:
        plan = h5py.h5p.create(h5py.h5p.GROUP_CREATE)
        plan.set_obj_track_times(False)
        h5py.h5g.create(index.id, name.encode(), gcpl=plan)
    return index[name]
