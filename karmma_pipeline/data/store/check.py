"""Looks at a store as a whole: what it holds, and whether every byte is as it was written."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from karmma_pipeline.data.store import layout
from karmma_pipeline.data.store.catalog import Catalog
from karmma_pipeline.data.store.reader import FeatureStore
from karmma_pipeline.data.store.record import Record, read_record
from karmma_pipeline.data.store.writer import crc32c
from karmma_pipeline.errors import StoreError
from karmma_pipeline.modalities import Reason


@dataclass(frozen=True)
class Damage:
    """A damaged place and the clips that it costs."""

    shard: int
    modality: str
    what: str
    clip_ids: tuple[str, ...] = ()

    def __str__(self) -> str:
        clips = f": {', '.join(self.clip_ids)}" if self.clip_ids else ""
        return f"shard {self.shard} {self.modality}: {self.what}{clips}"


def info(root: Path) -> dict[str, Any]:
    """Return what a store holds, plain enough to print."""
    store = FeatureStore.open(root)
    reasons = np.asarray(store.reasons)
    modalities = {}
    for column, m in enumerate(store.modalities):
        one = store.spec.modalities[m]
        counts = Counter(reasons[:, column].tolist())
        modalities[m] = {
            "tokens": one.tokens,
            "width": one.width,
            "dtype": one.dtype,
            "present": counts.pop(int(Reason.PRESENT), 0),
            "absent": {Reason(code).name.lower(): n for code, n in sorted(counts.items())},
            "provenance": one.provenance,
        }
    size = sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
    return {
        "store": str(root),
        "clips": len(store),
        "splits": dict(Counter(store.split.tolist())),
        "heads": {head: len(names) for head, names in store.heads.items()},
        "megabytes": round(size / 1e6, 1),
        "digest": store.digest,
        "modalities": modalities,
    }


def verify(root: Path) -> list[Damage]:
    """Return every damage of a store; none if it is whole.

    Raises:
        StoreError: it cannot even be opened.
    """
    catalog = Catalog(root)
    damages = []
    for shard in tqdm(range(catalog.shards), "verify", unit="shard"):
        try:
            record = read_record(catalog, shard)
        except StoreError as error:
            damages.append(Damage(shard, "all", str(error), tuple(catalog.clips_in(shard))))
            continue
        for column, m in enumerate(catalog.spec.order):
            damages += _check_shard(catalog, shard, record, column, m)
    return damages + list(_foreign(catalog))


def _check_shard(
    catalog: Catalog, shard: int, record: Record, column: int, modality: str
) -> Iterator[Damage]:
    one, size = catalog.spec.modalities[modality], catalog.spec.clips_per_shard
    present = np.flatnonzero(record.present(column))
    clips = catalog.clips_in(shard)
    every = tuple(clips[i] for i in present)
    path = layout.shard_file(catalog.root, modality, shard)
    if not path.is_file():
        yield Damage(shard, modality, "the file is missing", every)
        return
    if path.stat().st_size != layout.file_bytes(one, size, len(present)):
        yield Damage(shard, modality, "the file has the wrong size", every)
        return
    with path.open("rb") as file:
        index = layout.shard_index(one, size, len(present))
        if file.read(len(index)) != index:
            yield Damage(shard, modality, "the Zarr index is damaged")
        file.seek(layout.PAYLOAD_OFFSET)
        for position in present:
            if crc32c(file.read(one.clip_bytes)) != record.crc32c[position, column]:
                yield Damage(shard, modality, "bytes have changed", (clips[position],))


def _foreign(catalog: Catalog) -> Iterator[Damage]:
    for m in catalog.spec.order:
        wanted = {str(s) for s in range(catalog.shards)}
        for path in sorted((catalog.root / m / "tokens" / "c").glob("*")):
            if path.name not in wanted:
                yield Damage(-1, m, f"foreign file {path.relative_to(catalog.root)}")
