"""Decoded arrays in memory that the decode processes share: nothing is pickled, nothing is left.

The memory is anonymous: it has no name that a killed run could leave behind, and no limit but
the job's own. A process reaches it through the owner's entry in /proc.
"""

import mmap
import os
import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from math import prod
from typing import Any

import numpy as np

from karmma_pipeline.data.manifest import Clip
from karmma_pipeline.extraction.media.media_file import Decoder
from karmma_pipeline.extraction.types import DecodedClip, DecodeSettings, InputSpec

_ALIGN = 64
_SLACK = 4096

Decode = Callable[[list[Clip], DecodeSettings, Decoder], list[DecodedClip]]
SlotRefs = dict[InputSpec, tuple[int, tuple[int, ...], str]]
"""Where an array lies in its clip's slot: offset in bytes, shape, dtype."""


def clip_bytes(settings: DecodeSettings) -> int:
    """Return how many bytes the arrays of one clip take."""
    return _SLACK + sum(spec.array_bytes + _ALIGN for spec in settings.inputs)


class SharedBuffer:
    """Slots for one decoded clip each, in anonymous shared memory.

    Slots are taken and given back by the thread that runs the pool alone, so that no lock is
    needed: a decode process only writes into slots that its task names.

    Args:
        slot_bytes: of one clip (see `clip_bytes`).
        slots: clips that fit.
    """

    def __init__(self, slot_bytes: int, slots: int) -> None:
        self.slot_bytes = -(-slot_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        # Not multiprocessing.shared_memory: its files lie in /dev/shm, which containers limit to
        # 64 MB, and stay there after SIGKILL. Pages of a memfd count for the job, take no memory
        # until they are written, and go with the last process that maps them.
        self._file = os.memfd_create("karmma-clips")
        os.ftruncate(self._file, self.slot_bytes * slots)
        self._memory = mmap.mmap(self._file, self.slot_bytes * slots)
        self._unused = list(range(slots))
        # Decode processes are spawned, so they inherit no descriptor; another process of the
        # same user may open this one by its path.
        self.address = f"/proc/{os.getpid()}/fd/{self._file}"

    def take(self) -> int | None:
        """Return a slot, None if all are in use: such a clip goes through the pipe."""
        return self._unused.pop() if self._unused else None

    def give_back(self, slots: Sequence[int | None]) -> None:
        """Let slots be used again.

        Arrays that are views of them show whatever is written there next: call it only after
        they were copied, or once the process that was to write them is dead or done.
        """
        self._unused += [slot for slot in slots if slot is not None]

    def restore(self, decoded: DecodedClip, refs: SlotRefs, slot: int | None) -> None:
        """Let a clip's arrays be views of its slot, as its process wrote them."""
        if slot is None:
            return
        start = slot * self.slot_bytes
        for spec, (offset, shape, dtype) in refs.items():
            flat = np.frombuffer(self._memory, dtype, prod(shape), start + offset)
            decoded.arrays[spec] = flat.reshape(shape)

    def close(self) -> None:
        """Let the memory go; it is freed when the last process that uses it ends.

        The mapping itself is left to the garbage collector: closing it under views that are
        still alive is an error.
        """
        os.close(self._file)


def decode_into(
    address: str,
    slot_bytes: int,
    slots: Sequence[int | None],
    decode: Decode,
    clips: list[Clip],
    settings: DecodeSettings,
    decoder: Decoder,
) -> tuple[float, list[tuple[DecodedClip, SlotRefs]]]:
    """Decode in a worker process; arrays that fit into their clip's slot are left there.

    Returns:
        CPU seconds that it took, and each clip without the arrays that lie in its slot.
    """
    started = time.process_time()
    decoded = decode(clips, settings, decoder)
    parts = [
        (clip, _write_to_slot(address, slot_bytes, slot, clip))
        for clip, slot in zip(decoded, slots, strict=True)
    ]
    return time.process_time() - started, parts


def _write_to_slot(address: str, slot_bytes: int, slot: int | None, clip: DecodedClip) -> SlotRefs:
    """Move a clip's arrays into its slot; what does not fit stays with the clip."""
    refs: SlotRefs = {}
    if slot is None:
        return refs
    memory, offset = _attach(address), 0
    for spec, array in list(clip.arrays.items()):
        if offset + array.nbytes > slot_bytes:
            continue
        target = np.frombuffer(memory, array.dtype, array.size, slot * slot_bytes + offset)
        target[:] = array.ravel()
        refs[spec] = (offset, array.shape, array.dtype.str)
        # The next array starts on a cache line, which also suits every dtype.
        offset += -(-array.nbytes // _ALIGN) * _ALIGN
        del clip.arrays[spec]
    return refs


@lru_cache(maxsize=1)  # a process belongs to one pool, and a pool has one buffer
def _attach(address: str) -> Any:
    descriptor = os.open(address, os.O_RDWR)
    try:
        return mmap.mmap(descriptor, 0)
    finally:
        os.close(descriptor)  # the mapping holds the memory by itself
