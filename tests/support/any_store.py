"""Small stores of any shape; a clip's tokens follow from its id alone, so they can be foretold."""

import zlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np

from karmma_pipeline.modalities import Reason
from karmma_pipeline.store import (
    Catalog,
    ClipRow,
    ModalitySpec,
    ShardWriter,
    StoreSpec,
    create_store,
    finalize,
)
from karmma_pipeline.store.spec import Dtype
from karmma_pipeline.views import Views

IDS = tuple(f"c{i:02d}" for i in range(12))
RGB_AUDIO = {"rgb": (4, 6), "audio": (2, 5)}


def tokens_of(clip_id: str, modality: str, shape: tuple[int, int]) -> np.ndarray:
    seed = zlib.crc32(f"{clip_id} {modality}".encode())
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def fill_store(
    root: Path,
    ids: Sequence[str] = IDS,
    modalities: Mapping[str, tuple[int, int]] = RGB_AUDIO,
    *,
    dtype: Dtype = "float16",
    classes: Sequence[str] = ("open", "shut"),
    absent: Sequence[tuple[str, str]] = (("c05", "audio"),),
    per_shard: int = 8,
    split: str = "",
    provenance: Mapping[str, object] = {},
    head: str = "verb",
    labelled: Collection[str] | None = None,
    views: Views | None = None,
    like: str = "",
) -> Path:
    """Write what lacks; clip number n has label n modulo the classes and lies at n seconds.

    ``labelled``: clips that have a label; None: all. ``views``: of each clip. ``like``: added to a
    clip's id, whose tokens and absences it then has, as `.v3` is to those of its view 3.
    """
    spec = StoreSpec(
        modalities={
            m: ModalitySpec(tokens=n, width=d, dtype=dtype, frames=2, provenance=dict(provenance))
            for m, (n, d) in modalities.items()
        },
        heads={head: tuple(classes)},
        clips_per_shard=per_shard,
        views=views,
    )
    number = {
        row: int("".join(c for c in clip_id if c.isdigit()))
        for clip_id in ids
        for row in (views.names(clip_id) if views else [clip_id])
    }
    rows = [
        ClipRow(
            i,
            {head: n % len(classes) if labelled is None or i in labelled else -1},
            split or ("val" if n % 3 == 0 else "train"),
            f"P{n % 2}",
            float(n),
            n + 2.0,
        )
        for i, n in number.items()
    ]
    create_store(root, spec, rows)
    catalog = Catalog(root)
    for shard in sorted(set(range(catalog.shards)) - catalog.committed()):
        with ShardWriter(root, shard) as writer:
            for clip_id in writer.clip_ids[writer.next :]:
                has = [m for m in modalities if (clip_id + like, m) not in absent]
                writer.append(
                    clip_id,
                    {m: tokens_of(clip_id + like, m, modalities[m]) for m in has},
                    {m: Reason.NO_STREAM for m in modalities if m not in has},
                    {m: np.full((2, 2), float(number[clip_id])) for m in has},
                )
            writer.commit()
    finalize(root)
    return root
