"""Where each clip's tokens lie: one mapped region per array, one row number per clip."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from karmma_pipeline.data.store.region import Payload, Region
from karmma_pipeline.data.store.spec import StoredArray


@dataclass(frozen=True)
class Places:
    """The clips of one modality among files.

    payloads: array name to the files, the same number for each array.
    file: int64 [clips], the file that has the clip, -1 where it is absent.
    position: int64 [clips], the clip's place among those in its file.
    """

    payloads: dict[str, list[Payload]]
    file: npt.NDArray[np.int64]
    position: npt.NDArray[np.int64]


class Rows:
    """Gathers clips of one modality from mapped files."""

    def __init__(self, arrays: Sequence[StoredArray], places: Places) -> None:
        self._regions: list[Region] = []
        self._arrays: list[tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]] = []
        absent = places.file < 0
        try:
            for array in arrays:
                region = Region(places.payloads[array.name], array.clip_bytes)
                self._regions.append(region)
                first = region.first_row if len(region.first_row) else np.zeros(1, np.int64)
                row = np.full(len(places.file) + 1, Region.ZERO, np.int64)  # the last is "none"
                row[:-1] = np.where(absent, Region.ZERO, first[places.file] + places.position)
                self._arrays.append((region.rows(), row))
        except BaseException:
            self.close()
            raise

    def gather(self, index: Tensor, out: Sequence[Tensor]) -> None:
        """Fill one tensor per array with the clips int64 [B]; absent ones, and -1, are zeros.

        Numpy's ``take`` copies a row at once where torch's ``index_select`` goes by elements,
        and lets other threads run. (Mode ``clip``: the others copy twice; rows are always valid.)
        """
        clips = index.numpy()
        for (rows, row), target in zip(self._arrays, out, strict=True):
            flat = target.flatten(1).view(torch.uint8).numpy()
            rows.take(row[clips], axis=0, out=flat, mode="clip")

    def close(self) -> None:
        """Unmap the files."""
        self._arrays.clear()
        for region in self._regions:
            region.close()
        self._regions.clear()
