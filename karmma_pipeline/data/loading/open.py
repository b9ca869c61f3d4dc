"""From the paths and settings of a recipe to what a training reads its tokens from."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import psutil
import torch
from torch import Tensor

from karmma_pipeline.data.loading.loader import LoaderSettings
from karmma_pipeline.errors import StoreError
from karmma_pipeline.jobs import StopFlag
from karmma_pipeline.store.joined import open_joined
from karmma_pipeline.store.source import TokenSource
from karmma_pipeline.store.tools.stage import stage


def open_source(
    stores: Path | Sequence[Path],
    settings: LoaderSettings,
    device: torch.device,
    stop: StopFlag | None = None,
) -> TokenSource:
    """Open one store, or several as one, after copying them as near as the settings say.

    Raises:
        StoreError: a store is missing or damaged, the stores contradict one another, or
            there is not the space for a copy.
    """
    paths = [stores] if isinstance(stores, Path) else list(stores)
    if settings.stage is not None:
        paths = [stage(path, settings.stage, stop) for path in paths]
    source = open_joined(paths, settings.label_spaces)
    return DeviceStore(source, device) if settings.cache == "device" else source


_PIECE = 256


class DeviceStore(TokenSource):
    """A store whose tokens lie on the device as a whole; batches are gathered there.

    Args:
        source: the store.
        device: where tokens go.

    Raises:
        StoreError: they do not fit.
    """

    def __init__(self, source: TokenSource, device: torch.device) -> None:
        self.source, self.device = source, device
        self.path, self.modalities, self.specs = source.path, source.modalities, source.specs
        self.clip_ids, self.present, self.reasons = source.clip_ids, source.present, source.reasons
        self.labels, self.heads, self.digest = source.labels, source.heads, source.digest
        self.split, self.group, self.views = source.split, source.group, source.views
        self._check_memory()
        self._tokens = {m: self._load(m) for m in self.modalities}

    @property
    def clip_digests(self) -> npt.NDArray[np.bytes_]:
        """Digest of all that a training sees of each clip, 32 digits [clips]."""
        return self.source.clip_digests

    def gather(self, modality: str, index: Tensor) -> Tensor:
        """Return tokens [B, N, D] on the CPU."""
        return self.source.gather(modality, index)

    def gather_parts(self, modality: str, index: Tensor, out: Sequence[Tensor]) -> None:
        """Fill tensors [B, *shape] on the device with the clips int64 [B]."""
        row, tokens = self._tokens[modality]
        rows = row[index].to(self.device, non_blocking=True)
        for part, target in zip(tokens, out, strict=True):
            torch.index_select(part, 0, rows, out=target)

    def _check_memory(self) -> None:
        needed = 0
        for column, m in enumerate(self.modalities):
            clips = int(self.present[:, column].sum()) + 1
            needed += clips * self.specs[m].clip_bytes
        if self.device.type == "cuda":
            free = torch.cuda.mem_get_info(self.device)[0]
        else:
            free = psutil.virtual_memory().available
        if needed > free:
            raise StoreError(
                f"{self.path}: loader.cache=device: the tokens need {needed / 1e9:.1f} GB, "
                f"but only {free / 1e9:.1f} GB are free on {self.device}; set loader.cache=map."
            )

    def _load(self, modality: str) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return each clip's row, int64 [clips + 1] on the CPU, and the parts [rows, *shape]."""
        present = np.flatnonzero(self.present[:, self.modalities.index(modality)])
        row = torch.zeros(len(self) + 1, dtype=torch.int64)  # row 0 is zeros: absent
        row[torch.from_numpy(present)] = torch.arange(1, len(present) + 1)
        tokens = self.empty_parts(modality, len(present) + 1, self.device)
        for part in tokens:
            part[0] = 0
        buffers = self.source.empty_parts(modality, min(_PIECE, len(present)))
        for start in range(0, len(present), _PIECE):
            index = torch.from_numpy(present[start : start + _PIECE])
            piece = tuple(buffer[: len(index)] for buffer in buffers)
            self.source.gather_parts(modality, index, piece)
            for target, part in zip(tokens, piece, strict=True):
                target[1 + start : 1 + start + len(index)] = part
        return row, tokens
