"""The clip table of a store, and the commit record of a shard.

A column is a Zarr array of one raw chunk, which can be mapped. A commit record says what each clip
of a shard has, why not, when, and checksums; a shard without one does not count.
"""

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load, save

from karmma_pipeline import files
from karmma_pipeline.errors import StoreError
from karmma_pipeline.modalities import Reason
from karmma_pipeline.store.format import layout
from karmma_pipeline.store.format.layout import LITTLE, crc32c, open_inside, zarr_array
from karmma_pipeline.store.spec import StoreSpec

FOLDER = "clips"


def column_file(root: Path, name: str, dimensions: int) -> Path:
    """Return the raw bytes of a column."""
    return root.joinpath(FOLDER, name, "c", *("0",) * dimensions)


@contextmanager
def column_writer(
    root: Path, name: str, dtype: Any, shape: tuple[int, ...], **attributes: Any
) -> Iterator[BinaryIO]:
    """Yield a file that takes the column's bytes, little-endian, in the order of the clips."""
    kind = np.dtype(dtype)
    chunk = [max(1, side) for side in shape]
    meta = zarr_array(list(shape), chunk, kind, [LITTLE], attributes)
    files.write_json(root / FOLDER / name / "zarr.json", meta)
    path = column_file(root, name, len(shape))
    with files.replacing(path) as temporary, temporary.open("wb") as file:
        yield file


def write_column(root: Path, name: str, values: npt.NDArray[Any], **attributes: Any) -> None:
    """Write a whole column."""
    little = np.ascontiguousarray(values, values.dtype.newbyteorder("<"))
    with column_writer(root, name, values.dtype, values.shape, **attributes) as file:
        file.write(little.tobytes())


def map_column(root: Path, name: str, dtype: Any, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """Map a column read-only.

    Raises:
        OSError: it is missing, or its size is not exactly that of the shape.
        StoreError: it is a link.
    """
    path = column_file(root, name, len(shape))
    size = math.prod(shape) * np.dtype(dtype).itemsize
    with os.fdopen(open_inside(root, path), "rb") as file:
        actual = os.fstat(file.fileno()).st_size
        if actual != size:
            raise OSError(f"{path} has {actual} bytes, not {size}")
        if size == 0:  # an empty file cannot be mapped
            return np.zeros(shape, dtype)
        return np.memmap(file, dtype, "r", shape=shape)


@dataclass(frozen=True)
class Record:
    """One row per clip of the shard, in clip order; columns in canonical modality order.

    reason: uint8 [clips, M], 0 is present. crc32c: uint32 [clips, M] of the clip's bytes.
    times: modality to float64 [clips, 2, T], requested and real seconds, NaN where absent.
    files: uint32, CRC-32C of each of the shard's files in the order of `StoreSpec.arrays`.
    """

    reason: npt.NDArray[np.uint8]
    crc32c: npt.NDArray[np.uint32]
    times: Mapping[str, npt.NDArray[np.float64]]
    files: npt.NDArray[np.uint32]

    def to_bytes(self) -> bytes:
        """Serialise; equal records are equal bytes."""
        tensors: dict[str, npt.NDArray[Any]] = {
            "reason": self.reason,
            "crc32c": self.crc32c,
            "files": self.files,
            "self": np.array([crc32c(self.content())], np.uint32),
        }
        tensors |= {f"times.{m}": np.ascontiguousarray(t) for m, t in self.times.items()}
        return save(tensors)

    def content(self, *, with_files: bool = True) -> bytes:
        """Return everything that it says; without the files' checksums, only of the clips."""
        parts: list[npt.NDArray[Any]] = [self.reason, self.crc32c]
        parts += [self.times[m] for m in sorted(self.times)]
        parts += [self.files] if with_files else []
        return b"".join(part.tobytes() for part in parts)

    def present(self, column: int) -> npt.NDArray[np.bool_]:
        """Return which clips have the modality of a column, bool [clips]."""
        return self.reason[:, column] == Reason.PRESENT


def write_record(root: Path, shard: int, record: Record) -> None:
    """Commit a shard: the last write of all."""
    files.write_bytes(layout.record_file(root, shard), record.to_bytes())


def parse_record(path: Path, data: bytes, spec: StoreSpec, clips: int) -> Record:
    """Check the bytes of a record against themselves and the store.

    Args:
        path: named in errors.
        data: the record's bytes.
        spec: of the store.
        clips: of the shard.

    Raises:
        StoreError: it is damaged, or of another shape.
    """
    try:
        tensors = load(data)
        times = {m: tensors[f"times.{m}"] for m in spec.order}
        record = Record(tensors["reason"], tensors["crc32c"], times, tensors["files"])
        own = tensors["self"].tolist()
    except (KeyError, SafetensorError) as error:
        raise _damaged(path, str(error)) from None
    # Shapes before the checksum: a record that fits byte by byte may still be another store's.
    kinds = [t.dtype.name for t in (record.reason, record.crc32c, record.files)]
    fits = (
        kinds == ["uint8", "uint32", "uint32"]
        and record.reason.shape == record.crc32c.shape == (clips, len(spec.order))
        and record.files.shape == (len(spec.arrays),)
        and all(
            t.shape == (clips, 2, spec.modalities[m].frames) and t.dtype == np.float64
            for m, t in times.items()
        )
    )
    if not fits:
        raise StoreError(f"{path}: does not match the store's clips and modalities.")
    if own != [crc32c(record.content())] or record.reason.max(initial=0) > max(Reason):
        raise _damaged(path, "checksum mismatch")
    return record


def _damaged(path: Path, why: str) -> StoreError:
    return StoreError(
        f"{path}: the commit record is damaged ({why}); remove it and extract again; only that "
        "shard is rebuilt."
    )
