"""Clips kept in several formats, and batches read from them: what store.py compares."""

import mmap
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path

import h5py
import numpy as np
import torch
import zarr

from karmma_pipeline.data.loading.loader import FeatureLoader
from karmma_pipeline.modalities import Reason
from karmma_pipeline.store import (
    ClipRow,
    FeatureStore,
    ModalitySpec,
    ShardWriter,
    StoreSpec,
    create_store,
    finalize,
)

MODALITIES = ("rgb", "flow", "audio")
BATCH = 256
ABSENT = 0.2

Read = Callable[[np.ndarray], object]


@dataclass(frozen=True)
class Case:
    """Clips of ``tokens`` x ``width``, in so many shards."""

    tokens: int
    width: int
    clips: int

    @property
    def name(self) -> str:
        """Return a short name."""
        return f"{self.tokens}x{self.width}, {self.clips} clips"


class Data:
    """The clips of a case; tokens follow from the number of the clip."""

    def __init__(self, case: Case) -> None:
        self.case = case
        rng = np.random.default_rng(0)
        self.present = rng.random((case.clips, len(MODALITIES))) >= ABSENT
        self.pool = rng.normal(size=(64, case.tokens, case.width)).astype(np.float16)

    def clip(self, number: int, column: int) -> np.ndarray:
        """Return tokens [N, D] of a clip, zeros where it is absent."""
        if not self.present[number, column]:
            return np.zeros_like(self.pool[0])
        return self.pool[(number * 3 + column) % len(self.pool)]


def write_ours(data: Data, root: Path, shards: int, dtype: str = "float16") -> Path:
    """Write a feature store."""
    case = data.case
    one = ModalitySpec(tokens=case.tokens, width=case.width, dtype=dtype)
    spec = StoreSpec(
        modalities=dict.fromkeys(MODALITIES, one),
        heads={},
        clips_per_shard=-(-case.clips // shards),
    )
    create_store(root, spec, [ClipRow(f"c{i:06d}", {}) for i in range(case.clips)])
    for shard in range(-(-case.clips // spec.clips_per_shard)):
        with ShardWriter(root, shard) as writer:
            for clip_id in writer.clip_ids:
                i = int(clip_id[1:])
                has = {m: data.present[i, c] for c, m in enumerate(MODALITIES)}
                tokens = {m: data.clip(i, c) for c, m in enumerate(MODALITIES) if has[m]}
                lacks = {m: Reason.NO_STREAM for m in MODALITIES if not has[m]}
                writer.append(clip_id, tokens, lacks, {})
            writer.commit()
    finalize(root)
    return root


def write_memmap(data: Data, root: Path) -> Path:
    """Write one dense raw array per modality."""
    return write_raw(data, root, absent=True)


def write_raw(data: Data, root: Path, absent: bool) -> Path:
    """Write raw arrays, one per modality, with or without the rows of absent clips."""
    root.mkdir()
    for column, m in enumerate(MODALITIES):
        with (root / m).open("wb") as file:
            for i in range(data.case.clips):
                if absent or data.present[i, column]:
                    file.write(data.clip(i, column))
            file.flush()
            os.fsync(file.fileno())
    return root


def write_h5_groups(data: Data, root: Path) -> Path:
    """Write the layout of many research codes: one HDF5 group per clip."""
    with h5py.File(root, "w") as file:
        for i in range(data.case.clips):
            for column, m in enumerate(MODALITIES):
                if data.present[i, column]:
                    file[f"c{i:06d}/{m}"] = data.clip(i, column)
    return root


def write_pt(data: Data, root: Path) -> Path:
    """Write one .pt per clip."""
    root.mkdir()
    for i in range(data.case.clips):
        clip = {
            m: torch.from_numpy(data.clip(i, c).copy())
            for c, m in enumerate(MODALITIES)
            if data.present[i, c]
        }
        torch.save(clip, root / f"{i}.pt")
    return root


def write_webdataset(data: Data, root: Path) -> Path:
    """Write one tar of .npy members."""
    import webdataset

    with webdataset.TarWriter(str(root)) as sink:
        for i in range(data.case.clips):
            arrays = {f"{m}.npy": data.clip(i, c) for c, m in enumerate(MODALITIES)}
            sink.write({"__key__": f"{i:06d}", **arrays})
    return root


def aligned(data: Data) -> list[np.ndarray]:
    """Return page-aligned batches to read into."""
    shape = (BATCH, data.case.tokens, data.case.width)
    size = int(np.prod(shape)) * 2
    return [np.frombuffer(mmap.mmap(-1, size), np.float16).reshape(shape) for _ in MODALITIES]


def limit(data: Data, root: Path) -> Read:
    """Gather with numpy out of memory-mapped arrays, into aligned memory."""
    shape = (data.case.clips, data.case.tokens, data.case.width)
    maps = [np.memmap(root / m, np.float16, "r", shape=shape) for m in MODALITIES]
    out = aligned(data)

    def read(index: np.ndarray) -> object:
        for source, target in zip(maps, out, strict=True):
            np.take(source, index, axis=0, out=target, mode="clip")
        return out

    return read


def ours(root: Path) -> Read:
    """Read with the loader that trains, epoch after epoch: presence, masks and labels included."""
    store = FeatureStore.open(root)
    loader = FeatureLoader(
        store, np.arange(len(store)), BATCH, p=0.3, shuffle=True, drop_last=True, threads=0
    )
    stream = chain.from_iterable(loader.epoch(epoch) for epoch in count())
    return lambda _: next(stream).tokens


def plain_zarr(data: Data, root: Path) -> Read:
    """Read the same store with zarr-python, clip by clip."""
    group = zarr.open_group(root, mode="r")
    arrays = [(group[f"{m}/tokens"], group[f"clips/start_{m}"][:]) for m in MODALITIES]
    out = aligned(data)

    def read(index: np.ndarray) -> object:
        for (array, start), target in zip(arrays, out, strict=True):
            for k, i in enumerate(index):
                target[k] = array[start[i] : start[i] + data.case.tokens] if start[i] >= 0 else 0
        return out

    return read


def h5_groups(data: Data, root: Path) -> Read:
    """Read one HDF5 group per clip."""
    file, out = h5py.File(root), aligned(data)

    def read(index: np.ndarray) -> object:
        for column, m in enumerate(MODALITIES):
            for k, i in enumerate(index):
                present = data.present[i, column]
                out[column][k] = file[f"c{i:06d}/{m}"][:] if present else 0
        return out

    return read


def pt_files(data: Data, root: Path) -> Read:
    """Read one .pt per clip."""
    out = aligned(data)

    def read(index: np.ndarray) -> object:
        for k, i in enumerate(index):
            clip = torch.load(root / f"{i}.pt", weights_only=True)
            for column, m in enumerate(MODALITIES):
                out[column][k] = clip[m].numpy() if m in clip else 0
        return out

    return read


def webdataset_stream(data: Data, root: Path) -> Read:
    """Read a tar in its order with a shuffle buffer: it has no random access."""
    import webdataset

    def batches() -> Iterator[object]:
        while True:
            source = webdataset.WebDataset(str(root), shardshuffle=False).shuffle(BATCH).decode()
            names = tuple(f"{m}.npy" for m in MODALITIES)
            yield from source.to_tuple(*names).batched(BATCH, partial=False)

    stream = batches()
    return lambda _: next(stream)
