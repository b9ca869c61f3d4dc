"""All shards of a modality as one array in memory, without reading them.

One address range is reserved and the payload of every shard file is mapped into it, so that
a random batch is one gather. The first rows are anonymous zeros: absent clips point there.
"""

import ctypes
import math
import mmap
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_LIBC.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_MAP_FIXED, _MAP_NORESERVE = 0x10, 0x4000


class Region:
    """Maps ``sizes[i]`` payload bytes of ``paths[i]`` from ``offset`` on, as rows of one array.

    Attributes:
        first_row: int64 [files], the row at which each file's payload starts.
        ZERO: the row of zeros.
    """

    ZERO = 0

    def __init__(
        self, paths: Sequence[Path], sizes: Sequence[int], offset: int, row_bytes: int
    ) -> None:
        unit = math.lcm(mmap.PAGESIZE, row_bytes)
        spans = [-(-size // unit) * unit for size in sizes]
        starts = unit + np.concatenate([[0], np.cumsum(spans, dtype=np.int64)])
        self.row_bytes = row_bytes
        self.first_row = (starts[:-1] // row_bytes).astype(np.int64)
        self._size = int(starts[-1])
        self._base = _mmap(
            0, self._size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE, -1, 0
        )
        try:
            for path, size, start in zip(paths, sizes, starts, strict=False):
                descriptor = os.open(path, os.O_RDONLY)
                try:
                    flags = mmap.MAP_SHARED | _MAP_FIXED
                    _mmap(self._base + int(start), size, flags, descriptor, offset)
                finally:
                    os.close(descriptor)
        except BaseException:
            self.close()
            raise

    def rows(self) -> npt.NDArray[np.uint8]:
        """Return the whole range as uint8 [rows, row bytes]; valid until `close`."""
        buffer = (ctypes.c_uint8 * self._size).from_address(self._base)
        return np.ctypeslib.as_array(buffer).reshape(-1, self.row_bytes)

    def close(self) -> None:
        """Unmap everything; arrays made from it must not be used after."""
        if self._base:
            _LIBC.munmap(self._base, self._size)
            self._base = 0


def _mmap(address: int, size: int, flags: int, descriptor: int, offset: int) -> int:
    found = _LIBC.mmap(address, size, mmap.PROT_READ, flags, descriptor, offset)
    if found == ctypes.c_void_p(-1).value:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return int(found)
