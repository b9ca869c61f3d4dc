"""All shards of an array as one array in memory, without reading them.

One address range is reserved and the payload of every shard file is mapped into it, so that
a random batch is one gather. The first rows are anonymous zeros: absent clips point there.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from karmma_pipeline.errors import StoreError
from karmma_pipeline.store.format.layout import PAYLOAD_OFFSET, open_name
from karmma_pipeline.store.spec import StoredArray

if TYPE_CHECKING:
    from torch import Tensor

# Python's `mmap` cannot map at a chosen address (MAP_FIXED), and one address range for all files is
# what makes a batch one gather. use_errno keeps each thread's errno of its own call.
_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_LIBC.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_MAP_FIXED, _MAP_NORESERVE = 0x10, 0x4000


@dataclass(frozen=True, slots=True)
class Payload:
    """The tokens in a shard file: ``size`` bytes of a file that must have ``file_size``.

    root is the store's folder without links, name the file's place in it.
    """

    root: str
    name: str
    size: int
    file_size: int


class Region:
    """Maps payloads, each of whole rows of ``row_bytes``, as rows of one array.

    Attributes:
        first_row: int64 [files], the row at which each file's payload starts.
        ZERO: the row of zeros.

    Raises:
        StoreError: a file is missing, has another size, is a link, or cannot be mapped.
    """

    ZERO = 0

    def __init__(self, payloads: Sequence[Payload], row_bytes: int) -> None:
        # Each payload starts at a page, as mmap demands, and at a whole row, so that the range is
        # one array of rows: at multiples of both. What lies between is never touched.
        unit = math.lcm(mmap.PAGESIZE, row_bytes)
        sizes = np.array([p.size for p in payloads], np.int64)
        starts = unit + np.concatenate([[0], np.cumsum(-(-sizes // unit) * unit)])
        self.row_bytes = row_bytes
        self.first_row = (starts[:-1] // row_bytes).astype(np.int64)
        self._size = int(starts[-1])
        self._mapped: list[tuple[str, os.stat_result]] = []
        # Private and without reserve: pages that nobody reads cost nothing, and those before the
        # first payload read as the kernel's one page of zeros.
        self._base = _mmap(
            0, self._size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE, -1, 0
        )
        try:
            for payload, start in zip(payloads, starts.tolist(), strict=False):
                self._map(payload, start)
        except BaseException:
            self.close()
            raise

    def _map(self, payload: Payload, start: int) -> None:
        path = f"{payload.root}/{payload.name}"
        try:
            descriptor = open_name(payload.root, payload.name)
        except OSError:
            raise StoreError(
                f"{path}: the shard file is missing; run `karmma store verify --repair`, then "
                "extract again."
            ) from None
        try:
            # Touching a page beyond a file's end is SIGBUS, which kills the process: a file that
            # was cut is refused here, and by `check`. One that is cut between that and the read
            # cannot be: no handler of Python's runs before the read is tried once more. We never
            # cut a committed file, but replace it by a rename, and what is mapped stays whole.
            state = os.fstat(descriptor)
            actual = state.st_size
            if actual != payload.file_size:
                raise StoreError(
                    f"{path}: has {actual} bytes, not {payload.file_size}; the shard is damaged."
                )
            # MAP_FIXED replaces a part of the range that is reserved above, nothing else's.
            flags = mmap.MAP_SHARED | _MAP_FIXED
            if payload.size:
                _mmap(self._base + start, payload.size, flags, descriptor, PAYLOAD_OFFSET)
                self._mapped.append((path, state))
        except OSError as error:
            raise StoreError(f"{path}: cannot be mapped ({error}).") from None
        finally:
            os.close(descriptor)  # the mapping stays: thousands of shards would exhaust descriptors

    def check(self) -> None:
        """See that no file that is mapped was cut meanwhile; one that was replaced is as it was.

        Raises:
            StoreError: one was.
        """
        for path, before in self._mapped:
            with suppress(OSError):  # taken away: what is mapped lives on without a name
                now = os.stat(path)  # noqa: PTH116  (a thousand shards, before every epoch)
                same = (now.st_dev, now.st_ino) == (before.st_dev, before.st_ino)
                if same and now.st_size < before.st_size:
                    raise StoreError(
                        f"{path}: was truncated from {before.st_size} to {now.st_size} bytes "
                        "while in use; run `karmma store verify --repair`, then extract again."
                    )

    def rows(self) -> npt.NDArray[np.uint8]:
        """Return the whole range as uint8 [rows, row bytes]; valid until `close`."""
        # No copy, and no reference that keeps the range: after `close` its addresses are not ours.
        buffer = (ctypes.c_uint8 * self._size).from_address(self._base)
        return np.ctypeslib.as_array(buffer).reshape(-1, self.row_bytes)

    def close(self) -> None:
        """Unmap everything; arrays made from it must not be used after."""
        if self._base:
            _LIBC.munmap(self._base, self._size)
            self._base = 0


def _mmap(address: int, size: int, flags: int, descriptor: int, offset: int) -> int:
    mapped = _LIBC.mmap(address, size, mmap.PROT_READ, flags, descriptor, offset)
    if mapped == ctypes.c_void_p(-1).value:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return int(mapped)


@dataclass(frozen=True)
class ClipLocations:
    """The clips of one modality among files.

    payloads: array name to the files, the same number for each array.
    file: int64 [clips], the file that has the clip, -1 where it is absent.
    position: int64 [clips], the clip's place among those in its file.
    """

    payloads: dict[str, list[Payload]]
    file: npt.NDArray[np.int64]
    position: npt.NDArray[np.int64]


class MappedClips:
    """Gathers clips of one modality from mapped files."""

    def __init__(self, arrays: Sequence[StoredArray], locations: ClipLocations) -> None:
        self._regions: list[Region] = []
        self._arrays: list[tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]] = []
        absent = locations.file < 0
        try:
            for array in arrays:
                region = Region(locations.payloads[array.name], array.clip_bytes)
                self._regions.append(region)
                first = region.first_row if len(region.first_row) else np.zeros(1, np.int64)
                row = np.full(len(locations.file) + 1, Region.ZERO, np.int64)  # the last is "none"
                row[:-1] = np.where(absent, Region.ZERO, first[locations.file] + locations.position)
                self._arrays.append((region.rows(), row))
        except BaseException:
            self.close()
            raise

    def gather(self, index: Tensor, out: Sequence[Tensor]) -> None:
        """Fill one tensor per array with the clips int64 [B]; absent ones, and -1, are zeros.

        Numpy's ``take`` copies a row at once where torch's ``index_select`` goes by elements,
        and lets other threads run. (Mode ``clip``: the others copy twice; rows are always valid.)
        """
        import torch

        clips = index.numpy()
        for (rows, row), target in zip(self._arrays, out, strict=True):
            flat = target.flatten(1).view(torch.uint8).numpy()
            rows.take(row[clips], axis=0, out=flat, mode="clip")

    def check(self) -> None:
        """See that no mapped file was cut; see `Region.check`."""
        for region in self._regions:
            region.check()

    def close(self) -> None:
        """Unmap the files."""
        self._arrays.clear()  # first: these look into the regions
        for region in self._regions:
            region.close()
        self._regions.clear()
