"""Extraction from manifest to stores: prefetch, run the backbones, append, commit.

One stream over all shards: decode processes, a thread that collates batches, the networks and a
thread that writes work at the same time, with a bounded number of clips between them.
"""

import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, Self

from karmma_pipeline import config, files
from karmma_pipeline.data.manifest import Clip, Manifest, describe_heads
from karmma_pipeline.errors import StoreError
from karmma_pipeline.extraction.again import Retry, clips_again
from karmma_pipeline.extraction.decode.pool import DecodePool, default_workers, open_pool
from karmma_pipeline.extraction.inference.batching import (
    BackgroundWriter,
    ForwardWorkers,
    Prefetcher,
    collate,
    one_thread,
    plan_batches,
    worker_count,
)
from karmma_pipeline.extraction.inference.networks import Computed, Job, Networks, configure
from karmma_pipeline.extraction.progress import (
    BACKBONES,
    STARTING,
    WRITING,
    Bar,
    ExtractReport,
    check_failures,
    join,
    shard_seconds,
)
from karmma_pipeline.extraction.recipe import (
    ExtractRecipe,
    check_files,
    read_clips,
    write_groups,
)
from karmma_pipeline.extraction.tables import note_media, note_sources, read_notes
from karmma_pipeline.extraction.types import Batch, BatchPlan, DecodeSettings
from karmma_pipeline.jobs import Part, StopFlag
from karmma_pipeline.modalities import Reason
from karmma_pipeline.store import Catalog, ClipRow, ModalitySpec, ShardWriter, create_store
from karmma_pipeline.store.catalog import continue_list

_logger = logging.getLogger(__name__)


def extract(
    recipe: ExtractRecipe,
    part: Part | None = None,
    stop: StopFlag | None = None,
    manifest: Manifest | None = None,
    retry: Retry | None = None,
) -> ExtractReport:
    """Run an extraction, or go on with one; what is done is not done again.

    Unless files that could not be read, or were not whole, have changed since: their clips are
    made again. Clips that were added to the list come last.

    Args:
        recipe: see `ExtractRecipe`.
        part: which shards are mine; several jobs may run at once.
        stop: asks for a stop between batches.
        manifest: the clips, if they have been read already; some of them will do.
        retry: which absent clips are tried again though their files are the same.

    Raises:
        StoppedError: a stop was asked for; all finished batches are kept.
        TooManyFailuresError: done, but more clips failed than the recipe allows.
        KarmmaError: see the message.
    """
    part, stop = part or Part(), stop or StopFlag()
    if manifest is None:
        manifest = read_clips(recipe)
    for line in (*manifest.notes, *describe_heads(manifest.heads)):
        _logger.info(line)
    check_files(recipe, manifest)
    report = ExtractReport({name: recipe.out / name for name in recipe.sets})
    manifest, grown_from = _as_listed(manifest, report.stores.values())
    networks = Networks(recipe)
    report.workers = recipe.decode.workers or default_workers(
        beside_gpu=networks.device.type != "cpu"
    )
    rows = [_row(clip) for clip in manifest.clips]
    again = _again(recipe, manifest, report.stores.values(), retry)
    # The networks are settled before the stores are made: a store records how they compute, and
    # is refused if another job made it with networks that compute otherwise.
    with one_thread(networks.device):
        configure(networks, report.stores, _logger.info)
        specs = {name: networks.store_spec(name, manifest) for name in report.stores}
        check_room(recipe.out, manifest, {name: spec.modalities for name, spec in specs.items()})
        for name, path in report.stores.items():
            create_store(path, specs[name], rows, grown_from, again)
        config.save(recipe, recipe.out / "recipe.yaml")
        write_groups(recipe.out, manifest)
        _run(recipe, part, stop, manifest, networks, report, again)
    _complete(recipe, report, len(rows))
    return report


def _as_listed(manifest: Manifest, stores: Iterable[Path]) -> tuple[Manifest, tuple[int, ...]]:
    """Return the clips in the order of the stores that are there, and what the list grew from."""
    listed = continue_list(stores, manifest.heads, [_row(clip) for clip in manifest.clips])
    by_id = {clip.clip_id: clip for clip in manifest.clips}
    clips = tuple(replace(by_id[row.clip_id], labels=row.labels) for row in listed.rows)
    return replace(manifest, clips=clips, heads=listed.heads), listed.grown_from


def _row(clip: Clip) -> ClipRow:
    stop = float("nan") if clip.stop_s is None else clip.stop_s
    return ClipRow(clip.clip_id, clip.labels, clip.split, clip.group, clip.start_s, stop)


def check_room(
    out: Path, manifest: Manifest, sets: Mapping[str, Mapping[str, ModalitySpec]]
) -> None:
    """Refuse a disk that cannot hold the tokens of clips that are not done and have files.

    Args:
        out: the folder of the stores.
        manifest: the clips.
        sets: store to modality to what it holds of a clip.

    Raises:
        StoreError: it is too small.
    """
    exists = cache(files.exists)
    needed = 0
    for name, modalities in sets.items():
        root = out / name
        with suppress(StoreError):  # its list may just be growing
            if root.exists() and _is_whole(root):
                continue  # nothing is added, so that nobody has to look at every file
        for path in root.rglob("*"):
            with suppress(OSError):  # another part may just have moved it
                needed -= path.stat().st_size
        for modality, stored in modalities.items():
            media = (clip.media.get(modality) for clip in manifest.clips)
            needed += stored.clip_bytes * sum(exists(s.path) for s in media if s is not None)
    files.check_space(files.existing(out.absolute()), max(0, needed), 0)


def _is_whole(path: Path) -> bool:
    catalog = Catalog(path)
    return len(catalog.committed()) == catalog.shards


def _complete(recipe: ExtractRecipe, report: ExtractReport, clips: int) -> None:
    """Join the stores, if this part was the last one."""

    def all_whole() -> bool:
        return all(_is_whole(path) for path in report.stores.values())

    if not all_whole():
        return
    try:
        report.failed = join(recipe, report.stores)
    except StoreError:
        if all_whole():
            raise
        return  # another part has begun to make shards again, and joins them
    report.complete = True
    if report.clips:
        files.write_json(recipe.out / "extract.json", report.facts())
    check_failures(recipe, report.failed, clips)


def _run(
    recipe: ExtractRecipe,
    part: Part,
    stop: StopFlag,
    manifest: Manifest,
    networks: Networks,
    report: ExtractReport,
    again: Mapping[str, bool],
) -> None:
    catalogs = {name: Catalog(path) for name, path in report.stores.items()}
    missing = _missing_shards(catalogs, part, again.keys())
    clips = sum(len(numbers) for numbers, _ in missing.values())
    if not clips:
        return
    # Left in the opposite order: the writer's thread ends when it has written what was computed,
    # then the networks', then the one that prefetches, then the decode processes; the shards are
    # closed when nobody is left who could write to them or open one.
    read: dict[str, dict[str, Any]] = {}
    with _ShardWriters(catalogs, again) as writers, ExitStack() as stack:
        settings, size = DecodeSettings.of(recipe), networks.batch_size
        pool = stack.enter_context(open_pool(settings, recipe.decode, report.workers, size, stop))
        pool.look_first = True
        plans = _plans(manifest.clips, missing, size, writers, read)
        batches = stack.enter_context(Prefetcher(_batches(plans, pool, networks)))
        report.forward_workers = worker_count(networks)  # while decoders start
        workers = stack.enter_context(ForwardWorkers(networks, report.forward_workers))

        def write(computed: Computed) -> None:
            _write(recipe, networks, computed, writers, report, read)

        writer = stack.enter_context(BackgroundWriter(write))
        bar = stack.enter_context(Bar(clips, report))
        try:
            _stream(batches, workers, writer, stop, report, bar)
        except BaseException:
            stop.request()  # or the threads would go on waiting for decoders
            raise
        finally:
            report.decode_s, report.halved = pool.busy_s, networks.halved


def _again(
    recipe: ExtractRecipe, manifest: Manifest, stores: Iterable[Path], retry: Retry | None
) -> dict[str, bool]:
    """Return the clips that are made again, see `clips_again`, and say which."""
    notes = read_notes(recipe.out)
    if not notes:
        return {}
    catalogs = []
    for path in stores:
        with suppress(StoreError):  # not there yet, or a part was killed while its list grew
            catalogs.append(Catalog(path))
    again = clips_again(manifest.clips, notes, catalogs, retry or Retry())
    if again:
        named = ", ".join(islice(again, 5)) + (", ..." if len(again) > 5 else "")
        _logger.info("extracting %d clips again: %s", len(again), named)
    return again


def _missing_shards(
    catalogs: Mapping[str, Catalog], part: Part, again: Set[str]
) -> dict[int, tuple[range, list[str]]]:
    """Return the shards of a part to be made: their clips and the stores that lack them.

    Those of which clips are made again count as missing in all stores.
    """
    first = next(iter(catalogs.values()))
    committed = {name: catalog.committed() for name, catalog in catalogs.items()}
    missing = {}
    for shard in part.shards(shard_seconds(first)):
        names = [name for name, shards in committed.items() if shard not in shards]
        if again and not again.isdisjoint(first.clips_in(shard)):
            names = list(catalogs)
        if names:
            missing[shard] = (first.shard_range(shard), names)
    return missing


class _ShardWriters:
    """The shards that are being written, of each store; those that are left are closed at the end.

    A shard is opened by the thread that prefetches, before any of its clips is decoded: its lock
    is held from then on, and its journal says how many clips an earlier run has done. It is
    written and committed by the writer's thread.
    """

    def __init__(self, catalogs: Mapping[str, Catalog], again: Mapping[str, bool]) -> None:
        self._catalogs, self._again = catalogs, again
        self._open: dict[tuple[int, str], ShardWriter] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for key in list(self._open):
            self._close(*key)

    def __getitem__(self, key: tuple[int, str]) -> ShardWriter:
        return self._open[key]

    def open(self, shard: int, names: Sequence[str]) -> frozenset[int]:
        """Open a shard of some stores; return which of its clips some of them lack."""
        for name in names:
            catalog = self._catalogs[name]
            again = {c: self._again[c] for c in catalog.clips_in(shard) if c in self._again}
            writer = ShardWriter(catalog.root, shard, again)
            self._open[shard, name] = writer.__enter__()
        return frozenset().union(*(self._open[shard, name].wanted for name in names))

    def commit(self, shard: int, names: Sequence[str]) -> None:
        """Commit a shard to some stores and forget it."""
        for name in names:
            self._open[shard, name].commit()
            self._close(shard, name)

    def _close(self, shard: int, name: str) -> None:
        self._open.pop((shard, name)).__exit__(None, None, None)


def _plans(
    clips: Sequence[Clip],
    missing: Mapping[int, tuple[range, list[str]]],
    size: int,
    writers: _ShardWriters,
    read: dict[str, dict[str, Any]],
) -> Iterator[BatchPlan]:
    """Yield the batches of all shards, one after another; each shard is opened at its turn.

    Before a batch is decoded, what its clips are read from is noted in ``read``.
    """
    for shard, (numbers, names) in missing.items():
        wanted = writers.open(shard, names)
        lacking = {clips[numbers[position]].clip_id for position in wanted}
        for plan in plan_batches(shard, [clips[i] for i in numbers], names, size, wanted):
            for clip in plan.clips:
                noted = note_sources(clip)
                # A clip that is read for its batch alone keeps its note, if its files are gone.
                if clip.clip_id in lacking or any(state for *_, state in noted["sources"]):
                    read[clip.clip_id] = noted
            yield plan


def _batches(plans: Iterator[BatchPlan], pool: DecodePool, networks: Networks) -> Iterator[Batch]:
    """Yield batches collated for the networks, in a thread of its own."""
    for plan, clips in pool.batches(plans):
        yield collate(plan, clips, pin=networks.device.type == "cuda")


def _stream(
    batches: Prefetcher[Batch],
    workers: ForwardWorkers,
    writer: BackgroundWriter[Computed],
    stop: StopFlag,
    report: ExtractReport,
    bar: Bar,
) -> None:
    """Hand decoded batches to the workers, and what they have computed to the writer, in order."""
    source = iter(batches)
    with report.timed(STARTING):
        batch = next(source, None)
    started = time.process_time()
    while batch is not None or len(workers):
        if batch is not None:
            stop.check("all finished batches are saved")
            bar.skip(batch.plan.skipped)
            workers.put(batch)
        # One batch more than can be computed is handed over before the first is waited for, so
        # that no worker is idle meanwhile; at the end of the stream they are only emptied.
        if workers.full or batch is None:
            with report.timed(BACKBONES):
                computed = workers.take()
                report.device_s += computed.wait()
            with report.timed(WRITING):
                writer.put(computed)
            report.count(computed.batch.clips)
            bar.show(len(computed.batch.clips))
        if batch is not None:
            with report.waiting(lambda: workers.idle):
                batch = next(source, None)
        report.cpu_s = time.process_time() - started


def _write(
    recipe: ExtractRecipe,
    networks: Networks,
    computed: Computed,
    writers: _ShardWriters,
    report: ExtractReport,
    read: dict[str, dict[str, Any]],
) -> None:
    """Append a batch to the stores that lack it, in a thread of its own."""
    started = time.perf_counter()
    plan = computed.batch.plan
    noted = [clip for clip in computed.batch.clips if clip.clip_id in read]
    note_media(recipe.out, plan.shard, noted, {c.clip_id: read.pop(c.clip_id) for c in noted})
    for name in plan.stores:
        _append(networks.jobs(name), computed, writers[plan.shard, name])
    if plan.last:
        writers.commit(plan.shard, plan.stores)
    report.write_s += time.perf_counter() - started


def _append(jobs_of_set: Mapping[str, Job], computed: Computed, writer: ShardWriter) -> None:
    # The first batch after a kill begins before the first missing clip: it is computed as a
    # whole, and what the store holds of it already is not written again.
    done = writer.done
    for place, clip in enumerate(computed.batch.clips):
        if clip.clip_id in done:
            continue
        arrays, reasons, times = {}, {}, {}
        for modality, job in jobs_of_set.items():
            tokens = computed.of(job, place)
            if tokens is None:
                reasons[modality] = clip.reasons[job.spec]
            elif not writer.spec.modalities[modality].holds(tokens):
                reasons[modality] = Reason.BAD_VALUE
            else:
                arrays[modality], times[modality] = tokens, clip.times[job.spec]
        writer.append(clip.clip_id, arrays, reasons, times)
