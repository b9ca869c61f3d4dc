"""Feature store against the limit (a numpy memmap gather) and other formats.

    python benchmarks/store.py [--quick] [--folder DIR]

Random batches of 256 clips, three modalities, fp16, a fifth of the clips without each. A ratio is
time of the limit / time of the system, both measured in turn: 1.00 is the limit, more is faster.
In brackets stands the ratio of CPU time, which other jobs on the machine hardly touch.

All fill tensors of the same size, absent clips with zeros. The limit reads a dense array in which
these are stored; ours reads them from one row that is always in the processor's cache, which is
why it can be above 1. Every file was read once before (in the page cache, mapped), and every batch
is another one. Ours is the loader that trains: an order of the epoch, masks drawn with p = 0.3.
It gathers when asked here; in a training a thread does so ahead, and train.py shows what is left to
wait for.
The ratio of writing is that of writing the present tokens alone into one file per modality, fsync
included, to writing the store.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import formats
import numpy as np
import torch
from formats import BATCH, Case, Data, Read
from sparse import write_sparse_store

BASE = "numpy memmap gather"


def ratios(
    data: Data, base: Read, systems: dict[str, Read], rounds: int
) -> dict[str, tuple[float, float, float, float]]:
    """Return median, least and most of limit / system, the limit timed before and after each.

    The fourth is the median of the ratios of CPU time, which other jobs hardly touch.
    """
    rng = np.random.default_rng(1)
    found: dict[str, list[float]] = {name: [] for name in systems}
    processor: dict[str, list[float]] = {name: [] for name in systems}

    def clock(read: Read, batches: int) -> tuple[float, float]:
        spent = cpu = 0.0
        for _ in range(batches):
            index = rng.integers(0, data.case.clips, BATCH)
            started, before = time.perf_counter(), time.process_time()
            read(index)
            spent += time.perf_counter() - started
            cpu += time.process_time() - before
        return spent / batches, cpu / batches

    for name in (BASE, *systems):
        read = systems.get(name, base)
        for start in range(0, data.case.clips if name in {BASE, *mapped(systems)} else 1, BATCH):
            read(np.arange(start, start + BATCH) % data.case.clips)
    for _ in range(rounds):
        for name, read in systems.items():
            before = clock(base, 5)
            taken = clock(read, 5 if name in mapped(systems) else 1)
            after = clock(base, 5)
            found[name].append((before[0] + after[0]) / 2 / taken[0])
            processor[name].append((before[1] + after[1]) / 2 / max(1e-9, taken[1]))
    return {
        n: (float(np.median(r)), min(r), max(r), float(np.median(processor[n])))
        for n, r in found.items()
    }


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

    base_path = formats.write_memmap(data, folder / "raw")
    systems: dict[str, Read] = {}
    plain = 0.0
    for shards in shard_counts:
        name = f"**karmma store, {shards} shard{'s' if shards > 1 else ''}**"
        place = folder / f"ours_{shards}"
        timed(
            "plain", lambda p=folder / f"plain_{shards}": formats.write_raw(data, p, absent=False)
        )
        plain = min(plain or written["plain"], written["plain"])
        path = timed(name, lambda p=place, s=shards: formats.write_ours(data, p, s))
        systems[name] = formats.ours(path)
    if others:
        systems |= other_systems(data, folder, folder / f"ours_{shard_counts[0]}", timed)
    found = ratios(data, formats.limit(data, base_path), systems, rounds)
    for name, (median, least, most, cpu) in found.items():
        write = f"{plain / written[name]:.2f}" if name in written else ""
        cells = f"{median:.3g} ({cpu:.3g}) | {least:.3g} - {most:.3g} | {write}"
        yield f"| {case.name} | {name} | {cells} |"


def other_systems(
    data: Data, folder: Path, store: Path, timed: Callable[[str, Callable[[], Path]], Path]
) -> dict[str, Read]:
    """Write and open the other formats."""
    systems: dict[str, Read] = {}
    name, place = "**karmma store, int8 (as stored)**", folder / "ours_int8"
    systems[name] = formats.ours(timed(name, lambda: formats.write_ours(data, place, 1, "int8")))
    systems["zarr-python, the same store"] = formats.plain_zarr(data, store)
    name = "h5py, one group per clip"
    systems[name] = formats.h5_groups(
        data, timed(name, lambda: formats.write_h5_groups(data, folder / "g.h5"))
    )
    name = "one .pt per clip"
    systems[name] = formats.pt_files(
        data, timed(name, lambda: formats.write_pt(data, folder / "pt"))
    )
    name = "webdataset (in order, shuffled in a buffer)"
    try:
        path = timed(name, lambda: formats.write_webdataset(data, folder / "w.tar"))
        systems[name] = formats.webdataset_stream(data, path)
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
    parser.add_argument("--ours", action="store_true", help="without the other formats")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.only != "open":
        print(f"| clips | system | {BASE} / system | range | plain writing / system |")
        print("|---|---|---:|---|---:|")
        for case, shard_counts, others in cases(options.quick):
            if case.name.startswith(options.only or ""):
                rounds = options.rounds or (2 if options.quick else 7)
                with work_folder(options.folder) as folder:
                    others = others and not options.ours
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
