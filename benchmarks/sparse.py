"""A store with any number of clips that takes no space: shard files are holes of the right size."""

from pathlib import Path

import numpy as np

from karmma_pipeline.store import ClipRow, ModalitySpec, StoreSpec, create_store, finalize
from karmma_pipeline.store.format.layout import Record, file_bytes, record_file, shard_file


def write_sparse_store(root: Path, clips: int, absent: float = 0.2) -> Path:
    """Write it; opening and mapping cost what they cost for a real one, its tokens are zeros."""
    modalities = {m: ModalitySpec(tokens=8, width=1024, frames=8) for m in ("rgb", "flow", "audio")}
    heads = {"verb": tuple(map(str, range(97))), "noun": tuple(map(str, range(300)))}
    spec = StoreSpec(modalities=modalities, heads=heads)
    create_store(root, spec, [_row(i) for i in range(clips)])
    rng = np.random.default_rng(0)
    for shard in range(-(-clips // spec.clips_per_shard)):
        count = min(spec.clips_per_shard, clips - shard * spec.clips_per_shard)
        reason = (rng.random((count, 3)) < absent).astype(np.uint8) * 2
        for column, m in enumerate(spec.order):
            path = shard_file(root, m, shard)
            path.parent.mkdir(parents=True, exist_ok=True)
            present = int((reason[:, column] == 0).sum())
            with path.open("wb") as file:
                file.truncate(file_bytes(modalities[m].arrays[0], spec.clips_per_shard, present))
        times = {m: np.zeros((count, 2, 8)) for m in spec.order}
        record = Record(reason, np.zeros((count, 3), np.uint32), times, np.zeros(3, np.uint32))
        record_file(root, shard).parent.mkdir(exist_ok=True)
        record_file(root, shard).write_bytes(record.to_bytes())
    finalize(root)
    return root


def _row(i: int) -> ClipRow:
    labels = {"verb": i % 97, "noun": i % 300}
    split = "train" if i % 5 else "val"
    return ClipRow(f"P{i % 40:02d}_{i:07d}", labels, split, f"P{i % 40:02d}", float(i), i + 1.5)
