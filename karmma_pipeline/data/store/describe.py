"""What a store holds and where it came from, plain enough to print."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from karmma_pipeline.data.store.reader import FeatureStore
from karmma_pipeline.modalities import Reason


def info(root: Path) -> dict[str, Any]:
    """Return what a store holds."""
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
            "computed": one.computed,
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
