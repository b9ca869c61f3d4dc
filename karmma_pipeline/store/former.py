"""A committed shard whose clips are extracted again, until the new one replaces it.

Its commit record moves into the spool, by one rename: from then on the shard counts as missing, and
whatever is killed, the next run goes on with it. Its files stay, for the clips that are not made
again are copied out of them; whoever has mapped them goes on with the old bytes, as new files
replace them by renames.
"""

import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from karmma_pipeline import files
from karmma_pipeline.errors import StoreError
from karmma_pipeline.modalities import Reason
from karmma_pipeline.store.catalog import Catalog
from karmma_pipeline.store.format import layout
from karmma_pipeline.store.format.layout import Record, crc32c
from karmma_pipeline.store.spec import StoredArray

#: One clip as `ModalitySpec.arrays` hold it, to be written as it is.
Encoded = tuple[npt.NDArray[Any], ...]

_AGAIN = "again.json"


def reopen(catalog: Catalog, shard: int, again: Mapping[str, bool]) -> None:
    """Take a shard's commit away to make clips of it again; one whose lock is held.

    Args:
        catalog: of the store.
        shard: its number; one that was never committed is left alone.
        again: ids of its clips, see `ShardWriter`.
    """
    folder = layout.spool_folder(catalog.root, shard)
    committed = layout.record_file(catalog.root, shard)
    former = layout.former_record(catalog.root, shard)
    before: dict[str, bool] = {}
    if committed.is_file():
        os.truncate(folder / "journal", 0)  # of a writer that was killed after its commit
    elif former.is_file():
        before = json.loads((folder / _AGAIN).read_text(encoding="utf-8"))
    else:
        return
    merged = before | {clip: anew or before.get(clip, False) for clip, anew in again.items()}
    files.write_json(folder / _AGAIN, merged)
    if committed.is_file():
        committed.replace(former)
        files.sync_folder(folder)
        files.sync_folder(committed.parent)
    # After the rename, so that no other part completes a store that lacks this shard.
    (catalog.root / layout.MANIFEST).unlink(missing_ok=True)


class FormerShard:
    """What a shard held before.

    Attributes:
        again: position of each clip that is made again to whether its tokens may not stay.
    """

    def __init__(self, catalog: Catalog, shard: int) -> None:
        folder = layout.spool_folder(catalog.root, shard)
        self._catalog, self._shard = catalog, shard
        record = layout.former_record(catalog.root, shard).read_bytes()
        self._record: Record = catalog.parse_record(shard, record)
        listed = json.loads((folder / _AGAIN).read_text(encoding="utf-8"))
        ids = catalog.clips_in(shard)
        self.again: dict[int, bool] = {i: listed[c] for i, c in enumerate(ids) if c in listed}

    def check(self, first: int) -> None:
        """Let clips from a position on be made again whose tokens are not whole any more.

        A power cut in the middle of a commit may leave some of the files replaced and nothing of
        the spool.
        """
        for position in range(first, len(self._record.reason)):
            if position in self.again:
                continue
            try:
                self.of(position)
            except (OSError, StoreError):
                self.again[position] = False

    def of(
        self, position: int
    ) -> tuple[dict[str, Encoded], dict[str, Reason], dict[str, npt.NDArray[np.float64]]]:
        """Return a clip as `ShardWriter.append` takes it: tokens, reasons and times.

        Raises:
            StoreError: its bytes have changed.
            OSError: its file is not there.
        """
        tokens: dict[str, Encoded] = {}
        reasons: dict[str, Reason] = {}
        times: dict[str, npt.NDArray[np.float64]] = {}
        for column, m in enumerate(self._catalog.spec.order):
            reason = Reason(int(self._record.reason[position, column]))
            if reason is not Reason.PRESENT:
                reasons[m] = reason
                continue
            arrays = self._catalog.spec.modalities[m].arrays
            tokens[m] = tuple(self._read(m, array, position, column) for array in arrays)
            crc = 0
            for part in tokens[m]:
                crc = crc32c(part.tobytes(), crc)
            if crc != self._record.crc32c[position, column]:
                clip = self._catalog.clips_in(self._shard)[position]
                raise StoreError(f"{self._catalog.root}: clip {clip!r}: {m}: checksum mismatch.")
            times[m] = self._record.times[m][position]
        return tokens, reasons, times

    def fill(
        self,
        position: int,
        tokens: Mapping[str, Any],
        reasons: Mapping[str, Reason],
        times: Mapping[str, npt.NDArray[np.float64]],
    ) -> tuple[Mapping[str, Any], Mapping[str, Reason], Mapping[str, npt.NDArray[np.float64]]]:
        """Return what a clip has become, and where that is nothing what it was, if it may stay."""
        if self.again.get(position):
            return tokens, reasons, times
        try:
            old_tokens, old_reasons, old_times = self.of(position)
        except (OSError, StoreError):
            return tokens, reasons, times
        if position not in self.again:  # made only because its batch is: its file may be gone
            reasons = {**reasons, **old_reasons}
        return {**old_tokens, **tokens}, reasons, {**old_times, **times}

    def _read(
        self, modality: str, array: StoredArray, position: int, column: int
    ) -> npt.NDArray[Any]:
        root = self._catalog.root
        path = layout.shard_file(root, modality, self._shard, array.name)
        before = int(self._record.present(column)[:position].sum())
        with os.fdopen(layout.open_inside(root, path), "rb") as file:
            file.seek(layout.PAYLOAD_OFFSET + before * array.clip_bytes)
            data = file.read(array.clip_bytes)
        if len(data) != array.clip_bytes:
            raise StoreError(f"{path}: truncated.")
        return np.frombuffer(data, array.dtype).reshape(array.tokens, array.width)
