"""Feature stores: sharded token caches that are Zarr v3 and HDF5 at once, read through mmap.

docs/store_format.md describes the bytes.
"""

from karmma_pipeline.store.catalog import Catalog as Catalog
from karmma_pipeline.store.catalog import create_store as create_store
from karmma_pipeline.store.finalize import finalize as finalize
from karmma_pipeline.store.integrity import Damage as Damage
from karmma_pipeline.store.integrity import repair as repair
from karmma_pipeline.store.integrity import verify as verify
from karmma_pipeline.store.joined import JoinedStore as JoinedStore
from karmma_pipeline.store.joined import find_joined as find_joined
from karmma_pipeline.store.joined import joined_digests as joined_digests
from karmma_pipeline.store.joined import open_joined as open_joined
from karmma_pipeline.store.reader import FeatureStore as FeatureStore
from karmma_pipeline.store.source import TokenSource as TokenSource
from karmma_pipeline.store.spec import ClipRow as ClipRow
from karmma_pipeline.store.spec import ModalitySpec as ModalitySpec
from karmma_pipeline.store.spec import StoreSpec as StoreSpec
from karmma_pipeline.store.tools.info import info as info
from karmma_pipeline.store.tools.stage import stage as stage
from karmma_pipeline.store.writer import ShardWriter as ShardWriter
