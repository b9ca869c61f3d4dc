"""Feature store against the limit (a numpy memmap gather) and other formats.

    python benchmarks/store.py [--quick] [--folder DIR]

Random batches of 256 clips, three modalities, fp16, a fifth of the clips without each. A ratio is
time of the limit / time of the system, both measured in turn and equally long, one system after
the other: 1.00 is the limit, more is faster. In brackets stands the ratio of CPU time, which other
jobs on the machine hardly touch. On a virtual machine a file may lie in far memory, which costs
half as much again and has nothing to do with its format: the mapped stores and the limit are
written anew several times, and a median is of all places.

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


Rounds = dict[str, list[tuple[float, float]]]
"""System to limit / system in each round, by the wall's clock and by the processor's."""


def ratios(data: Data, base: Read, systems: dict[str, Read], rounds: int) -> Rounds:
    """Time each system in turn with the limit."""
    rng = np.random.default_rng(1)

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
    found: Rounds = {name: [] for name in systems}
    for name, read in systems.items():
        batches = 10 if name in mapped(systems) else 1
        for _ in range(rounds):
            limit, taken = clock(base, batches), clock(read, batches)
            found[name].append((limit[0] / taken[0], limit[1] / max(1e-9, taken[1])))
    return found


def mapped(systems: Iterable[str]) -> list[str]:
    """Return those that are so fast that several batches are timed at once."""
    return [name for name in systems if name.startswith("**")]


def read_table(
    case: Case, folder: Path, rounds: int, places: int, shard_counts: list[int], others: bool
) -> Iterator[str]:
    """Yield the rows of a case; with ``others`` those of other formats too."""
    data = Data(case)
    found: Rounds = {}
    writing: dict[str, float] = {}
    for number in range(places):
        with work_folder(folder) as place:
            some = one_place(data, place, rounds, shard_counts, others and not number, writing)
        for name, pairs in some.items():
            found.setdefault(name, []).extend(pairs)
    for name, pairs in found.items():
        wall, cpu = (np.array([pair[k] for pair in pairs]) for k in (0, 1))
        write = f"{writing[name]:.2f}" if name in writing else ""
        cells = (
            f"{np.median(wall):.3g} ({np.median(cpu):.3g}) | {wall.min():.3g} - {wall.max():.3g}"
        )
        yield f"| {case.name} | {name} | {cells} | {write} |"


def one_place(
    data: Data,
    folder: Path,
    rounds: int,
    shard_counts: list[int],
    others: bool,
    writing: dict[str, float],
) -> Rounds:
    """Write everything once and read it; ``writing`` gets plain writing / system."""
    written: dict[str, float] = {}

    def timed(name: str, write: Callable[[], Path]) -> Path:
        started = time.perf_counter()
        path = write()
        written[name] = time.perf_counter() - started
        return path

    base_path = formats.write_memmap(data, folder / "raw")
    systems: dict[str, Read] = {}
    plain: list[float] = []
    for shards in shard_counts:
        name = f"**karmma store, {shards} shard{'s' if shards > 1 else ''}**"
        place = folder / f"ours_{shards}"
        raw = folder / f"plain_{shards}"
        timed("plain", lambda p=raw: formats.write_raw(data, p, absent=False))
        plain.append(written.pop("plain"))
        systems[name] = formats.ours(
            timed(name, lambda p=place, s=shards: formats.write_ours(data, p, s))
        )
    if others:
        systems |= other_systems(data, folder, folder / f"ours_{shard_counts[0]}", timed)
    writing.update({name: min(plain) / seconds for name, seconds in written.items()})
    return ratios(data, formats.limit(data, base_path), systems, rounds)


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
from karmma_pipeline.store import FeatureStore
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
    parser.add_argument("--rounds", type=int, help="rounds of each system in each place")
    parser.add_argument("--places", type=int, help="how often everything is written anew")
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
                places = options.places or (1 if options.quick else 3)
                with work_folder(options.folder) as folder:
                    others = others and not options.ours
                    for line in read_table(case, folder, rounds, places, shard_counts, others):
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
        (Case(8, 1024, 20_000), [1, 1000], True),
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
