"""Batches of cached tokens with their modality masks, gathered ahead by a thread.

Order and masks depend on (seed, epoch) and the clips alone: the same for any number of
threads or ranks, and after a resume. B clips in a batch, M modalities, N tokens, D width.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from karmma_pipeline.data.loading.buffers import BufferPool, Slot, copy_to
from karmma_pipeline.data.loading.masks import ORDER, clip_keys, draws, modality_mask
from karmma_pipeline.data.loading.settings import LoaderSettings as LoaderSettings
from karmma_pipeline.store.source import TokenSource, dense


@dataclass
class Batch:
    """Tensors of a batch, valid for as long as they are held; absent clips' tokens are zeros.

    tokens: modality to [B, N, D] as stored. scales: float16 [B, N, 1 or 2] for those
    in int8. present and mask: bool [B, M], what clips natively have and what is left after modality
    dropout. labels: head to int64 [B]. clip_index: int64 [B], the clips' place in the store.
    frames: int64 [B, T], the rows that are taken of modalities of which more frames are stored.
    All lie on the CPU, with the cache on the device tokens and scales lie there.
    """

    tokens: dict[str, Tensor]
    present: Tensor
    mask: Tensor
    labels: dict[str, Tensor]
    clip_index: Tensor
    scales: dict[str, Tensor] = field(default_factory=dict)
    frames: dict[str, Tensor] = field(default_factory=dict)
    slot: Slot | None = field(default=None, repr=False)

    def tokens_on(self, device: torch.device) -> dict[str, Tensor]:
        """Return tokens [B, N, D] on a device as numbers: int8 is copied as such, then scaled.

        From page-locked memory the copy does not wait; use this and not ``tensor.to``, since
        it keeps the memory from being filled again before the copy is done.
        """
        on_device = {}
        for m, tokens in self.tokens.items():
            stored = [tokens, self.scales[m]] if m in self.scales else [tokens]
            on_device[m] = dense([copy_to(part, device, self.slot) for part in stored])
        for m, frames in self.frames.items():
            clips = torch.arange(len(frames), device=device)[:, None]
            on_device[m] = on_device[m][clips, frames.to(device)]
        return on_device

    def rows(self, rows: slice) -> "Batch":
        """Return some clips of the batch, in the same memory."""
        return replace(
            self,
            tokens={m: t[rows] for m, t in self.tokens.items()},
            scales={m: t[rows] for m, t in self.scales.items()},
            frames={m: t[rows] for m, t in self.frames.items()},
            present=self.present[rows],
            mask=self.mask[rows],
            labels={h: of[rows] for h, of in self.labels.items()},
            clip_index=self.clip_index[rows],
        )


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
        draw_masks: draws masks instead: an epoch's number to bool [indices, M].
        rows: draws the row of the store that is read of each of ``indices``: an epoch's number to
            int64 [indices]; None: these.
        frames: draws which of them is taken where more frames are stored than a network takes: an
            epoch's number to modality to int64 [indices, T]; None: all are handed out.
        threads: that gather ahead; 0 gathers when asked.
        ahead: batches that are gathered before they are asked for.
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
        draw_masks: Callable[[int], npt.NDArray[np.bool_]] | None = None,
        rows: Callable[[int], npt.NDArray[np.int64]] | None = None,
        frames: Callable[[int], dict[str, npt.NDArray[np.int64]]] | None = None,
        threads: int = 1,
        ahead: int = 2,
        rank: int = 0,
        world_size: int = 1,
        pin: bool = False,
        drop_last: bool = False,
    ) -> None:
        self.store, self.indices = store, np.asarray(indices, np.int64)
        self.batch_size, self.seed, self.p = batch_size, seed, p
        self.shuffle, self.order, self._draw_masks = shuffle, order, draw_masks
        self._rows, self._frames = rows, frames
        self.threads, self.ahead = threads, max(1, ahead)
        self.rank, self.world_size, self.drop_last = rank, world_size, drop_last
        self._keys = clip_keys(store.names(self.indices))
        self._device: torch.device | None = getattr(store, "device", None)
        self._begun: _Stream | None = None
        self._pool = BufferPool(
            {m: store.parts(m) for m in store.modalities},
            min(-(-batch_size // world_size), len(self.indices)),
            pin=pin and self._device is None,
            keep=self.ahead + 2,
        )

    def __len__(self) -> int:
        whole, rest = divmod(len(self.indices), self.batch_size)
        return whole + (1 if rest and not self.drop_last else 0)

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[Batch]:
        """Yield the batches of an epoch from number ``start_batch`` on."""
        self.store.check_files()
        if self._begun is None or self._begun.name != (epoch, start_batch):
            self.close()
            self._begun = self._begin(epoch, start_batch)
        begun, self._begun = self._begun, None
        try:
            yield from begun
        finally:
            begun.close()

    def prefetch(self, epoch: int) -> None:
        """Begin to gather the first batches of the epoch that is asked for next."""
        self.close()
        self._begun = self._begin(epoch, 0)

    def close(self) -> None:
        """Drop what `prefetch` has begun."""
        if self._begun is not None:
            self._begun.close()
            self._begun = None

    def _begin(self, epoch: int, start_batch: int) -> "_Stream":
        self.store.check_files()
        places, masks, rows = self.places(epoch), self.masks(epoch), self.rows(epoch)
        frames = {} if self._frames is None else self._frames(epoch)
        parts = (
            places[b * self.batch_size : (b + 1) * self.batch_size][self.rank :: self.world_size]
            for b in range(start_batch, len(self))
        )
        loads = (partial(self._load, part, masks, rows, frames) for part in parts)
        return _Stream((epoch, start_batch), loads, self.threads, self.ahead)

    def places(self, epoch: int) -> npt.NDArray[np.int64]:
        """Return the places in ``indices`` that an epoch goes through, in its order."""
        if self.order is not None:
            return self.order(epoch)
        if self.shuffle:
            return np.argsort(draws(self.seed, epoch, self._keys, ORDER), kind="stable")
        return np.arange(len(self.indices))

    def rows(self, epoch: int) -> npt.NDArray[np.int64]:
        """Return the rows of the store that an epoch reads of all ``indices``."""
        return self.indices if self._rows is None else self._rows(epoch)

    def masks(self, epoch: int) -> npt.NDArray[np.bool_]:
        """Return the masks of all ``indices`` in an epoch, [clips, M].

        Drawn at once they cost next to nothing.
        """
        if self._draw_masks is not None:
            return self._draw_masks(epoch)
        present = self.store.present[self.rows(epoch)]
        return modality_mask(self.seed, epoch, self._keys, present, self.p)

    def _load(
        self,
        places: npt.NDArray[np.int64],
        masks: npt.NDArray[np.bool_],
        rows: npt.NDArray[np.int64],
        frames: dict[str, npt.NDArray[np.int64]],
    ) -> Batch:
        clips = rows[places]
        index = torch.from_numpy(clips)
        parts, slot = self._gather(index)
        labels = {
            head: torch.from_numpy(np.asarray(of[clips], np.int64))
            for head, of in self.store.labels.items()
        }
        return Batch(
            {m: of[0] for m, of in parts.items()},
            torch.from_numpy(self.store.present.take(clips, axis=0)),  # faster than by [clips]
            torch.from_numpy(masks.take(places, axis=0)),
            labels,
            index,
            {m: of[1] for m, of in parts.items() if len(of) > 1},
            {m: torch.from_numpy(of.take(places, axis=0)) for m, of in frames.items()},
            slot,
        )

    def _gather(self, index: Tensor) -> tuple[dict[str, tuple[Tensor, ...]], Slot | None]:
        store, slot = self.store, None
        if self._device is None:
            parts, slot = self._pool.lend(len(index))
        else:
            parts = {m: store.empty_parts(m, len(index), self._device) for m in store.modalities}
        for m, tensors in parts.items():
            store.gather_parts(m, index, tensors)
        return parts, slot


class _Stream:
    """The batches of an epoch on their way, in order: threads gather some of them ahead."""

    def __init__(
        self, name: tuple[int, int], loads: Iterator[Callable[[], Batch]], threads: int, ahead: int
    ) -> None:
        self.name, self._loads = name, loads
        self._pool = ThreadPoolExecutor(threads, "loader") if threads else None
        self._waiting = deque(self._submit(ahead))

    def _submit(self, count: int) -> list[Future[Batch]]:
        some = islice(self._loads, count)
        return [self._pool.submit(load) for load in some] if self._pool else []

    def __iter__(self) -> Iterator[Batch]:
        if self._pool is None:
            yield from (load() for load in self._loads)
        while self._waiting:
            batch = self._waiting.popleft().result()
            self._waiting.extend(self._submit(1))
            yield batch
            del batch  # its buffer may be lent again as soon as the consumer lets go of it

    def close(self) -> None:
        """Stop the threads; what they gathered is dropped."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
