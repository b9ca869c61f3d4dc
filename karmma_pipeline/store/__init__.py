"""Feature stores: sharded token caches that are Zarr v3 and HDF5 at once, read through mmap.

docs/store_format.md describes the bytes.
"""

from karmma_pipeline.store.catalog import Catalog, create_store
from karmma_pipeline.store.finalize import finalize
from karmma_pipeline.store.integrity import Damage, repair, verify
from karmma_pipeline.store.joined import JoinedStore, find_joined, open_joined
from karmma_pipeline.store.reader import FeatureStore
from karmma_pipeline.store.source import TokenSource
from karmma_pipeline.store.spec import ClipRow, ModalitySpec, StoreSpec
from karmma_pipeline.store.tools.info import info
from karmma_pipeline.store.tools.stage import stage
from karmma_pipeline.store.writer import ShardWriter

__all__ = [
    "Catalog",
    "ClipRow",
    "Damage",
    "FeatureStore",
    "JoinedStore",
    "ModalitySpec",
    "ShardWriter",
    "StoreSpec",
    "TokenSource",
    "create_store",
    "finalize",
    "find_joined",
    "info",
    "open_joined",
    "repair",
    "stage",
    "verify",
]
