"""Writes one shard so that a job killed at any byte goes on and ends with the same bytes.

Tokens are appended to one spool per modality; after them a journal record with their
checksum. What counts after a kill is the longest journal prefix whose tokens are whole.
"""

import os
import shutil
import socket
import struct
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import google_crc32c
import numpy as np
import numpy.typing as npt
import psutil

from karmma_pipeline import files
from karmma_pipeline.data.store import layout
from karmma_pipeline.data.store.catalog import Catalog
from karmma_pipeline.data.store.record import Record, write_record
from karmma_pipeline.errors import StoreError
from karmma_pipeline.modalities import Reason

_COPY_BYTES = 4 << 20


def crc32c(data: Any) -> int:
    """Return the CRC-32C (Castagnoli) of bytes."""
    return int(google_crc32c.value(bytes(data)))


class ShardWriter:
    """Appends clips to one shard in clip order and commits it; one writer per shard.

    A context manager; leaving it without `commit` keeps what was appended for the next run.

    Raises:
        StoreError: another living process writes this shard.
    """

    def __init__(self, root: Path, shard: int) -> None:
        self.catalog = Catalog(root)
        self.root, self.shard = root, shard
        self.spec = self.catalog.spec
        self.clip_ids = self.catalog.clips_in(shard)
        M = len(self.spec.order)
        self._reason = np.zeros((len(self.clip_ids), M), np.uint8)
        self._crc = np.zeros((len(self.clip_ids), M), np.uint32)
        self._times = {
            m: np.full((len(self.clip_ids), 2, self.spec.modalities[m].frames), np.nan)
            for m in self.spec.order
        }
        self.next = 0
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        folder = layout.spool_folder(self.root, self.shard)
        with files.disk_errors(folder / "journal"):
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(folder / "lock", self.shard)
            self._journal = self._open(folder / "journal")
            self._payload = {m: self._open(folder / f"{m}.tokens") for m in self.spec.order}
            self._recover()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()
        self._lock.unlink(missing_ok=True)

    @property
    def done(self) -> frozenset[str]:
        """Ids of the clips that are already in the spool."""
        return frozenset(self.clip_ids[: self.next])

    def append(
        self,
        clip_id: str,
        tokens: Mapping[str, npt.NDArray[Any]],
        reasons: Mapping[str, Reason],
        times: Mapping[str, npt.NDArray[np.float64]],
    ) -> None:
        """Append the next clip of the shard.

        Args:
            clip_id: must be the next in clip order.
            tokens: present modalities to [N, D], any float type; cast to the store's.
            reasons: why each other modality is absent.
            times: present modalities to float64 [2, T], requested and real seconds.

        Raises:
            StoreError: order, shapes or values are wrong, or the disk is full.
        """
        if clip_id != self.clip_ids[self.next]:
            raise StoreError(
                f"{self.root}: shard {self.shard}: clip {clip_id!r} came, "
                f"{self.clip_ids[self.next]!r} is next."
            )
        with files.disk_errors(layout.spool_folder(self.root, self.shard) / "journal"):
            for column, m in enumerate(self.spec.order):
                self._append_one(column, m, tokens.get(m), reasons.get(m), times.get(m))
            self._journal.write(self._entry(self.next))
            self._journal.flush()
        self.next += 1

    def _append_one(
        self,
        column: int,
        modality: str,
        tokens: npt.NDArray[Any] | None,
        reason: Reason | None,
        times: npt.NDArray[np.float64] | None,
    ) -> None:
        one, position = self.spec.modalities[modality], self.next
        where = f"{self.root}: clip {self.clip_ids[position]!r}: {modality}"
        if tokens is None:
            if not reason:
                raise StoreError(f"{where}: neither tokens nor a reason for their absence.")
            self._reason[position, column] = reason
            return
        if tokens.shape != (one.tokens, one.width):
            raise StoreError(f"{where}: tokens {tokens.shape}, not {(one.tokens, one.width)}.")
        if not np.isfinite(tokens).all():
            raise StoreError(f"{where}: NaN or infinity in the tokens.")
        if times is not None:
            self._times[modality][position] = times
        data = one.encode(tokens).tobytes()
        self._crc[position, column] = crc32c(data)
        self._payload[modality].write(data)
        self._payload[modality].flush()

    def commit(self) -> None:
        """Turn the spool into the shard's files; the commit record comes last.

        Raises:
            StoreError: clips are missing, or the disk is full.
        """
        if self.next < len(self.clip_ids):
            raise StoreError(
                f"{self.root}: shard {self.shard} has {self.next} of {len(self.clip_ids)} clips."
            )
        for column, m in enumerate(self.spec.order):
            self._finish(m, int((self._reason[:, column] == 0).sum()))
        write_record(self.root, self.shard, Record(self._reason, self._crc, self._times))
        self._stack.close()
        shutil.rmtree(layout.spool_folder(self.root, self.shard), ignore_errors=True)

    def _finish(self, modality: str, clips: int) -> None:
        one, size = self.spec.modalities[modality], self.spec.clips_per_shard
        with files.replacing(layout.shard_file(self.root, modality, self.shard)) as temporary:
            layout.create_shard_file(temporary, one, size, clips)
            with temporary.open("r+b") as target:
                target.seek(layout.PAYLOAD_OFFSET)
                spool = self._payload[modality]
                spool.seek(0)
                shutil.copyfileobj(spool, target, _COPY_BYTES)
                padding = layout.file_bytes(one, size, clips) - target.tell()
                target.write(bytes(padding))

    def _open(self, path: Path) -> BinaryIO:
        path.touch()
        return self._stack.enter_context(path.open("r+b"))

    def _entry(self, position: int) -> bytes:
        parts = [struct.pack("<I", position)]
        parts += [self._reason[position].tobytes(), self._crc[position].tobytes()]
        parts += [self._times[m][position].tobytes() for m in self.spec.order]
        body = b"".join(parts)
        return body + struct.pack("<I", crc32c(body))

    def _recover(self) -> None:
        size = len(self._entry(0)) if self.clip_ids else 4
        journal = self._journal.read()
        ends = dict.fromkeys(self.spec.order, 0)
        while self.next < len(self.clip_ids):
            entry = journal[self.next * size : (self.next + 1) * size]
            if not self._replay(entry, ends):
                break
            self.next += 1
        self._reason[self.next :], self._crc[self.next :] = 0, 0
        for m in self.spec.order:
            self._times[m][self.next :] = np.nan
            self._payload[m].truncate(ends[m])
            self._payload[m].seek(ends[m])
        self._journal.truncate(self.next * size)
        self._journal.seek(self.next * size)

    def _replay(self, entry: bytes, ends: dict[str, int]) -> bool:
        """Take over one journal record if it and its tokens are whole."""
        if len(entry) < len(self._entry(0)) or entry[-4:] != struct.pack("<I", crc32c(entry[:-4])):
            return False
        M, at = len(self.spec.order), 4
        reason = np.frombuffer(entry, np.uint8, M, at)
        crcs = np.frombuffer(entry, "<u4", M, at + M)
        at += 5 * M
        read = dict(ends)
        for column, m in enumerate(self.spec.order):
            if reason[column] == 0:
                self._payload[m].seek(read[m])
                data = self._payload[m].read(self.spec.modalities[m].clip_bytes)
                if crc32c(data) != crcs[column]:
                    return False
                read[m] += len(data)
            shape = self._times[m].shape[1:]
            count = shape[0] * shape[1]
            self._times[m][self.next] = np.frombuffer(entry, "<f8", count, at).reshape(shape)
            at += 8 * count
        self._reason[self.next], self._crc[self.next] = reason, crcs
        ends.update(read)
        return True


def _lock(path: Path, shard: int) -> Path:
    mine = f"{socket.gethostname()} {os.getpid()} {os.environ.get('SLURM_JOB_ID', '-')}"
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
        host, pid, job = [*path.read_text().split(), "", "0", "-"][:3]
        here = host == socket.gethostname()
        requeued = job != "-" and job == os.environ.get("SLURM_JOB_ID")
        if not requeued and (not here or (psutil.pid_exists(int(pid)) and int(pid) != os.getpid())):
            raise StoreError(
                f"{path}: shard {shard} is being written by process {pid} on {host}; "
                "if that job is dead, remove this file."
            ) from None
        files.write_text(path, mine)
        return path
    with os.fdopen(descriptor, "w") as file:
        file.write(mine)
    return path
