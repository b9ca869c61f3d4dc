"""Batches of cached tokens with their modality masks, gathered ahead by a thread.

Order and masks depend on (seed, epoch) and the clips alone: the same for any number of
threads or ranks, and after a resume. B clips in a batch, M modalities, N tokens, D width.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from karmma_pipeline.data.masks import ORDER, clip_keys, draws, modality_mask

_AHEAD = 2
"""Batches that are gathered before they are asked for."""


@dataclass
class Batch:
    """Tensors of a batch, on the CPU; absent clips' tokens are zeros.

    tokens: modality to [B, N, D] in the store's type. present and mask: bool [B, M], what
    clips natively have and what is left after modality dropout. labels: head to int64 [B].
    clip_index: int64 [B], the clips' place in the store.
    """

    tokens: dict[str, Tensor]
    present: Tensor
    mask: Tensor
    labels: dict[str, Tensor]
    clip_index: Tensor


class TokenSource(Protocol):
    """What the loader needs of a store."""

    modalities: tuple[str, ...]
    clip_ids: npt.NDArray[np.bytes_]
    present: npt.NDArray[np.bool_]
    labels: dict[str, npt.NDArray[np.int32]]

    def gather(self, modality: str, index: Tensor, out: Tensor | None = None) -> Tensor:
        """Return tokens [B, N, D]."""


class FeatureLoader:
    """Iterates over clips of a store.

    Args:
        store: where tokens come from.
        indices: int64, the clips to go through.
        batch_size: clips of a batch over all ranks together.
        seed: of order and masks.
        p: probability with which each present modality drops.
        shuffle: a new order each epoch, else that of ``indices``.
        order: draws an epoch instead: its number to as many places in ``indices`` as there are.
        threads: that gather ahead; 0 gathers when asked.
        rank, world_size: this process takes every ``world_size``-th clip of each batch; no
            clip is repeated to fill up.
        pin: page-locked memory, for copies to a GPU.
        drop_last: leave out an incomplete last batch.
    """

    def __init__(
        self,
        store: TokenSource,
        indices: Sequence[int] | npt.NDArray[np.integer],
        batch_size: int,
        *,
        seed: int = 0,
        p: float = 0.0,
        shuffle: bool = False,
        order: Callable[[int], npt.NDArray[np.int64]] | None = None,
        threads: int = 1,
        rank: int = 0,
        world_size: int = 1,
        pin: bool = False,
        drop_last: bool = False,
    ) -> None:
        self.store, self.indices = store, np.asarray(indices, np.int64)
        self.batch_size, self.seed, self.p = batch_size, seed, p
        self.shuffle, self.order, self.threads, self.pin = shuffle, order, threads, pin
        self.rank, self.world_size, self.drop_last = rank, world_size, drop_last
        self._keys = clip_keys(store.clip_ids[self.indices])

    def __len__(self) -> int:
        whole, rest = divmod(len(self.indices), self.batch_size)
        return whole + (1 if rest and not self.drop_last else 0)

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[Batch]:
        """Yield the batches of an epoch from number ``start_batch`` on."""
        places = np.arange(len(self.indices))
        if self.order is not None:
            places = self.order(epoch)
        elif self.shuffle:
            places = np.argsort(draws(self.seed, epoch, self._keys, ORDER), kind="stable")
        parts = (
            places[b * self.batch_size : (b + 1) * self.batch_size][self.rank :: self.world_size]
            for b in range(start_batch, len(self))
        )
        if self.threads == 0:
            yield from (self._load(part, epoch) for part in parts)
            return
        pool = ThreadPoolExecutor(self.threads, "loader")
        try:
            waiting = deque(pool.submit(self._load, part, epoch) for part in islice(parts, _AHEAD))
            while waiting:
                batch = waiting.popleft().result()
                waiting.extend(pool.submit(self._load, part, epoch) for part in islice(parts, 1))
                yield batch
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _load(self, places: npt.NDArray[np.int64], epoch: int) -> Batch:
        clips = self.indices[places]
        present = self.store.present[clips]
        mask = modality_mask(self.seed, epoch, self._keys[places], present, self.p)
        index = torch.from_numpy(clips)
        tokens = {m: self.store.gather(m, index) for m in self.store.modalities}
        if self.pin:
            tokens = {m: t.pin_memory() for m, t in tokens.items()}
        labels = {
            head: torch.from_numpy(np.asarray(of[clips], np.int64))
            for head, of in self.store.labels.items()
        }
        return Batch(tokens, torch.from_numpy(present), torch.from_numpy(mask), labels, index)
