"""Opens a complete store and gathers batches out of memory-mapped shards."""

from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from karmma_pipeline.data.store import layout
from karmma_pipeline.data.store.catalog import Catalog
from karmma_pipeline.data.store.region import Region
from karmma_pipeline.errors import StoreError
from karmma_pipeline.modalities import Reason

_TORCH = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


class FeatureStore:
    """A complete feature store, read-only. Pickles as its path.

    Attributes:
        modalities: names in canonical order, the columns of `present` and `reasons`.
        clip_ids: fixed-width ASCII bytes [clips].
        labels: head to int32 [clips], -1 unknown.
        reasons: uint8 [clips, M], see `Reason`; present: bool [clips, M].
        digest: changes when any clip, label, token or setting changes.

    Raises:
        StoreError: there is no store, it is not complete, or files are missing or cut.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._catalog = Catalog(self.path)
        self.spec, self.clip_ids = self._catalog.spec, self._catalog.clip_ids
        self.modalities = self.spec.order
        self.heads = dict(self.spec.heads)
        manifest = self.path / layout.MANIFEST
        if not manifest.is_file():
            raise StoreError(
                f"{self.path}: the store is not complete; `karmma extract` with the same recipe "
                "makes what is missing, `karmma store finalize` joins the parts."
            )
        try:
            self.digest: str = layout.read_json(manifest)["digest"]
        except (OSError, KeyError, ValueError) as error:
            raise StoreError(f"{manifest}: the file is damaged ({error}).") from None
        N, M = self._catalog.count, len(self.modalities)
        self.reasons: npt.NDArray[np.uint8] = self._column("reason", np.uint8, (N, M))
        self.present: npt.NDArray[np.bool_] = np.asarray(self.reasons) == Reason.PRESENT
        self.labels: dict[str, npt.NDArray[np.int32]] = {
            head: self._column(f"label_{head}", "<i4", (N,)) for head in self.heads
        }
        self._regions: dict[str, Region] = {}
        self._views: dict[str, tuple[Tensor, Tensor]] = {}

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open a store."""
        return cls(path)

    def __len__(self) -> int:
        return self._catalog.count

    def __reduce__(self) -> tuple[Any, ...]:
        return (FeatureStore, (self.path,))

    def _column(self, name: str, dtype: Any, shape: tuple[int, ...]) -> Any:
        try:
            return layout.map_column(self.path, name, dtype, shape)
        except OSError as error:
            raise StoreError(f"{self.path}: the clip table is damaged ({error}).") from None

    @cached_property
    def split(self) -> npt.NDArray[np.str_]:
        """Split name of each clip [clips]."""
        codes = self._column("split", "<i4", (len(self),))
        return np.array(self._catalog.splits)[codes]

    @cached_property
    def group(self) -> npt.NDArray[np.str_]:
        """Group (such as the participant) of each clip [clips]."""
        codes = self._column("group", "<i4", (len(self),))
        return np.array(self._catalog.groups)[codes]

    @property
    def provenance(self) -> dict[str, dict[str, Any]]:
        """Modality to where its tokens come from."""
        return {m: self.spec.modalities[m].provenance for m in self.modalities}

    def shape(self, modality: str) -> tuple[int, int]:
        """Return tokens N and width D of a modality."""
        one = self.spec.modalities[modality]
        return one.tokens, one.width

    def times(self, modality: str) -> npt.NDArray[np.float64]:
        """Return the sampled times [clips, 2, T]: requested and real seconds, NaN if absent."""
        frames = self.spec.modalities[modality].frames
        found: npt.NDArray[np.float64] = self._column(
            f"times_{modality}", "<f8", (len(self), 2, frames)
        )
        return found

    def gather(self, modality: str, index: Tensor, out: Tensor | None = None) -> Tensor:
        """Return tokens [B, N, D] of the clips int64 [B]; absent clips are rows of zeros.

        The type is the store's; ``out`` may be a preallocated (pinned) tensor of that shape.
        """
        if modality not in self._views:
            self._views[modality] = self._map(modality)
        rows, row_of_clip = self._views[modality]
        one = self.spec.modalities[modality]
        flat = None if out is None else out.view(rows.dtype).view(len(index), -1)
        found = torch.index_select(rows, 0, row_of_clip[index], out=flat)
        if out is not None:
            return out
        return found.view(_TORCH[one.dtype]).view(len(index), one.tokens, one.width)

    def _map(self, modality: str) -> tuple[Tensor, Tensor]:
        catalog, one = self._catalog, self.spec.modalities[modality]
        size = self.spec.clips_per_shard
        present = self.present[:, self.modalities.index(modality)]
        shard_of = np.arange(len(self)) // size
        counts = np.bincount(shard_of, present, catalog.shards).astype(np.int64)
        paths = [layout.shard_file(self.path, modality, s) for s in range(catalog.shards)]
        for path, clips in zip(paths, counts, strict=True):
            _check_size(path, layout.file_bytes(one, size, int(clips)))
        payloads = [max(1, int(c) * one.clip_bytes) for c in counts]
        try:
            region = Region(paths, payloads, layout.PAYLOAD_OFFSET, one.clip_bytes)
        except OSError as error:
            raise StoreError(f"{self.path}: {modality} cannot be mapped ({error}).") from None
        self._regions[modality] = region
        ranks: npt.NDArray[np.int64] = np.cumsum(present) - present
        base = np.concatenate([[0], np.cumsum(counts)])[:-1] if len(counts) else np.zeros(0, int)
        rows = region.first_row[shard_of] + ranks - base[shard_of]
        words = torch.from_numpy(region.rows()).view(_WORDS[one.disk_dtype.itemsize])
        return words, torch.from_numpy(np.where(present, rows, Region.ZERO))

    def close(self) -> None:
        """Unmap the shards."""
        self._views.clear()
        for region in self._regions.values():
            region.close()
        self._regions.clear()


_WORDS = {2: torch.int16, 4: torch.int32}


def _check_size(path: Path, size: int) -> None:
    try:
        found = path.stat().st_size
    except OSError:
        raise StoreError(
            f"{path}: the shard file is missing; remove its commit record and extract again."
        ) from None
    if found != size:
        raise StoreError(f"{path}: has {found} bytes, not {size}; the shard is damaged.")
