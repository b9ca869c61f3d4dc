"""Memory for batches: page-aligned, page-locked for GPUs, and used again.

Writing into fresh or unaligned memory costs two to three times the read itself, so a batch's
tensors lie in one preallocated buffer, of large pages where the system has them. The buffer goes
back to the pool when the last tensor that looks into it is gone, never earlier: a batch stays
valid for as long as one holds it.
"""

import math
import mmap
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from karmma_pipeline.store.source import StoredTensor

_LARGE_PAGE = 2 << 20


@dataclass
class Slot:
    """A buffer that is lent: to whom, and CUDA events of copies that still read it."""

    memory: npt.NDArray[np.uint8]
    copied: list[torch.cuda.Event] = field(default_factory=list)
    lease: "weakref.ref[npt.NDArray[np.uint8]] | None" = None

    def wait(self) -> None:
        """Wait for the copies."""
        while self.copied:
            self.copied.pop().synchronize()


class BufferPool:
    """Lends buffers that hold one batch each.

    Args:
        parts: name to what one clip holds, such as the tokens of a modality.
        clips: the most clips of a batch.
        pin: page-locked memory, for copies to a GPU.
        keep: buffers that are kept for use again; more are lent when asked for.
    """

    def __init__(
        self, parts: Mapping[str, Sequence[StoredTensor]], clips: int, *, pin: bool, keep: int
    ) -> None:
        self._parts, self._pin = parts, pin
        self._free: deque[Slot] = deque(maxlen=keep)
        self._known: dict[int, list[tuple[str, StoredTensor, int]]] = {}
        self._size = max(1, sum(_room(p, clips) for of in parts.values() for p in of))

    def lend(self, clips: int) -> tuple[dict[str, tuple[Tensor, ...]], Slot]:
        """Return tensors [clips, *shape] of every part, undefined, and the slot they lie in."""
        try:
            slot = self._free.pop()  # the last one that was used is the one in the caches
            slot.wait()
        except IndexError:
            slot = Slot(self._allocate())
        # Tensors made of the lease keep it alive, and none of them refers to the memory itself. So
        # when the last one goes, so does the lease, and its weak reference calls back: only then
        # may the slot be filled again. A deque's append is atomic, in whatever thread that is.
        lease = slot.memory.view()
        slot.lease = weakref.ref(lease, lambda _: self._free.append(slot))
        if not clips:
            return {name: _empty(parts) for name, parts in self._parts.items()}, slot
        tensors: dict[str, tuple[Tensor, ...]] = dict.fromkeys(self._parts, ())
        for name, part, start in self._places(clips):
            count = clips * math.prod(part.shape)
            flat = torch.frombuffer(lease, dtype=part.dtype, count=count, offset=start)
            tensors[name] = (*tensors[name], flat.view(clips, *part.shape))
        return tensors, slot

    def _places(self, clips: int) -> list[tuple[str, StoredTensor, int]]:
        """Return where each part of a batch starts in a buffer, page after page."""
        if clips not in self._known:
            places, at = [], 0
            for name, parts in self._parts.items():
                for part in parts:
                    places.append((name, part, at))
                    at += _room(part, clips)
            self._known[clips] = places
        return self._known[clips]

    def _allocate(self) -> npt.NDArray[np.uint8]:
        if self._pin:
            return torch.empty(self._size, dtype=torch.uint8, pin_memory=True).numpy()
        # Anonymous mappings start at a page, where `np.empty` starts 16 bytes behind one: copies to
        # addresses that are not aligned to 32 bytes take up to twice as long on some processors.
        # Large pages spare page faults; the kernel gives them to whole multiples of 2 MB only.
        size = -(-self._size // _LARGE_PAGE) * _LARGE_PAGE
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with suppress(OSError, AttributeError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
        return np.frombuffer(memory, np.uint8)


def _empty(parts: Sequence[StoredTensor]) -> tuple[Tensor, ...]:
    return tuple(torch.empty(0, *part.shape, dtype=part.dtype) for part in parts)


def _room(part: StoredTensor, clips: int) -> int:
    size = clips * math.prod(part.shape) * part.dtype.itemsize
    return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE


def copy_to(tensor: Tensor, device: torch.device, slot: Slot | None) -> Tensor:
    """Copy to a device without waiting; the slot is not lent again before the copy is done."""
    copy = tensor.to(device, non_blocking=True)
    # The copy runs on when this returns, out of memory whose tensors may be gone by then. The event
    # stands behind it in the stream, and `Slot.wait` before the slot is filled again.
    if slot is not None and device.type == "cuda" and tensor.device.type == "cpu":
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(device))
        slot.copied.append(event)
    return copy
