"""The commit record of a shard: what each of its clips has, why not, when, and its checksum."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load, save

from karmma_pipeline import files
from karmma_pipeline.data.store import layout
from karmma_pipeline.data.store.catalog import Catalog
from karmma_pipeline.errors import StoreError


@dataclass(frozen=True)
class Record:
    """One row per clip of the shard, in clip order; columns in canonical modality order.

    reason: uint8 [clips, M], 0 is present. crc32c: uint32 [clips, M] of the clip's bytes.
    times: modality to float64 [clips, 2, T], requested and real seconds, NaN where absent.
    """

    reason: npt.NDArray[np.uint8]
    crc32c: npt.NDArray[np.uint32]
    times: Mapping[str, npt.NDArray[np.float64]]

    def to_bytes(self) -> bytes:
        """Serialise; equal records are equal bytes."""
        tensors: dict[str, npt.NDArray[Any]] = {"reason": self.reason, "crc32c": self.crc32c}
        tensors |= {f"times.{m}": np.ascontiguousarray(t) for m, t in self.times.items()}
        return save(tensors)

    def present(self, column: int) -> npt.NDArray[np.bool_]:
        """Return which clips have the modality of a column, bool [clips]."""
        return self.reason[:, column] == 0


def write_record(root: Path, shard: int, record: Record) -> None:
    """Commit a shard: the last write of all."""
    files.write_bytes(layout.record_file(root, shard), record.to_bytes())


def read_record(catalog: Catalog, shard: int) -> Record:
    """Read a shard's record and check that it fits the store.

    Raises:
        StoreError: it is missing, damaged, or of another shape.
    """
    path = layout.record_file(catalog.root, shard)
    clips, spec = len(catalog.shard_range(shard)), catalog.spec
    shape = (clips, len(spec.order))
    try:
        tensors = load(path.read_bytes())
        record = Record(
            tensors["reason"],
            tensors["crc32c"],
            {m: tensors[f"times.{m}"] for m in spec.order},
        )
    except FileNotFoundError:
        raise StoreError(
            f"{path}: shard {shard} is missing; run `karmma extract` with the same recipe again."
        ) from None
    except (OSError, KeyError, SafetensorError) as error:
        raise StoreError(
            f"{path}: the commit record is damaged ({error}); remove it and "
            "extract again, only that shard is made anew."
        ) from None
    fits = record.reason.shape == record.crc32c.shape == shape and all(
        record.times[m].shape == (clips, 2, spec.modalities[m].frames) for m in spec.order
    )
    if not fits:
        raise StoreError(f"{path}: does not fit the store's clips and modalities.")
    return record
