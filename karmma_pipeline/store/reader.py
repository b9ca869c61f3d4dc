"""Opens a complete store and reads batches from memory-mapped shards."""

import hashlib
import os
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from karmma_pipeline.errors import StoreError
from karmma_pipeline.modalities import Reason
from karmma_pipeline.store.catalog import Catalog
from karmma_pipeline.store.format import layout
from karmma_pipeline.store.mapping import ClipLocations, Payload
from karmma_pipeline.store.source import MappedStore
from karmma_pipeline.views import are_whole


class FeatureStore(MappedStore):
    """A complete feature store, opened read-only. It is pickled as its path.

    Attributes:
        modalities: names in canonical order, the columns of `present` and `reasons`.
        clip_ids: fixed-width ASCII bytes [clips].
        labels: head to int32 [clips], -1 unknown.
        reasons: uint8 [clips, M], see `Reason`; present: bool [clips, M].
        digest: hash of all clips, labels, tokens and settings.

    Raises:
        StoreError: there is no store, it is incomplete, or files are missing or truncated.

    Examples:
        >>> store = km.FeatureStore.open("features/student")
        >>> store.modalities
        ('rgb', 'flow', 'audio')
        >>> len(store) == len(store.clip_ids)
        True
        >>> store.tokens("rgb", store.clip_ids[0]).shape == store.shape("rgb")
        True
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        self.path = Path(path)
        self._catalog = Catalog(self.path)
        self.spec, self.clip_ids = self._catalog.spec, self._catalog.clip_ids
        self.modalities, self.specs = self.spec.order, self.spec.modalities
        self.heads, self.views = dict(self.spec.heads), self.spec.views
        if self.views and not are_whole(self.clip_ids, self.views):
            raise StoreError(
                f"{self.path}: its rows are not {self.views.count} views of each clip, in order; "
                "the clip table is damaged."
            )
        manifest = layout.read_manifest(self.path)
        self.digest = manifest["digest"]
        if manifest["clips"] != len(self):
            raise StoreError(
                f"{self.path}: the manifest and {layout.SPEC} have different numbers of clips."
            )
        self.reasons = self._catalog.column("reason", np.uint8, len(self.modalities))
        if self.reasons.max(initial=0) > max(Reason):
            raise StoreError(f"{self.path}: unknown reason {self.reasons.max()} in the clip table.")
        self.present = np.asarray(self.reasons) == Reason.PRESENT
        self.labels = {head: self._catalog.labels(head) for head in self.heads}

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Open a store. Only its tables are read; tokens are memory-mapped when they are needed.

        Args:
            path: folder of the store.

        Raises:
            StoreError: there is no store, it is incomplete, or files are missing or truncated.
        """
        return cls(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return (FeatureStore, (self.path,))

    @cached_property
    def split(self) -> npt.NDArray[np.str_]:  # type: ignore[override]
        """Split name of each clip [clips]."""
        return self._catalog.names("split")

    @cached_property
    def group(self) -> npt.NDArray[np.str_]:  # type: ignore[override]
        """Group (such as the participant) of each clip [clips]."""
        return self._catalog.names("group")

    @cached_property
    def clip_digests(self) -> npt.NDArray[np.bytes_]:
        """Digest of all that a training sees of each clip, 32 hexadecimal digits [clips].

        Its id, classes by name, split, group and times, why modalities are absent, and the
        checksums of its tokens. Equal clips have equal digests in every store, whatever other
        clips and classes are in its list.
        """
        classes = [np.array([*self.heads[h], ""])[self.labels[h]] for h in sorted(self.heads)]
        checksums = self._catalog.column("crc32c", np.uint32, len(self.modalities))
        columns = (self.seconds("start_s"), self.seconds("stop_s"), self.reasons, checksums)
        numbers = [np.asarray(column) for column in columns]  # a mapped one is slow by the row
        digests = np.zeros(len(self), "S32")
        for i, clip_id in enumerate(self.clip_ids):
            texts = [str(text[i]) for text in (self.split, self.group, *classes)]
            sha = hashlib.sha256(repr((clip_id.decode(), texts)).encode())
            for number in numbers:
                sha.update(number[i].tobytes())
            digests[i] = sha.hexdigest()[:32]
        return digests

    @cached_property
    def shard_digests(self) -> tuple[str, ...]:
        """Digest of each shard's clips, see `clip_digests`.

        A list of clips that grows leaves those of its first shards as they are; clips that are
        extracted again with another outcome change theirs.
        """
        return tuple(
            hashlib.sha256(self.clip_digests[shard.start : shard.stop].tobytes()).hexdigest()
            for shard in map(self._catalog.shard_range, range(self._catalog.shards))
        )

    def times(self, modality: str) -> npt.NDArray[np.float64]:
        """Return the sampling times of a modality in seconds.

        Returns:
            float64 [clips, 2, T]: requested and actual times, NaN if absent.
        """
        frames = self.spec.modalities[modality].frames
        return self._catalog.column(f"times_{modality}", "<f8", 2, frames)

    def times_of(self, modality: str, clips: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """Return the sampled times of some clips [B, 2, T], NaN where absent."""
        return np.asarray(self.times(modality)[clips])

    def seconds(self, column: str) -> npt.NDArray[np.float64]:
        """Return ``start_s`` or ``stop_s`` of the clips, float64 [clips]; NaN: end of the file."""
        return self._catalog.column(column, "<f8")

    def _check_is_current(self) -> None:
        # Whoever makes a shard again takes the manifest away before the first file is replaced.
        with suppress(StoreError):
            if layout.read_manifest(self.path)["digest"] == self.digest:
                return
        raise StoreError(
            f"{self.path}: the store was changed after it was opened; wait until `karmma "
            "extract` has finished, then start again."
        )

    def locate(self, modality: str) -> ClipLocations:
        """Return where each clip's tokens of a modality lie."""
        one, size = self.spec.modalities[modality], self.spec.clips_per_shard
        shards = self._catalog.shards
        present = self.present[:, self.modalities.index(modality)]
        shard = self._catalog.shard_of
        counts = np.bincount(shard[present], minlength=shards)[:shards]
        before = np.concatenate([[0], np.cumsum(counts)])
        position = np.cumsum(present) - 1 - before[shard]
        root = os.path.realpath(self.path)
        payloads = {
            array.name: [
                Payload(
                    root,
                    layout.shard_name(modality, s, array.name),
                    clips * array.clip_bytes,
                    layout.file_bytes(array, size, clips),
                )
                for s, clips in enumerate(counts.tolist())
            ]
            for array in one.arrays
        }
        return ClipLocations(payloads, np.where(present, shard, -1), position)
