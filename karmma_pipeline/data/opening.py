"""From the paths and settings of a recipe to what a training reads its tokens from."""

from collections.abc import Sequence
from pathlib import Path

import torch

from karmma_pipeline.data.cache import DeviceStore, node_copy
from karmma_pipeline.data.loader import LoaderSettings
from karmma_pipeline.data.store.joined import open_joined
from karmma_pipeline.data.store.source import TokenSource
from karmma_pipeline.data.store.stage import stage
from karmma_pipeline.jobs import StopFlag


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
    if settings.cache == "node":
        paths = [node_copy(path, stop) for path in paths]
    source = open_joined(paths, settings.label_spaces)
    return DeviceStore(source, device) if settings.cache == "device" else source
