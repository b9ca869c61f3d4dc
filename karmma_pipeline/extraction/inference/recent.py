"""Results that the next windows of a live stream will want again.

Windows that overlap show the same pictures and sound. Results are found by what they were made of,
so that clocks, and sensors that come back, do not matter.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

T = TypeVar("T")

MOST_BYTES = 256 << 20


class Recent:
    """Keeps results, arrays or tuples of them, by key; for one thread.

    Args:
        rounds: for so many calls of `begin` a result is kept that nobody asks for.
        most_bytes: that all results may take; beyond, those go that were asked for longest ago.

    Attributes:
        bytes: that they take.
    """

    def __init__(self, rounds: int, most_bytes: int = MOST_BYTES) -> None:
        self._rounds, self._most_bytes, self._round = rounds, most_bytes, 0
        # Key to the round of its last use and the result; the last used ones stand last.
        self._kept: OrderedDict[Hashable, tuple[int, Any]] = OrderedDict()
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    def begin(self) -> None:
        """Begin a window, and forget what the last ones had no use for."""
        self._round += 1
        while self._kept and next(iter(self._kept.values()))[0] < self._round - self._rounds:
            self._forget_oldest()

    def of(self, keys: Sequence[Hashable], make: Callable[[list[int]], Sequence[T]]) -> list[T]:
        """Return the results of keys, in their order.

        Args:
            keys: may repeat.
            make: returns the results of those at the given places, which are not there yet.
        """
        missing = {key: place for place, key in enumerate(keys) if key not in self._kept}
        made = make(list(missing.values())) if missing else ()
        found = dict(zip(missing, made, strict=True))
        found |= {key: self._kept[key][1] for key in keys if key not in missing}
        for key, result in found.items():
            self._kept[key] = self._round, result
            self._kept.move_to_end(key)
        self.bytes += sum(_bytes(found[key]) for key in missing)
        while self.bytes > self._most_bytes:
            self._forget_oldest()
        return [found[key] for key in keys]

    def _forget_oldest(self) -> None:
        _, (_, result) = self._kept.popitem(last=False)
        self.bytes -= _bytes(result)


def _bytes(result: Any) -> int:
    parts = result if isinstance(result, tuple) else (result,)
    return sum(part.nbytes for part in parts if part is not None)


def digest(values: npt.NDArray[Any]) -> bytes:
    """Return what stands for the contents of an array; one of 224 x 224 pixels takes 0.2 ms."""
    return hashlib.blake2b(np.ascontiguousarray(values).data, digest_size=16).digest()
