"""Writes a shard; a killed job resumes at any point and ends with the same bytes.

Tokens are appended to one spool per modality; after them a journal record with their
checksum. What counts after a kill is the longest journal prefix whose tokens are whole.

Clips of a shard can be made again. Its commit record then goes into the spool: the shard counts as
missing, its files stay until the new ones replace them, and the other clips are taken out of them.
"""

import math
import shutil
import struct
from collections.abc import Mapping
from contextlib import ExitStack
from io import FileIO
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from karmma_pipeline import files, locks
from karmma_pipeline.errors import StoreError
from karmma_pipeline.modalities import Reason
from karmma_pipeline.store.catalog import Catalog
from karmma_pipeline.store.format import layout
from karmma_pipeline.store.format.layout import Record, crc32c, create_shard_file, write_record
from karmma_pipeline.store.former import Encoded, FormerShard, reopen
from karmma_pipeline.store.spec import StoredArray

_COPY_BYTES = 4 << 20


class ShardWriter:
    """Appends clips to one shard in clip order and commits it; one writer per shard.

    A context manager; leaving it without `commit` keeps what was appended for the next run.

    Args:
        root: the store.
        shard: its number.
        again: clips that are made again, by id, whatever an earlier run made of them; true where
            not even tokens may stay that cannot be made any more.

    Raises:
        KarmmaError: another living process writes this shard.
    """

    def __init__(self, root: Path, shard: int, again: Mapping[str, bool] | None = None) -> None:
        self._again = dict(again or {})
        self.catalog = Catalog(root)
        self.root, self.shard = root, shard
        self.spec = self.catalog.spec
        self.clip_ids = self.catalog.clips_in(shard)
        self._order = self.spec.order
        self._arrays = {m: self.spec.modalities[m].arrays for m in self._order}
        self._journal_path = layout.spool_folder(root, shard) / "journal"
        M = len(self._order)
        self._reason = np.zeros((len(self.clip_ids), M), np.uint8)
        self._crc = np.zeros((len(self.clip_ids), M), np.uint32)
        self._times = {
            m: np.full((len(self.clip_ids), 2, self.spec.modalities[m].frames), np.nan)
            for m in self._order
        }
        self.next = 0
        self._former: FormerShard | None = None
        self._broken = False
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        folder = layout.spool_folder(self.root, self.shard)
        with files.disk_errors(self._journal_path), self._stack:
            self._stack.enter_context(
                locks.locked(folder / "lock", f"is writing shard {self.shard}")
            )
            self._journal = self._open(folder / "journal")
            if self._again:
                reopen(self.catalog, self.shard, self._again)
            self._payload = {
                (m, array.name): self._open(folder / f"{m}.{array.name}")
                for m, array in self.spec.arrays
            }
            self._recover()
            if layout.former_record(self.root, self.shard).is_file():
                self._former = FormerShard(self.catalog, self.shard)
                self._former.check(self.next)
            self._stack = self._stack.pop_all()  # kept open from here on
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def wanted(self) -> frozenset[int]:
        """Positions of the clips that must be made; `append` and `commit` take over the others."""
        if self._former is None:
            return frozenset(range(self.next, len(self.clip_ids)))
        return frozenset(i for i in self._former.again if i >= self.next)

    @property
    def done(self) -> frozenset[str]:
        """Ids of the clips that are already in the spool."""
        return frozenset(self.clip_ids[: self.next])

    def append(
        self,
        clip_id: str,
        tokens: Mapping[str, npt.NDArray[Any] | Encoded],
        reasons: Mapping[str, Reason],
        times: Mapping[str, npt.NDArray[np.float64]],
    ) -> None:
        """Append the next clip of the shard.

        In a shard that is made again, what stays before it is taken over first; and so is what
        the clip itself had, where it is absent now.

        Args:
            clip_id: must be the next in clip order.
            tokens: present modalities to [N, D], any float type; cast to the store's. Or to
                what the store's arrays hold, copied as it is.
            reasons: why each other modality is absent.
            times: present modalities to float64 [2, T], requested and real seconds.

        Raises:
            StoreError: order, shapes or values are wrong, or the disk is full.
        """
        if self._former is not None and clip_id in self.clip_ids[self.next :]:
            self._take_over(self.clip_ids.index(clip_id))
            tokens, reasons, times = self._former.fill(self.next, tokens, reasons, times)
        self._append(clip_id, tokens, reasons, times)

    def _take_over(self, end: int) -> None:
        """Append clips up to a position as they were before."""
        while self._former is not None and self.next < end and self.next not in self.wanted:
            self._append(self.clip_ids[self.next], *self._former.of(self.next))

    def _append(
        self,
        clip_id: str,
        tokens: Mapping[str, npt.NDArray[Any] | Encoded],
        reasons: Mapping[str, Reason],
        times: Mapping[str, npt.NDArray[np.float64]],
    ) -> None:
        if clip_id != self.clip_ids[self.next]:
            raise StoreError(
                f"{self.root}: shard {self.shard}: got clip {clip_id!r}, expected "
                f"{self.clip_ids[self.next]!r}."
            )
        if self._broken:
            raise StoreError(
                f"{self.root}: shard {self.shard}: an earlier write failed; start again."
            )
        for m in self._order:
            if m not in tokens and not reasons.get(m):
                raise self._unfit(clip_id, m, "neither tokens nor a reason for their absence")
        encoded = {m: self._encode(clip_id, m, tokens[m]) for m in self._order if m in tokens}
        # A write that failed may have left half a clip in the spool; appending behind it would
        # journal wrong bytes. So the writer refuses until a new one has recovered the spool.
        self._broken = True
        with files.disk_errors(self._journal_path):
            # Tokens first, then the journal record with their checksum: no order of the writes to
            # the disk (nothing is synced here) can make a record count without its tokens.
            for column, m in enumerate(self._order):
                if m in encoded:
                    self._crc[self.next, column] = self._spool(m, encoded[m])
                    self._times[m][self.next] = times.get(m, np.nan)
                else:
                    self._reason[self.next, column] = reasons[m]
            _write(self._journal, self._entry(self.next))
        self._broken = False
        self.next += 1

    def _spool(self, modality: str, encoded: Encoded) -> int:
        crc = 0
        for array, part in zip(self._arrays[modality], encoded, strict=True):
            data = part.tobytes()
            _write(self._payload[modality, array.name], data)
            crc = crc32c(data, crc)
        return crc

    def _encode(self, clip_id: str, modality: str, tokens: npt.NDArray[Any] | Encoded) -> Encoded:
        one = self.spec.modalities[modality]
        if isinstance(tokens, tuple):
            shapes = [(part.shape, part.dtype) for part in tokens]
            if shapes != [((a.tokens, a.width), a.dtype) for a in self._arrays[modality]]:
                raise self._unfit(clip_id, modality, "the encoded arrays do not match the store")
            return tokens
        if tokens.shape != (wanted := (one.tokens, one.width)):
            raise self._unfit(
                clip_id, modality, f"shape of the tokens is {tokens.shape}, expected {wanted}"
            )
        largest = _largest(tokens)
        if not math.isfinite(largest):
            raise self._unfit(clip_id, modality, "NaN or infinity in the tokens")
        if largest > one.largest:
            beyond = f"tokens exceed {one.largest:g}, the maximum of {one.dtype}"
            raise self._unfit(clip_id, modality, beyond)
        return one.encode(tokens)

    def _unfit(self, clip_id: str, modality: str, what: str) -> StoreError:
        return StoreError(f"{self.root}: clip {clip_id!r}: {modality}: {what}.")

    def commit(self) -> None:
        """Turn the spool into the shard's files; the commit record comes last.

        Raises:
            StoreError: clips are missing, or the disk is full.
        """
        self._take_over(len(self.clip_ids))
        if self.next < len(self.clip_ids):
            raise StoreError(
                f"{self.root}: shard {self.shard} has {self.next} of {len(self.clip_ids)} clips."
            )
        # The order is what makes a kill harmless: each file is whole, synced and renamed before the
        # record that says that the shard exists; the spool goes last, and if it stays, the
        # next `finalize` or `gc` removes it.
        if self._former is not None:  # no reader may open what is half old and half new
            (self.root / layout.MANIFEST).unlink(missing_ok=True)
        present = dict(zip(self.spec.order, (self._reason == 0).sum(axis=0).tolist(), strict=True))
        crcs = [self._finish(m, array, present[m]) for m, array in self.spec.arrays]
        record = Record(self._reason, self._crc, self._times, np.array(crcs, np.uint32))
        write_record(self.root, self.shard, record)
        self._stack.close()
        shutil.rmtree(layout.spool_folder(self.root, self.shard), ignore_errors=True)

    def _finish(self, modality: str, array: StoredArray, clips: int) -> int:
        """Write a shard file and return the CRC-32C of all of it."""
        size = self.spec.clips_per_shard
        total = layout.file_bytes(array, size, clips)
        spool = self._payload[modality, array.name]
        spool.seek(0)
        path = layout.shard_file(self.root, modality, self.shard, array.name)
        with files.replacing(path) as temporary:
            create_shard_file(temporary, array, size, clips)
            with temporary.open("r+b") as target:
                crc = crc32c(target.read(layout.PAYLOAD_OFFSET))
                target.seek(layout.PAYLOAD_OFFSET)
                while data := spool.read(_COPY_BYTES) or bytes(
                    min(_COPY_BYTES, total - target.tell())
                ):
                    target.write(data)
                    crc = crc32c(data, crc)
        return crc

    def _open(self, path: Path) -> FileIO:
        """Open a spool without a buffer: what failed to be written is not tried again at exit."""
        path.touch()
        return self._stack.enter_context(path.open("r+b", buffering=0))

    def _entry(self, position: int) -> bytes:
        parts = [struct.pack("<I", position)]
        parts += [self._reason[position].tobytes(), self._crc[position].tobytes()]
        parts += [self._times[m][position].tobytes() for m in self._order]
        body = b"".join(parts)
        return body + struct.pack("<I", crc32c(body))

    def _recover(self) -> None:
        size = len(self._entry(0)) if self.clip_ids else 4
        # After a power cut files may end in zeros or lack their end, each for itself. What counts
        # is the longest run of records whose checksum holds and whose tokens are there.
        journal = self._journal.read()
        ends = dict.fromkeys(self._payload, 0)
        first_again = (i for i, clip in enumerate(self.clip_ids) if clip in self._again)
        end = next(first_again, len(self.clip_ids))
        while self.next < end:
            entry = journal[self.next * size : (self.next + 1) * size]
            if not self._replay(entry, ends):
                break
            self.next += 1
        # `_replay` fills the arrays before it can know that a later modality is cut.
        self._reason[self.next :], self._crc[self.next :] = 0, 0
        for m in self.spec.order:
            self._times[m][self.next :] = np.nan
        for key, spool in self._payload.items():
            spool.truncate(ends[key])
            spool.seek(ends[key])
        self._journal.truncate(self.next * size)
        self._journal.seek(self.next * size)

    def _replay(self, entry: bytes, ends: dict[tuple[str, str], int]) -> bool:
        """Take over one journal record if it and its tokens are whole."""
        if len(entry) < len(self._entry(0)) or entry[-4:] != struct.pack("<I", crc32c(entry[:-4])):
            return False
        M, at = len(self.spec.order), 4
        reason = np.frombuffer(entry, np.uint8, M, at)
        crcs = np.frombuffer(entry, "<u4", M, at + M)
        at += 5 * M
        read = dict(ends)
        for column, m in enumerate(self.spec.order):
            if reason[column] == 0 and self._read_spool(m, read) != crcs[column]:
                return False
            shape = self._times[m].shape[1:]
            count = shape[0] * shape[1]
            self._times[m][self.next] = np.frombuffer(entry, "<f8", count, at).reshape(shape)
            at += 8 * count
        self._reason[self.next], self._crc[self.next] = reason, crcs
        ends.update(read)
        return True

    def _read_spool(self, modality: str, ends: dict[tuple[str, str], int]) -> int:
        """Return the checksum of the next clip in the spools, and move their ends behind it."""
        crc = 0
        for array in self.spec.modalities[modality].arrays:
            spool = self._payload[modality, array.name]
            spool.seek(ends[modality, array.name])
            data = spool.read(array.clip_bytes)
            ends[modality, array.name] += len(data)
            crc = crc32c(data, crc)
        return crc


def _largest(tokens: npt.NDArray[Any]) -> float:
    """Return the largest magnitude, not finite if any value is not."""
    if tokens.dtype == np.float16:  # whose arithmetic is slow; magnitudes order like their bits
        bits = np.ascontiguousarray(tokens).view(np.uint16) & np.uint16(0x7FFF)
        return float(bits.max(initial=0).view(np.float16))
    return float(np.abs(tokens).max(initial=0))


def _write(file: FileIO, data: bytes) -> None:
    left = memoryview(data)  # an unbuffered write may take only a part of it
    while left:
        left = left[file.write(left) :]
