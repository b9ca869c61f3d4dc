"""What could not be extracted, clip by clip, told from the stores themselves."""

import csv
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from karmma_pipeline import files
from karmma_pipeline.data.store import FeatureStore
from karmma_pipeline.modalities import Reason

COLUMNS = ("clip_id", "modality", "stage", "reason", "hint")
NATURAL = {Reason.PRESENT, Reason.NO_STREAM, Reason.NOT_IN_DATASET}
"""Absences that are how the clip was recorded, not errors."""

_STAGE = {
    Reason.FILE_MISSING: "open",
    Reason.NO_STREAM: "open",
    Reason.NOT_IN_DATASET: "manifest",
    Reason.TOO_SHORT: "sample",
    Reason.OUT_OF_RANGE: "sample",
    Reason.BAD_VALUE: "backbone",
}


def write_failures(path: Path, stores: Mapping[str, FeatureStore]) -> int:
    """Write the table and return how many clips lost something to an error."""
    rows = sorted({row for store in stores.values() for row in _rows(store)})
    with files.replacing(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for clip_id, modality, code in rows:
            reason = Reason(code)
            stage = _STAGE.get(reason, "decode")
            writer.writerow([clip_id, modality, stage, reason.name.lower(), reason.hint])
    return len({clip_id for clip_id, _, code in rows if Reason(code) not in NATURAL})


def _rows(store: FeatureStore) -> Iterator[tuple[str, str, int]]:
    for clip, column in np.argwhere(np.asarray(store.reasons) != Reason.PRESENT):
        clip_id = store.clip_ids[clip].decode()
        yield clip_id, store.modalities[column], int(store.reasons[clip, column])
