"""Extraction from manifest to stores: decode ahead, run the backbones, append, commit.

Batches are aligned to the start of their shard, so that a clip is always computed in the same
company: a run that was killed and goes on writes the same bytes as one that was not.
"""

import os
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from karmma_pipeline import config, files, jobs
from karmma_pipeline.data.manifest import Clip, Manifest
from karmma_pipeline.data.store import (
    Catalog,
    ClipRow,
    ShardWriter,
    create_store,
)
from karmma_pipeline.extract import parts
from karmma_pipeline.extract.clips import read_clips, write_groups
from karmma_pipeline.extract.decode import Decoded, Settings, input_spec
from karmma_pipeline.extract.networks import Done, Networks
from karmma_pipeline.extract.pool import DecodePool
from karmma_pipeline.extract.recipe import ExtractRecipe
from karmma_pipeline.jobs import Part, StopFlag
from karmma_pipeline.modalities import Reason

_WORKER_BYTES = 2 << 30
"""Memory that the job must have for each decode process."""


@dataclass
class ExtractReport:
    """What an extraction did; seconds by what they went to (waiting for decoders counts).

    padded: audio windows that reach past their track; audio_rates: clips by the rate, in Hz,
    at which their sound was recorded; decoders: clips by modality and what read it.
    """

    stores: dict[str, Path]
    clips: int = 0
    failed: int = 0
    complete: bool = False
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    padded: int = 0
    audio_rates: Counter[int] = field(default_factory=Counter)
    decoders: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))

    def count(self, batch: list[Decoded]) -> None:
        """Take note of a batch that is done."""
        self.clips += len(batch)
        self.padded += sum(clip.padded for clip in batch)
        self.audio_rates.update(clip.audio_rate for clip in batch if clip.audio_rate)
        for clip in batch:
            for modality, decoder in clip.decoders.items():
                self.decoders[modality][decoder] += 1

    def summary(self) -> str:
        """Return the closing lines of the command."""
        lines = [f"store {name}: {path}" for name, path in self.stores.items()]
        total = sum(self.seconds.values())
        if self.clips and total:
            shares = ", ".join(f"{k} {v / total:.0%}" for k, v in sorted(self.seconds.items()))
            lines.append(f"{self.clips} clips, {self.clips / total:.1f} clips/s: {shares}")
        if not self.complete:
            lines.append("this part is done; the stores are complete when the other parts are")
        elif self.failed:
            lines.append(f"{self.failed} clips lost a modality to an error; see failures.csv")
        return "\n".join(lines)


def extract(
    recipe: ExtractRecipe,
    part: Part | None = None,
    stop: StopFlag | None = None,
    manifest: Manifest | None = None,
) -> ExtractReport:
    """Run an extraction, or go on with one; what is done is not done again.

    Args:
        recipe: see `ExtractRecipe`.
        part: which shards are mine; several jobs may run at once.
        stop: asks for a stop between batches.
        manifest: the clips, if they have been read already; some of them will do.

    Raises:
        StoppedError: a stop was asked for; all finished batches are kept.
        TooManyFailuresError: done, but more clips failed than the recipe allows.
        KarmmaError: see the message.
    """
    part, stop = part or Part(), stop or StopFlag()
    if manifest is None:
        manifest = read_clips(recipe)
    for line in manifest.found:
        tqdm.write(line, file=sys.stderr)
    networks = Networks(recipe)
    stores = {name: recipe.out / name for name in recipe.sets}
    rows = [_row(clip) for clip in manifest.clips]
    for name, path in stores.items():
        create_store(path, networks.store_spec(name, manifest), rows)
    config.save(recipe, recipe.out / "recipe.yaml")
    write_groups(recipe.out, manifest)
    report = ExtractReport(stores)
    _run(recipe, part, stop, manifest, networks, report)
    if all(_is_whole(path) for path in stores.values()):
        _complete(recipe, report, len(rows))
    return report


def _row(clip: Clip) -> ClipRow:
    stop = float("nan") if clip.stop_s is None else clip.stop_s
    return ClipRow(clip.clip_id, clip.labels, clip.split, clip.group, clip.start_s, stop)


def _is_whole(path: Path) -> bool:
    catalog = Catalog(path)
    return len(catalog.committed()) == catalog.shards


def _complete(recipe: ExtractRecipe, report: ExtractReport, clips: int) -> None:
    report.failed = parts.join(recipe, report.stores)
    report.complete = True
    summary = {
        "clips": report.clips,
        "failed": report.failed,
        "audio_windows_padded": report.padded,
        "decoders": {m: dict(counts) for m, counts in report.decoders.items()},
        "audio_native_rates": {str(hz): n for hz, n in sorted(report.audio_rates.items())},
        "seconds": {k: round(v, 3) for k, v in report.seconds.items()},
    }
    if report.clips:
        files.write_json(recipe.out / "extract.json", summary)
    parts.check_failures(recipe, report.failed, clips)


def _run(
    recipe: ExtractRecipe,
    part: Part,
    stop: StopFlag,
    manifest: Manifest,
    networks: Networks,
    report: ExtractReport,
) -> None:
    catalogs = {name: Catalog(path) for name, path in report.stores.items()}
    first = next(iter(catalogs.values()))
    todo = {
        shard: [n for n, c in catalogs.items() if shard not in c.committed()]
        for shard in part.shards(parts.shard_seconds(first))
    }
    todo = {shard: names for shard, names in todo.items() if names}
    clips = sum(len(first.shard_range(shard)) for shard in todo)
    if not clips:
        return
    settings = Settings.of(recipe)
    workers = recipe.decode.workers or _default_workers(networks)
    with (
        _threads(networks, jobs.cpu_count() - workers),
        DecodePool(
            settings, workers, recipe.decode.timeout_s, stop, recipe.decode.memory_gb
        ) as pool,
        tqdm(total=clips, desc="extract", unit="clip") as bar,
    ):
        for shard, names in todo.items():
            with ExitStack() as stack:
                writers = {
                    name: stack.enter_context(ShardWriter(report.stores[name], shard))
                    for name in names
                }
                for batch in _shard(recipe, manifest, catalogs, shard, writers, pool, report, bar):
                    stop.check("all finished batches are kept")
                    done: Done = {}
                    for name, writer in writers.items():
                        _append(recipe, networks, name, writer, batch, done, report)
                    report.count(batch)
                    _show(bar, report, len(batch))
                with _timed(report, "write"):
                    for writer in writers.values():
                        writer.commit()


def _default_workers(networks: Networks) -> int:
    """Return how many CPUs decode: all but one beside a GPU, else half; as memory allows."""
    cpus = jobs.cpu_count()
    room = jobs.memory_limit() // _WORKER_BYTES
    return max(1, min(room, cpus // 2 if networks.device.type == "cpu" else cpus - 1))


@contextmanager
def _threads(networks: Networks, count: int) -> Iterator[None]:
    """Leave the decoders their CPUs: threads that outnumber CPUs spin for one another.

    On two CPUs 1 + 1 extracted 2.5 times as fast as 2 + 2.
    """
    before = torch.get_num_threads()
    if networks.device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, count))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _shard(
    recipe: ExtractRecipe,
    manifest: Manifest,
    catalogs: dict[str, Catalog],
    shard: int,
    writers: dict[str, ShardWriter],
    pool: DecodePool,
    report: ExtractReport,
    bar: "tqdm[Any]",
) -> Iterator[list[Decoded]]:
    """Yield the decoded batches of a shard that some store still lacks."""
    numbers = next(iter(catalogs.values())).shard_range(shard)
    size = recipe.batch_size
    done = min(writer.next for writer in writers.values()) // size * size
    bar.update(min(done, len(numbers)))
    batches = (
        [manifest.clips[i] for i in numbers[first : first + size]]
        for first in range(done, len(numbers), size)
    )
    source = pool.batches(batches)
    while True:
        with _timed(report, "decode wait"):
            batch = next(source, None)
        if batch is None:
            return
        yield batch


def _append(
    recipe: ExtractRecipe,
    networks: Networks,
    name: str,
    writer: ShardWriter,
    batch: list[Decoded],
    done: Done,
    report: ExtractReport,
) -> None:
    missing = [clip for clip in batch if clip.clip_id not in writer.done]
    if not missing:
        return
    choices = recipe.sets[name]
    with _timed(report, "backbones"):
        tokens = {m: networks.tokens(m, choice, batch, done) for m, choice in choices.items()}
    with _timed(report, "write"):
        for clip in missing:
            arrays, reasons, times = {}, {}, {}
            for modality, choice in choices.items():
                spec = input_spec(modality, choice)
                found = tokens[modality].get(clip.clip_id)
                if found is None:
                    reasons[modality] = clip.reasons[spec]
                elif not float(np.abs(found).max()) <= writer.spec.modalities[modality].largest:
                    reasons[modality] = Reason.BAD_VALUE
                else:
                    arrays[modality], times[modality] = found, clip.times[spec]
            writer.append(clip.clip_id, arrays, reasons, times)


@contextmanager
def _timed(report: ExtractReport, what: str) -> Iterator[None]:
    started = time.perf_counter()
    try:
        yield
    finally:
        report.seconds[what] += time.perf_counter() - started


def _show(bar: "tqdm[Any]", report: ExtractReport, clips: int) -> None:
    total = sum(report.seconds.values())
    shares = {k: f"{v / total:.0%}" for k, v in sorted(report.seconds.items())}
    bar.set_postfix(shares, refresh=False)
    bar.update(clips)
