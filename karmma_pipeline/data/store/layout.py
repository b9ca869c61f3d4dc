"""Where things lie in a store, and the bytes that make a shard file Zarr and HDF5 at once.

A shard file is an HDF5 file whose user block (the first 4096 bytes, free for others by the
HDF5 standard) holds the index of a Zarr v3 shard (``index_location: start``). Both point at
the same contiguous tokens, which start at a fixed, page-aligned offset.
"""

import json
import math
from pathlib import Path
from typing import Any

import google_crc32c
import h5py
import numpy as np
import numpy.typing as npt

from karmma_pipeline import files
from karmma_pipeline.data.store.spec import ModalitySpec

FORMAT = "karmma-feature-store"
VERSION = 1
PAYLOAD_OFFSET = 16_384
"""Where the tokens start in every shard file: after user block and HDF5 header."""

_USER_BLOCK = 4096
_MAX_CHUNKS = (_USER_BLOCK - 4) // 16
_CHUNK_BYTES = 1 << 20
_EMPTY = np.uint64(2**64 - 1)

MANIFEST = "manifest.json"
SPEC = "spec.json"
INDEX = "index.h5"


def shard_file(root: Path, modality: str, shard: int) -> Path:
    """Return the file of a shard's tokens (a Zarr chunk key)."""
    return root / modality / "tokens" / "c" / str(shard) / "0"


def record_file(root: Path, shard: int) -> Path:
    """Return the commit record of a shard: written last, so it means that the shard is whole."""
    return root / "commit" / f"{shard:06d}.safetensors"


def spool_folder(root: Path, shard: int) -> Path:
    """Return where a shard lies while it is being written."""
    return root / "spool" / f"{shard:06d}"


def chunk_rows(spec: ModalitySpec, clips_per_shard: int) -> int:
    """Return the token rows of an inner chunk: about 1 MB, at most 255 chunks a shard."""
    wanted = max(1, _CHUNK_BYTES // spec.token_bytes)
    return max(
        min(wanted, clips_per_shard * spec.tokens),
        math.ceil(clips_per_shard * spec.tokens / _MAX_CHUNKS),
    )


def capacity_rows(spec: ModalitySpec, clips_per_shard: int) -> int:
    """Return the token rows that a shard can hold, whole inner chunks."""
    rows = chunk_rows(spec, clips_per_shard)
    return math.ceil(clips_per_shard * spec.tokens / rows) * rows


def file_rows(spec: ModalitySpec, clips_per_shard: int, clips: int) -> int:
    """Return the token rows in a shard file with that many present clips, zero-padded."""
    rows = chunk_rows(spec, clips_per_shard)
    return max(1, math.ceil(clips * spec.tokens / rows)) * rows


def file_bytes(spec: ModalitySpec, clips_per_shard: int, clips: int) -> int:
    """Return the size of a shard file."""
    return PAYLOAD_OFFSET + file_rows(spec, clips_per_shard, clips) * spec.token_bytes


def shard_index(spec: ModalitySpec, clips_per_shard: int, clips: int) -> bytes:
    """Return the Zarr shard index: (offset, nbytes) per inner chunk, then its crc32c."""
    rows = chunk_rows(spec, clips_per_shard)
    size = rows * spec.token_bytes
    index = np.full((capacity_rows(spec, clips_per_shard) // rows, 2), _EMPTY, "<u8")
    used = file_rows(spec, clips_per_shard, clips) // rows
    index[:used, 0] = PAYLOAD_OFFSET + size * np.arange(used, dtype=np.uint64)
    index[:used, 1] = size
    data = index.tobytes()
    return data + int(google_crc32c.value(data)).to_bytes(4, "little")


def create_shard_file(path: Path, spec: ModalitySpec, clips_per_shard: int, clips: int) -> None:
    """Create a shard file with its index and room for the tokens, which are still undefined."""
    with h5py.File(
        path,
        "w",
        userblock_size=_USER_BLOCK,
        libver=("v108", "v110"),
        alignment_threshold=1,
        alignment_interval=4096,
        locking=False,
    ) as file:
        plan = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plan.set_layout(h5py.h5d.CONTIGUOUS)
        plan.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        plan.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
        plan.set_obj_track_times(False)
        rows = file_rows(spec, clips_per_shard, clips)
        space = h5py.h5s.create_simple((rows, spec.width))
        kind = h5py.h5t.py_create(spec.disk_dtype)
        tokens = h5py.h5d.create(file.id, b"tokens", kind, space, plan)
        offset = tokens.get_offset()
    if offset != PAYLOAD_OFFSET:
        raise RuntimeError(f"HDF5 put the tokens at {offset}, the format wants {PAYLOAD_OFFSET}")
    with path.open("r+b") as raw:
        raw.write(shard_index(spec, clips_per_shard, clips))


def zarr_group(attributes: dict[str, Any]) -> dict[str, Any]:
    """Return the metadata of a Zarr v3 group."""
    return {"zarr_format": 3, "node_type": "group", "attributes": attributes}


def zarr_tokens(spec: ModalitySpec, clips_per_shard: int, shards: int) -> dict[str, Any]:
    """Return the Zarr v3 metadata of a modality's sharded token array."""
    rows = capacity_rows(spec, clips_per_shard)
    little = {"name": "bytes", "configuration": {"endian": "little"}}
    sharding = {
        "name": "sharding_indexed",
        "configuration": {
            "chunk_shape": [chunk_rows(spec, clips_per_shard), spec.width],
            "codecs": [little],
            "index_codecs": [little, {"name": "crc32c"}],
            "index_location": "start",
        },
    }
    return _zarr_array(
        [max(1, shards) * rows, spec.width],
        [rows, spec.width],
        spec.disk_dtype,
        [sharding],
        {"logical_dtype": spec.dtype, "tokens_per_clip": spec.tokens},
    )


def _zarr_array(
    shape: list[int], chunk: list[int], dtype: np.dtype[Any], codecs: list[Any], attributes: Any
) -> dict[str, Any]:
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


def write_column(root: Path, name: str, values: npt.NDArray[Any], **attributes: Any) -> None:
    """Write a column of the clip table as a Zarr array of one raw chunk, which can be mapped."""
    values = np.ascontiguousarray(values)
    little = values.astype(values.dtype.newbyteorder("<"), copy=False)
    codecs = [{"name": "bytes", "configuration": {"endian": "little"}}]
    shape = [max(1, side) for side in values.shape]
    files.write_bytes(column_file(root, name, values.ndim), little.tobytes())
    meta = _zarr_array(list(values.shape), shape, values.dtype, codecs, attributes)
    files.write_json(root / "clips" / name / "zarr.json", meta)


def column_file(root: Path, name: str, dimensions: int) -> Path:
    """Return the raw bytes of a clip-table column."""
    return root.joinpath("clips", name, "c", *("0",) * dimensions)


def map_column(root: Path, name: str, dtype: Any, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """Map a clip-table column read-only; its size must be exactly that of the shape."""
    path = column_file(root, name, len(shape))
    if math.prod(shape) == 0:
        return np.zeros(shape, dtype)
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if path.stat().st_size != size:
        raise OSError(f"{path} has {path.stat().st_size} bytes, not {size}")
    return np.memmap(path, dtype, "r", shape=shape)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object."""
    value = json.loads(path.read_text())
    if not isinstance(value, dict):
        raise ValueError(f"{path}: not a JSON object")
    return value
