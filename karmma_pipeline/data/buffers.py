"""Memory for batches: page-aligned, page-locked for GPUs, and used again.

Writing into fresh or unaligned memory costs two to three times the read itself, so a batch's
tensors lie in one preallocated buffer. The buffer goes back to the pool when the last tensor
that looks into it is gone, never earlier: a batch stays valid for as long as one holds it.
"""

import mmap
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from karmma_pipeline.data.store.source import Part


@dataclass
class Slot:
    """A buffer that is lent. ``copied`` are CUDA events of copies that still read it."""

    memory: npt.NDArray[np.uint8]
    copied: list[torch.cuda.Event] = field(default_factory=list)

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
        self, parts: Mapping[str, Sequence[Part]], clips: int, *, pin: bool, keep: int
    ) -> None:
        self._parts, self._pin = parts, pin
        self._free: deque[Slot] = deque(maxlen=keep)
        self._size = max(1, sum(_room(p, clips) for of in parts.values() for p in of))

    def lend(self, clips: int) -> tuple[dict[str, tuple[Tensor, ...]], Slot]:
        """Return tensors [clips, *shape] of every part, undefined, and the slot they lie in."""
        try:
            slot = self._free.popleft()
            slot.wait()
        except IndexError:
            slot = Slot(self._allocate())
        lease = slot.memory.view()
        weakref.finalize(lease, self._free.append, slot).atexit = False
        flat = torch.from_numpy(lease)  # every tensor made of it keeps the lease alive
        found, at = {}, 0
        for name, parts in self._parts.items():
            tensors = []
            for part in parts:
                size = _bytes(part, clips)
                tensors.append(flat[at : at + size].view(part.dtype).view(clips, *part.shape))
                at += _room(part, clips)
            found[name] = tuple(tensors)
        return found, slot

    def _allocate(self) -> npt.NDArray[np.uint8]:
        if self._pin:
            return torch.empty(self._size, dtype=torch.uint8, pin_memory=True).numpy()
        return np.frombuffer(mmap.mmap(-1, self._size), np.uint8)


def _bytes(part: Part, clips: int) -> int:
    return clips * int(np.prod(part.shape)) * part.dtype.itemsize


def _room(part: Part, clips: int) -> int:
    return -(-_bytes(part, clips) // mmap.PAGESIZE) * mmap.PAGESIZE


def copy_to(tensor: Tensor, device: torch.device, slot: Slot | None) -> Tensor:
    """Copy to a device without waiting; the slot is not lent again before the copy is done."""
    found = tensor.to(device, non_blocking=True)
    if slot is not None and device.type == "cuda" and tensor.device.type == "cpu":
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(device))
        slot.copied.append(event)
    return found
