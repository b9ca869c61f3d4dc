"""Decoded arrays in memory that the decode processes share: nothing is pickled, nothing is left.

The memory is anonymous: it has no name that a killed run could leave behind, and no limit but
the job's own. A process reaches it through the owner's entry in /proc.
"""

import mmap
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from math import prod
from typing import Any

import numpy as np

from karmma_pipeline.data.manifest import Clip
from karmma_pipeline.extraction.media.media_file import Decoder
from karmma_pipeline.extraction.types import DecodedClip, DecodeSettings, InputSpec

_ALIGN = 64
_SLACK = 4096
_NOTHING = np.empty(0, np.uint8)

Decode = Callable[[list[Clip], DecodeSettings, Decoder], list[DecodedClip]]
Places = dict[InputSpec, tuple[int, tuple[int, ...], str]]
"""Where an array, or the pairs of frames of a flow, lies: offset in bytes, shape, dtype."""


def clip_bytes(settings: DecodeSettings) -> int:
    """Return how many bytes the arrays of one clip take."""
    return _SLACK + sum(_input_bytes(spec, settings) for spec in settings.inputs)


def _input_bytes(spec: InputSpec, settings: DecodeSettings) -> int:
    values = prod(spec.image) * (spec.frames if spec.per_frame else 1)
    if spec.transform is None:  # float32 images or boxes
        return 4 * values + _ALIGN
    pairs = spec.modality == "flow" and settings.flow.source != "dis"
    return (3 * values + _ALIGN) * (2 if pairs else 1)  # uint8 in three channels


class Arena:
    """Slots for one decoded clip each, in anonymous shared memory.

    Args:
        slot_bytes: of one clip (see `clip_bytes`).
        slots: clips that fit.
    """

    def __init__(self, slot_bytes: int, slots: int) -> None:
        self.slot_bytes = -(-slot_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        self._file = os.memfd_create("karmma-clips")
        os.ftruncate(self._file, self.slot_bytes * slots)
        self._memory = mmap.mmap(self._file, self.slot_bytes * slots)
        self._unused = list(range(slots))
        self.address = f"/proc/{os.getpid()}/fd/{self._file}"

    def take(self) -> int | None:
        """Return a slot, None if all are in use: such a clip goes through the pipe."""
        return self._unused.pop() if self._unused else None

    def give(self, slots: Sequence[int | None]) -> None:
        """Let slots be used again; arrays in them are no longer valid."""
        self._unused += [slot for slot in slots if slot is not None]

    def restore(self, decoded: DecodedClip, places: Places, slot: int | None) -> None:
        """Let a clip's arrays be views of its slot, as its process wrote them."""
        if slot is not None:
            start = slot * self.slot_bytes
            for spec, (offset, shape, dtype) in places.items():
                flat = np.frombuffer(self._memory, dtype, prod(shape), start + offset)
                view = flat.reshape(shape)
                if spec in decoded.pairs:
                    decoded.pairs[spec] = replace(decoded.pairs[spec], frames=view)
                else:
                    decoded.arrays[spec] = view

    def close(self) -> None:
        """Let the memory go; it is freed when the last process that uses it ends."""
        os.close(self._file)


def decode_into(
    address: str,
    slot_bytes: int,
    slots: Sequence[int | None],
    decode: Decode,
    clips: list[Clip],
    settings: DecodeSettings,
    decoder: Decoder,
) -> tuple[float, list[tuple[DecodedClip, Places]]]:
    """Decode in a worker process; arrays that fit into their clip's slot are left there.

    Returns:
        CPU seconds that it took, and each clip without the arrays that lie in its slot.
    """
    started = time.process_time()
    decoded = decode(clips, settings, decoder)
    parts = [
        (clip, _leave(address, slot_bytes, slot, clip))
        for clip, slot in zip(decoded, slots, strict=True)
    ]
    return time.process_time() - started, parts


def _leave(address: str, slot_bytes: int, slot: int | None, clip: DecodedClip) -> Places:
    places: Places = {}
    if slot is None:
        return places
    memory, at = _attach(address), 0
    frames = {spec: pairs.frames for spec, pairs in clip.pairs.items()}
    for spec, array in {**clip.arrays, **frames}.items():
        if at + array.nbytes > slot_bytes:
            continue
        target = np.frombuffer(memory, array.dtype, array.size, slot * slot_bytes + at)
        target[:] = array.ravel()
        places[spec] = (at, array.shape, array.dtype.str)
        at += -(-array.nbytes // _ALIGN) * _ALIGN
        if spec in frames:
            clip.pairs[spec] = replace(clip.pairs[spec], frames=_NOTHING)
        else:
            del clip.arrays[spec]
    return places


@lru_cache(maxsize=1)
def _attach(address: str) -> Any:
    descriptor = os.open(address, os.O_RDWR)
    try:
        return mmap.mmap(descriptor, 0)
    finally:
        os.close(descriptor)
