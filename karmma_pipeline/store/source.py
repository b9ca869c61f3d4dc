"""The interface of stores for the loader and training.

Torch is imported where tensors are made: to look at a store must not take seconds.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from karmma_pipeline.errors import StoreError
from karmma_pipeline.modalities import Reason
from karmma_pipeline.store.mapping import ClipLocations, MappedClips
from karmma_pipeline.store.spec import ModalitySpec
from karmma_pipeline.views import Views, clip_names

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of one clip as it is stored: tokens [N, D], or beside int8 `scale` [N, 1 or 2]."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def dense(parts: Sequence[Tensor]) -> Tensor:
    """Return tokens [B, N, D] of stored parts, on their device; int8 becomes float32.

    On a GPU this costs nothing that one would see; on a CPU it costs more than the read.
    """
    if len(parts) == 1:
        return parts[0]
    steps, scale = parts[0].float(), parts[1].float()
    if scale.shape[-1] == 2:
        steps.sub_(scale[..., 1:])
    return steps.mul_(scale[..., :1])


class TokenSource(ABC):
    """A store, or several as one.

    modalities: names in canonical order, the columns of present and reasons. specs: how their
    tokens look. clip_ids: bytes [clips]. present: bool [clips, M]. reasons: uint8 [clips, M].
    labels: head to int32 [clips], -1 unknown. heads: class names. split, group: names [clips].
    digest: changes when any clip, label, token or setting changes. views: of each clip; each is one
    of the ``clips`` above, a row, and those of a clip follow one another. None: one row a clip.
    """

    views: Views | None = None
    path: Path
    modalities: tuple[str, ...]
    specs: Mapping[str, ModalitySpec]
    clip_ids: npt.NDArray[np.bytes_]
    present: npt.NDArray[np.bool_]
    reasons: npt.NDArray[np.uint8]
    labels: dict[str, npt.NDArray[np.int32]]
    heads: dict[str, tuple[str, ...]]
    split: npt.NDArray[np.str_]
    group: npt.NDArray[np.str_]
    digest: str

    @property
    @abstractmethod
    def clip_digests(self) -> npt.NDArray[np.bytes_]:
        """Digest of all that a training sees of each clip, 32 hexadecimal digits [clips]."""

    def __len__(self) -> int:
        return len(self.clip_ids)

    def names(self, rows: npt.NDArray[np.int64] | slice = slice(None)) -> npt.NDArray[np.bytes_]:
        """Return the ids of the clips that rows are of: `clip_ids`, without their views."""
        return clip_names(self.clip_ids[rows], self.views)

    @property
    def view_count(self) -> int:
        """Rows V of each clip."""
        return 1 if self.views is None else self.views.count

    @property
    def middle_view(self) -> int:
        """The view that stands for a clip where one must."""
        return 0 if self.views is None else self.views.middle

    def view_rows(
        self, rows: npt.NDArray[np.int64], view: int | None = None
    ) -> npt.NDArray[np.int64]:
        """Return one row of each clip: of ``rows``, which hold all views, those of one view.

        Without a number it is the middle one.
        """
        return rows[self.middle_view if view is None else view :: self.view_count]

    @property
    def provenance(self) -> dict[str, dict[str, Any]]:
        """Modality to where its tokens come from."""
        return {m: self.specs[m].provenance for m in self.modalities}

    def shape(self, modality: str) -> tuple[int, int]:
        """Return the number of tokens N and the width D of a modality."""
        return self.specs[modality].tokens, self.specs[modality].width

    def parts(self, modality: str) -> tuple[StoredTensor, ...]:
        """Return what `gather_parts` fills for each clip, see `StoredTensor`."""
        import torch

        spec = self.specs[modality]
        # Torch names types as stores do.
        types = (getattr(torch, spec.dtype.removesuffix("_affine")), torch.float16)
        return tuple(
            StoredTensor((a.tokens, a.width), t) for a, t in zip(spec.arrays, types, strict=False)
        )

    def empty_parts(
        self, modality: str, clips: int, device: torch.device | None = None
    ) -> tuple[Tensor, ...]:
        """Return new tensors [clips, *shape] for `gather_parts` to fill, undefined."""
        import torch

        return tuple(
            torch.empty(clips, *p.shape, dtype=p.dtype, device=device) for p in self.parts(modality)
        )

    def gather(self, modality: str, index: Tensor) -> Tensor:
        """Return tokens [B, N, D] of the clips int64 [B]; absent clips are rows of zeros.

        The type is the store's, float32 where that is int8.
        """
        parts = self.empty_parts(modality, len(index))
        self.gather_parts(modality, index, parts)
        return dense(parts)

    def tokens(self, modality: str, clip_id: str | bytes) -> npt.NDArray[np.float32]:
        """Return the tokens of one clip, [N, D].

        For training, use `FeatureLoader`, which prefetches batches.

        Args:
            modality: one of `modalities`.
            clip_id: one of `clip_ids`.

        Raises:
            StoreError: there is no such modality or clip, or the clip lacks the modality (with
                the reason).
        """
        import torch

        if modality not in self.modalities:
            known = ", ".join(self.modalities)
            raise StoreError(f"{self.path}: no modality {modality!r}; it has {known}.")
        name = clip_id.encode() if isinstance(clip_id, str) else bytes(clip_id)
        found = np.flatnonzero(self.clip_ids == name)
        if not len(found):
            raise StoreError(f"{self.path}: clip_id={name.decode(errors='replace')!r} not found.")
        reason = Reason(int(self.reasons[found[0], self.modalities.index(modality)]))
        if reason is not Reason.PRESENT:
            raise StoreError(
                f"{self.path}: clip {name.decode()!r} has no {modality} ({reason.label})."
            )
        return self.gather(modality, torch.from_numpy(found))[0].float().numpy()

    def check_files(self) -> None:  # noqa: B027  (what lies in memory has nothing to look at)
        """See that what lies on disk can still be read, such as before an epoch.

        Raises:
            StoreError: a shard that is mapped was cut, so that reading it would end the process.
        """

    @abstractmethod
    def gather_parts(self, modality: str, index: Tensor, out: Sequence[Tensor]) -> None:
        """Fill one tensor [B, *shape] per part (see `parts`), as stored; -1 is an absent clip."""


def check_views(one: TokenSource, other: TokenSource) -> None:
    """Refuse stores whose clips have other views: rows of one id are then not the same view.

    Raises:
        StoreError: they have.
    """
    if one.views != other.views:
        raise StoreError(
            f"{one.path} and {other.path}: have different views per clip ({one.views or 'one'} "
            f"and {other.views or 'one'}); extract both with the same views."
        )


class MappedStore(TokenSource):
    """What stores have in common whose clips are gathered out of mapped shard files."""

    def __init__(self) -> None:
        self._mapped: dict[str, MappedClips] = {}
        self._lock = threading.Lock()

    @abstractmethod
    def locate(self, modality: str) -> ClipLocations:
        """Return where each clip's tokens of a modality lie."""

    def gather_parts(self, modality: str, index: Tensor, out: Sequence[Tensor]) -> None:
        """Fill one tensor [B, *shape] per part (see `parts`), as stored; -1 is an absent clip."""
        if modality not in self._mapped:
            # Threads of a loader come here at once. The second look, under the lock, keeps them
            # from mapping the same files twice; the first spares every later batch the lock.
            with self._lock:
                if modality not in self._mapped:
                    arrays = self.specs[modality].arrays
                    mapped = MappedClips(arrays, self.locate(modality))
                    self._check_is_current()
                    self._mapped[modality] = mapped
        self._mapped[modality].gather(index, out)

    @abstractmethod
    def _check_is_current(self) -> None:
        """See that no shard was made again since the store was opened; what is mapped then stays.

        Raises:
            StoreError: one may have been: its clips lie elsewhere now.
        """

    def check_files(self) -> None:
        """See that no shard that is mapped was cut; see `TokenSource`."""
        for clips in list(self._mapped.values()):
            clips.check()

    def close(self) -> None:
        """Unmap the shards."""
        for clips in self._mapped.values():
            clips.close()
        self._mapped.clear()


class PartOfStore(TokenSource):
    """Some clips of a store, in an order and with classes of one's own.

    Args:
        source: the store.
        clips: which of its clips, int64.
        heads: class names; labels of classes that are not among them become -1.
        digest: of this part.
    """

    def __init__(
        self,
        source: TokenSource,
        clips: npt.NDArray[np.int64],
        heads: Mapping[str, tuple[str, ...]],
        digest: str,
    ) -> None:
        import torch

        self.source, self.clips, self.digest = source, clips, digest
        self._rows = torch.from_numpy(np.append(clips, -1))  # -1, an absent clip, stays -1
        self.path, self.modalities, self.specs = source.path, source.modalities, source.specs
        self.views = source.views
        self.clip_ids, self.present = source.clip_ids[clips], source.present[clips]
        self.reasons = np.asarray(source.reasons)[clips]
        self.split, self.group = source.split[clips], source.group[clips]
        self.heads = {head: tuple(names) for head, names in heads.items()}
        self.labels = {head: self._labels(head) for head in self.heads}
        if (device := getattr(source, "device", None)) is not None:
            self.device = device

    def _labels(self, head: str) -> npt.NDArray[np.int32]:
        numbers = {name: i for i, name in enumerate(self.heads[head])}
        ours = [*(numbers.get(name, -1) for name in self.source.heads[head]), -1]
        return np.array(ours, np.int32)[self.source.labels[head][self.clips]]

    @property
    def clip_digests(self) -> npt.NDArray[np.bytes_]:
        """Digest of all that a training sees of each clip, 32 digits [clips]."""
        return self.source.clip_digests[self.clips]

    def check_files(self) -> None:
        """See that what lies on disk can still be read, see `TokenSource`."""
        self.source.check_files()

    def gather_parts(self, modality: str, index: Tensor, out: Sequence[Tensor]) -> None:
        """Fill one tensor [B, *shape] per part with the clips int64 [B]."""
        self.source.gather_parts(modality, self._rows[index], out)
