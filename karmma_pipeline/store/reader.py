"""Opens a complete store and gathers batches out of memory-mapped shards."""

import os
import threading
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from torch import Tensor

from karmma_pipeline.errors import StoreError
from karmma_pipeline.modalities import Reason
from karmma_pipeline.store.catalog import Catalog
from karmma_pipeline.store.format import paths
from karmma_pipeline.store.mapping import ClipLocations, MappedClips, Payload
from karmma_pipeline.store.source import StoredTensor, gather_dense, parts_of
from karmma_pipeline.store.spec import ModalitySpec


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
        manifest = paths.read_manifest(self.path)
        self.digest: str = manifest["digest"]
        if manifest["clips"] != len(self):
            raise StoreError(f"{self.path}: the manifest and {paths.SPEC} count other clips.")
        self.reasons: npt.NDArray[np.uint8] = self._catalog.column(
            "reason", np.uint8, len(self.modalities)
        )
        if self.reasons.max(initial=0) > max(Reason):
            raise StoreError(f"{self.path}: unknown reason {self.reasons.max()} in the clip table.")
        self.present: npt.NDArray[np.bool_] = np.asarray(self.reasons) == Reason.PRESENT
        self.labels: dict[str, npt.NDArray[np.int32]] = {
            head: self._catalog.labels(head) for head in self.heads
        }
        self._rows: dict[str, MappedClips] = {}
        self._lock = threading.Lock()

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open a store."""
        return cls(path)

    def __len__(self) -> int:
        return self._catalog.count

    def __reduce__(self) -> tuple[Any, ...]:
        return (FeatureStore, (self.path,))

    @cached_property
    def split(self) -> npt.NDArray[np.str_]:
        """Split name of each clip [clips]."""
        return self._catalog.names("split")

    @cached_property
    def group(self) -> npt.NDArray[np.str_]:
        """Group (such as the participant) of each clip [clips]."""
        return self._catalog.names("group")

    @property
    def specs(self) -> dict[str, ModalitySpec]:
        """Modality to how its tokens look."""
        return self.spec.modalities

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
        times: npt.NDArray[np.float64] = self._catalog.column(f"times_{modality}", "<f8", 2, frames)
        return times

    def times_of(self, modality: str, clips: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """Return the sampled times of some clips [B, 2, T], NaN where absent."""
        return np.asarray(self.times(modality)[clips])

    def seconds(self, column: str) -> npt.NDArray[np.float64]:
        """Return ``start_s`` or ``stop_s`` of each clip [clips]; NaN is the file's end."""
        seconds: npt.NDArray[np.float64] = self._catalog.column(column, "<f8")
        return seconds

    def parts(self, modality: str) -> tuple[StoredTensor, ...]:
        """Return what `gather_parts` fills for each clip, see `StoredTensor`."""
        return parts_of(self.spec.modalities[modality])

    def gather(self, modality: str, index: Tensor) -> Tensor:
        """Return tokens [B, N, D] of the clips int64 [B]; absent clips are rows of zeros.

        The type is the store's, float32 where that is int8.
        """
        return gather_dense(self, modality, index)

    def gather_parts(self, modality: str, index: Tensor, out: Sequence[Tensor]) -> None:
        """Fill one tensor [B, *shape] per part (see `parts`), as stored; -1 is an absent clip."""
        if modality not in self._rows:
            with self._lock:
                if modality not in self._rows:
                    arrays = self.spec.modalities[modality].arrays
                    self._rows[modality] = MappedClips(arrays, self.locations(modality))
        self._rows[modality].gather(index, out)

    def locations(self, modality: str) -> ClipLocations:
        """Return where each clip's tokens of a modality lie."""
        one, size = self.spec.modalities[modality], self.spec.clips_per_shard
        shards = self._catalog.shards
        present = self.present[:, self.modalities.index(modality)]
        shard = np.arange(len(self)) // size
        counts = np.bincount(shard[present], minlength=shards)[:shards]
        before = np.concatenate([[0], np.cumsum(counts)])
        position = np.cumsum(present) - 1 - before[shard]
        root = os.path.realpath(self.path)
        payloads = {
            array.name: [
                Payload(
                    root,
                    paths.shard_name(modality, s, array.name),
                    clips * array.clip_bytes,
                    paths.file_bytes(array, size, clips),
                )
                for s, clips in enumerate(counts.tolist())
            ]
            for array in one.arrays
        }
        return ClipLocations(payloads, np.where(present, shard, -1), position)

    def close(self) -> None:
        """Unmap the shards."""
        for rows in self._rows.values():
            rows.close()
        self._rows.clear()
