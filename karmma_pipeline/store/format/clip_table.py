"""The clip table: each column is a Zarr array of one raw chunk, which can be mapped."""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from karmma_pipeline import files
from karmma_pipeline.store.format.paths import open_inside
from karmma_pipeline.store.format.shard import LITTLE, zarr_array

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
    path = column_file(root, name, len(shape))
    with files.replacing(path) as temporary, temporary.open("wb") as file:
        yield file
    meta = zarr_array(list(shape), chunk, kind, [LITTLE], attributes)
    files.write_json(root / FOLDER / name / "zarr.json", meta)


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
