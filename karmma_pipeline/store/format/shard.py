"""The bytes that make a shard file Zarr and HDF5 at once.

A shard file is an HDF5 file whose user block (the first 4096 bytes, free for others by the
HDF5 standard) holds the index of a Zarr v3 shard (``index_location: start``). Both point at
the same contiguous tokens, which start at a fixed, page-aligned offset.
"""

from pathlib import Path
from typing import Any

import google_crc32c
import h5py
import numpy as np

from karmma_pipeline.store.format.paths import (
    PAYLOAD_OFFSET,
    USER_BLOCK,
    capacity_rows,
    chunk_rows,
    file_rows,
)
from karmma_pipeline.store.spec import ModalitySpec, StoredArray

_EMPTY = np.uint64(2**64 - 1)
LITTLE = {"name": "bytes", "configuration": {"endian": "little"}}


def crc32c(data: Any, before: int = 0) -> int:
    """Return the CRC-32C (Castagnoli) of bytes, going on from that of the bytes before."""
    return int(google_crc32c.extend(before, bytes(data)))


def shard_index(array: StoredArray, clips_per_shard: int, clips: int) -> bytes:
    """Return the Zarr shard index: (offset, nbytes) per inner chunk, then its crc32c."""
    rows = chunk_rows(array, clips_per_shard)
    size = rows * array.token_bytes
    # Chunks behind the last present clip are "empty" by the standard (all ones), not stored.
    index = np.full((capacity_rows(array, clips_per_shard) // rows, 2), _EMPTY, "<u8")
    used = file_rows(array, clips_per_shard, clips) // rows
    index[:used, 0] = PAYLOAD_OFFSET + size * np.arange(used, dtype=np.uint64)
    index[:used, 1] = size
    data = index.tobytes()
    return data + crc32c(data).to_bytes(4, "little")


def create_shard_file(path: Path, array: StoredArray, clips_per_shard: int, clips: int) -> None:
    """Create a shard file with its index and room for the tokens, which are still undefined."""
    with h5py.File(
        path,
        "w",
        userblock_size=USER_BLOCK,
        libver=("v108", "v110"),
        alignment_threshold=1,
        alignment_interval=4096,
        locking=False,
    ) as file:
        plan = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        # Contiguous and unfiltered, or the tokens could not be mapped. Allocated early and not
        # filled: the writer copies the tokens in behind HDF5's back. No times: equal stores
        # must be equal bytes.
        plan.set_layout(h5py.h5d.CONTIGUOUS)
        plan.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        plan.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
        plan.set_obj_track_times(False)
        rows = file_rows(array, clips_per_shard, clips)
        space = h5py.h5s.create_simple((rows, array.width))
        kind = h5py.h5t.py_create(array.dtype)
        dataset = h5py.h5d.create(file.id, array.name.encode(), kind, space, plan)
        offset = dataset.get_offset()
    if offset != PAYLOAD_OFFSET:
        raise RuntimeError(f"HDF5 put the tokens at {offset}, the format wants {PAYLOAD_OFFSET}")
    # The user block is written last and past HDF5, which neither reads nor checks it.
    with path.open("r+b") as raw:
        raw.write(shard_index(array, clips_per_shard, clips))


def zarr_group(attributes: dict[str, Any]) -> dict[str, Any]:
    """Return the metadata of a Zarr v3 group."""
    return {"zarr_format": 3, "node_type": "group", "attributes": attributes}


def zarr_shards(
    spec: ModalitySpec, array: StoredArray, clips_per_shard: int, shards: int
) -> dict[str, Any]:
    """Return the Zarr v3 metadata of a sharded array of a modality."""
    rows = capacity_rows(array, clips_per_shard)
    sharding = {
        "name": "sharding_indexed",
        "configuration": {
            "chunk_shape": [chunk_rows(array, clips_per_shard), array.width],
            "codecs": [LITTLE],
            "index_codecs": [LITTLE, {"name": "crc32c"}],
            "index_location": "start",
        },
    }
    return zarr_array(
        [max(1, shards) * rows, array.width],
        [rows, array.width],
        array.dtype,
        [sharding],
        {
            "logical_dtype": spec.dtype if array.name == "tokens" else array.dtype.name,
            "tokens_per_clip": spec.tokens,
        },
    )


def zarr_array(
    shape: list[int], chunk: list[int], dtype: np.dtype[Any], codecs: list[Any], attributes: Any
) -> dict[str, Any]:
    """Return the metadata of a Zarr v3 array."""
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": shape,
        "data_type": "uint8" if dtype == np.bool_ else dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": 0,
        "codecs": codecs,
        "attributes": attributes,
    }
