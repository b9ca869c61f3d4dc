"""A store of synthetic tokens from which verb and noun can be learned, written in a moment."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from karmma_pipeline.modalities import Reason
from karmma_pipeline.store import (
    ClipRow,
    ModalitySpec,
    ShardWriter,
    StoreSpec,
    create_store,
    finalize,
)
from karmma_pipeline.store.spec import Dtype

VERBS, NOUNS = 4, 3


def write_store(
    root: Path,
    clips: int = 96,
    width: int = 8,
    seed: int = 0,
    noise: float = 0.25,
    heads: dict[str, tuple[str, ...]] | None = None,
    label: int | None = None,
    absent: Collection[tuple[str, str]] = (),
    non_finite: Mapping[tuple[str, str], float] | None = None,
    dtype: Dtype = "float16",
    unlabelled: Mapping[str, Collection[str]] | None = None,
) -> Path:
    """Verb is seen in rgb and flow, noun in rgb and audio; every fifth clip has no audio.

    ``absent``: clips and modalities that the store calls BAD_VALUE. ``non_finite``: those whose
    tokens are this value, with checksums that fit, as another program could write them.
    With ``heads`` and ``label`` every clip has that label of other heads, seen in nothing.
    ``unlabelled``: split to heads of which its clips have no label.
    """
    spec = StoreSpec(
        modalities={
            m: ModalitySpec(
                tokens=n, width=width, dtype=dtype, provenance={"backbone": "synthetic"}
            )
            for m, n in (("rgb", 3), ("flow", 2), ("audio", 2))
        },
        heads=heads
        or {
            "verb": tuple(f"v{i}" for i in range(VERBS)),
            "noun": tuple(f"n{i}" for i in range(NOUNS)),
        },
        clips_per_shard=32,
    )
    rng = np.random.default_rng(seed)
    codes = rng.normal(size=(2, max(VERBS, NOUNS), width))
    rows = []
    for i in range(clips):
        labels = {"verb": i % VERBS, "noun": i // VERBS % NOUNS}
        if heads is not None:
            labels = dict.fromkeys(heads, -1 if label is None else label)
        split = "val" if i % 4 == 3 - i // 4 % 4 else "train"
        labels |= dict.fromkeys((unlabelled or {}).get(split, ()), -1)
        rows.append(ClipRow(f"c{i:03d}", labels, split, f"P{i % 3}"))
    create_store(root, spec, rows)
    for shard in range(-(-clips // 32)):
        with ShardWriter(root, shard) as writer:
            for clip_id in writer.clip_ids:
                i = int(clip_id[1:])
                verb, noun = codes[0, i % VERBS], codes[1, i // VERBS % NOUNS]
                means = {"rgb": verb + noun, "flow": verb, "audio": noun}
                tokens: dict[str, Any] = {
                    m: means[m] + noise * rng.normal(size=(s.tokens, width))
                    for m, s in spec.modalities.items()
                }
                reasons = {}
                if i % 5 == 0:
                    del tokens["audio"]
                    reasons["audio"] = Reason.NO_STREAM
                for clip, modality in absent:
                    if clip == clip_id:
                        del tokens[modality]
                        reasons[modality] = Reason.BAD_VALUE
                for (clip, modality), value in (non_finite or {}).items():
                    if clip == clip_id:  # what is encoded already is copied as it is
                        spoilt = np.full_like(tokens[modality], value)
                        tokens[modality] = spec.modalities[modality].encode(spoilt)
                writer.append(clip_id, tokens, reasons, {})
            writer.commit()
    finalize(root)
    return root
