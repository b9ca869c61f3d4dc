"""Feature store against the limit (a numpy memmap gather) and other formats.

    python benchmarks/store.py [--quick] [--folder DIR]

Random batches of 256 clips, three modalities, fp16, a fifth of the clips without each. A ratio is
time of the limit / time of the system, both measured in turn: 1.00 is the limit, more is faster.
All fill tensors of the same size, absent clips with zeros. The limit reads a dense array in which
these are stored; ours reads them from one row that is always in the processor's cache, which is
why it can be above 1. Every file was read once before (in the page cache, mapped), and every batch
is another one. Ours is the loader that trains: an order of the epoch, masks drawn with p = 0.3.
The ratio of writing is that of writing the present tokens alone into one file per modality, fsync
included, to writing the store.
"""

import argparse
import json
import mmap
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path

import h5py
import numpy as np
import torch
import zarr

from karmma_pipeline.data.loader import FeatureLoader
from karmma_pipeline.data.store import (
    ClipRow,
    FeatureStore,
    ModalitySpec,
    ShardWriter,
    StoreSpec,
    create_store,
    finalize,
)
from karmma_pipeline.modalities import Reason

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
    return _write_raw(data, root, absent=True)


def _write_raw(data: Data, root: Path, absent: bool) -> Path:
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


def ours(root: Path, threads: int) -> Read:
    """Read with the loader that trains, epoch after epoch: presence, masks and labels included."""
    store = FeatureStore.open(root)
    loader = FeatureLoader(
        store, np.arange(len(store)), BATCH, p=0.3, shuffle=True, drop_last=True, threads=threads
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


def ratios(
    data: Data, base: Read, systems: dict[str, Read], rounds: int
) -> dict[str, tuple[float, float, float]]:
    """Return median, least and most of limit / system, the limit timed before and after each."""
    rng = np.random.default_rng(1)
    found: dict[str, list[float]] = {name: [] for name in systems}

    def clock(read: Read, batches: int) -> float:
        spent = 0.0
        for _ in range(batches):
            index = rng.integers(0, data.case.clips, BATCH)
            started = time.perf_counter()
            read(index)
            spent += time.perf_counter() - started
        return spent / batches

    for name in (BASE, *systems):
        read = systems.get(name, base)
        for start in range(0, data.case.clips if name in {BASE, *mapped(systems)} else 1, BATCH):
            read(np.arange(start, start + BATCH) % data.case.clips)
    for _ in range(rounds):
        for name, read in systems.items():
            before = clock(base, 5)
            taken = clock(read, 5 if name in mapped(systems) else 1)
            after = clock(base, 5)
            found[name].append((before + after) / 2 / taken)
    return {n: (float(np.median(r)), min(r), max(r)) for n, r in found.items()}


BASE = "numpy memmap gather"


def mapped(systems: Iterable[str]) -> list[str]:
    """Return those that are so fast that several batches are timed at once."""
    return [name for name in systems if name.startswith("**")]


def read_table(
    case: Case, folder: Path, rounds: int, shard_counts: list[int], others: bool
) -> Iterator[str]:
    """Yield the rows of a case; with ``others`` those of other formats too."""
    data = Data(case)
    written: dict[str, float] = {}

    def timed(name: str, write: Callable[[], Path]) -> Path:
        started = time.perf_counter()
        path = write()
        written[name] = time.perf_counter() - started
        return path

    base_path = write_memmap(data, folder / "raw")
    systems: dict[str, Read] = {}
    plain = 0.0
    for shards in shard_counts:
        name = f"**karmma store, {shards} shard{'s' if shards > 1 else ''}**"
        place = folder / f"ours_{shards}"
        timed("plain", lambda p=folder / f"plain_{shards}": _write_raw(data, p, absent=False))
        plain = min(plain or written["plain"], written["plain"])
        systems[name] = ours(timed(name, lambda p=place, s=shards: write_ours(data, p, s)), 0)
        systems[f"{name}, read ahead by a thread"] = ours(place, 1)
    if others:
        systems |= other_systems(data, folder, folder / f"ours_{shard_counts[0]}", timed)
    found = ratios(data, limit(data, base_path), systems, rounds)
    for name, (median, least, most) in found.items():
        write = f"{plain / written[name]:.2f}" if name in written else ""
        yield f"| {case.name} | {name} | {median:.3g} | {least:.3g} - {most:.3g} | {write} |"


def other_systems(
    data: Data, folder: Path, store: Path, timed: Callable[[str, Callable[[], Path]], Path]
) -> dict[str, Read]:
    """Write and open the other formats."""
    systems: dict[str, Read] = {}
    name, place = "**karmma store, int8 (as stored)**", folder / "ours_int8"
    systems[name] = ours(timed(name, lambda: write_ours(data, place, 1, "int8")), 0)
    systems["zarr-python, the same store"] = plain_zarr(data, store)
    name = "h5py, one group per clip"
    systems[name] = h5_groups(data, timed(name, lambda: write_h5_groups(data, folder / "g.h5")))
    name = "one .pt per clip"
    systems[name] = pt_files(data, timed(name, lambda: write_pt(data, folder / "pt")))
    name = "webdataset (in order, shuffled in a buffer)"
    try:
        path = timed(name, lambda: write_webdataset(data, folder / "w.tar"))
        systems[name] = webdataset_stream(data, path)
    except ImportError:
        text = "webdataset is not installed: left out (pip install 'karmma-pipeline[benchmark]')"
        print(text, file=sys.stderr)
    return systems


OPEN = """
import json, sys, time
from pathlib import Path
import psutil, torch
from karmma_pipeline.data.store import FeatureStore
process = psutil.Process()
before = process.memory_info().rss
started, cpu = time.perf_counter(), time.process_time()
store = FeatureStore.open(Path(sys.argv[1]))
opened = time.perf_counter() - started
memory = process.memory_info().rss - before
for m in store.modalities:
    store.gather(m, torch.arange(256) * (len(store) // 256))
print(json.dumps({
    "open_s": opened, "open_mb": memory / 1e6,
    "first_s": time.perf_counter() - started,
    "first_mb": (process.memory_info().rss - before) / 1e6,
    "cpu_s": time.process_time() - cpu, "shards": -(-len(store) // 256),
}))
"""


def open_table(folder: Path, clips: int) -> Iterator[str]:
    """Yield what opening a large store costs in a fresh process."""
    from sparse import write_sparse_store

    root = write_sparse_store(folder / "sparse", clips)
    command = [sys.executable, "-c", OPEN, str(root)]
    runs = []
    for _ in range(3):
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        runs.append(json.loads(done.stdout))
    best = min(runs, key=lambda run: run["first_s"])
    yield (
        f"| {clips} clips, {best['shards']} shards x 3 | {best['open_s']:.3f} s, "
        f"{best['open_mb']:.0f} MB | {best['first_s']:.2f} s, {best['first_mb']:.0f} MB | "
        f"{best['cpu_s']:.2f} s |"
    )


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small: shows that it works")
    parser.add_argument("--folder", type=Path, help="where to work (default: the temporary folder)")
    parser.add_argument("--rounds", type=int, help="rounds of each system")
    parser.add_argument(
        "--only", choices=["8x1024", "300x1024", "open"], help="one part of it (default: all)"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.only != "open":
        print(f"| clips | system | {BASE} / system | range | plain writing / system |")
        print("|---|---|---:|---|---:|")
        for case, shard_counts, others in cases(options.quick):
            if case.name.startswith(options.only or ""):
                rounds = options.rounds or (2 if options.quick else 7)
                with work_folder(options.folder) as folder:
                    for line in read_table(case, folder, rounds, shard_counts, others):
                        print(line, flush=True)
    if options.only in {None, "open"}:
        print("\n| store | open | and first batch of all modalities | CPU |\n|---|---|---|---|")
        with work_folder(options.folder) as folder:
            for line in open_table(folder, 20_000 if options.quick else 1_000_000):
                print(line)


def cases(quick: bool) -> list[tuple[Case, list[int], bool]]:
    """Return cases, each with its numbers of shards and whether other formats take part."""
    if quick:
        return [(Case(8, 1024, 1000), [1, 1000], True), (Case(300, 1024, 256), [1], True)]
    return [
        (Case(8, 1024, 6000), [1, 1000], True),
        (Case(300, 1024, 400), [1], True),
        (Case(300, 1024, 1000), [1, 1000], False),
    ]


@contextmanager
def work_folder(where: Path | None) -> Iterator[Path]:
    """Lend a folder and take it away."""
    with tempfile.TemporaryDirectory(prefix="karmma-benchmark-", dir=where) as folder:
        yield Path(folder)


if __name__ == "__main__":
    main()
