"""Extraction from manifest to stores: decode ahead, run the backbones, append, commit.

One stream over all shards: decode processes, a thread that lays batches out, the networks and a
thread that writes work at the same time, with a bounded number of clips between them.
"""

import logging
import time
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from karmma_pipeline import config, files, jobs
from karmma_pipeline.data.manifest import Clip, Manifest
from karmma_pipeline.extraction import parts
from karmma_pipeline.extraction.background import Ahead, Behind
from karmma_pipeline.extraction.clips import read_clips, write_groups
from karmma_pipeline.extraction.decode.pool import DecodePool
from karmma_pipeline.extraction.decode.shared_memory import Arena, clip_bytes
from karmma_pipeline.extraction.inference.batching import Staged, Work, Writers, plan, stage
from karmma_pipeline.extraction.inference.modes import decide
from karmma_pipeline.extraction.inference.networks import Computed, Networks
from karmma_pipeline.extraction.inference.workers import Lanes, lane_count, one_thread
from karmma_pipeline.extraction.recipe import ExtractRecipe
from karmma_pipeline.extraction.report import BACKBONES, STARTING, WRITING, Bar, ExtractReport
from karmma_pipeline.extraction.types import DecodeSettings
from karmma_pipeline.jobs import Part, StopFlag
from karmma_pipeline.modalities import Reason
from karmma_pipeline.store import Catalog, ClipRow, create_store

_logger = logging.getLogger(__name__)

_WORKER_BYTES = 2 << 30
"""Memory that the job must have for each decode process."""


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
        _logger.info(line)
    networks = Networks(recipe)
    report = ExtractReport({name: recipe.out / name for name in recipe.sets})
    report.workers = recipe.decode.workers or _default_workers(networks)
    rows = [_row(clip) for clip in manifest.clips]
    with one_thread(networks.device):
        decide(networks, report.stores, _logger.info)
        for name, path in report.stores.items():
            create_store(path, networks.store_spec(name, manifest), rows)
        config.save(recipe, recipe.out / "recipe.yaml")
        write_groups(recipe.out, manifest)
        _run(recipe, part, stop, manifest, networks, report)
    if all(_is_whole(path) for path in report.stores.values()):
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
    if report.clips:
        files.write_json(recipe.out / "extract.json", report.facts())
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
    shards = _lacking(catalogs, part)
    clips = sum(len(numbers) for numbers, _ in shards.values())
    if not clips:
        return
    with Writers(catalogs) as opened, ExitStack() as stack:
        works = plan(manifest.clips, shards, networks.batch_size, opened)
        pool = stack.enter_context(_pool(recipe, networks, report, stop, stack))
        staged = stack.enter_context(Ahead(_staged(works, pool, networks)))
        report.lanes = lane_count(networks)  # while decoders start
        lanes = stack.enter_context(Lanes(networks, report.lanes))

        def write(computed: Computed) -> None:
            _write(recipe, networks, computed, opened, report)

        writer = stack.enter_context(Behind(write))
        bar = stack.enter_context(Bar(clips, report))
        try:
            _stream(staged, lanes, writer, stop, report, bar)
        except BaseException:
            stop.request()  # or the threads would go on waiting for decoders
            raise
        finally:
            report.decode_s, report.halved = pool.busy_s, networks.halved


def _lacking(catalogs: dict[str, Catalog], part: Part) -> dict[int, tuple[range, list[str]]]:
    """Return the shards of a part that some stores lack: their clips and those stores."""
    first = next(iter(catalogs.values()))
    committed = {name: catalog.committed() for name, catalog in catalogs.items()}
    found = {}
    for shard in part.shards(parts.shard_seconds(first)):
        names = [name for name, shards in committed.items() if shard not in shards]
        if names:
            found[shard] = (first.shard_range(shard), names)
    return found


def _pool(
    recipe: ExtractRecipe,
    networks: Networks,
    report: ExtractReport,
    stop: StopFlag,
    stack: ExitStack,
) -> DecodePool:
    """Return a pool whose clips, decoded and not yet used, stay within the recipe's memory."""
    settings = DecodeSettings.of(recipe)
    size = clip_bytes(settings)
    ahead = max(report.workers + 1, int(recipe.decode.queue_gb * 1e9 / size))
    ahead = min(ahead, 16 * report.workers + 4 * networks.batch_size)  # more does not help
    arena = Arena(size, ahead + networks.batch_size)
    stack.callback(arena.close)
    decode = recipe.decode
    return DecodePool(
        settings, report.workers, decode.timeout_s, stop, decode.memory_gb, ahead, arena
    )


def _default_workers(networks: Networks) -> int:
    """Return how many CPUs decode: all but one beside a GPU, else half; as memory allows."""
    cpus = jobs.cpu_count()
    room = jobs.memory_limit() // _WORKER_BYTES
    return max(1, min(room, cpus // 2 if networks.device.type == "cpu" else cpus - 1))


def _staged(works: Iterator[Work], pool: DecodePool, networks: Networks) -> Iterator[Staged]:
    """Yield batches laid out for the networks, in a thread of its own."""
    planned: deque[Work] = deque()

    def clips() -> Iterator[list[Clip]]:
        for work in works:
            planned.append(work)
            yield work.clips

    for decoded in pool.batches(clips()):
        yield stage(planned.popleft(), decoded, pin=networks.device.type == "cuda")


def _stream(
    staged: Ahead[Staged],
    lanes: Lanes,
    writer: Behind[Computed],
    stop: StopFlag,
    report: ExtractReport,
    bar: Bar,
) -> None:
    """Hand decoded batches to the lanes, and what they have computed to the writer, in order."""
    source = iter(staged)
    with report.timed(STARTING):
        batch = next(source, None)
    started = time.process_time()
    while batch is not None or len(lanes):
        if batch is not None:
            stop.check("all finished batches are kept")
            bar.skip(batch.work.skipped)
            lanes.put(batch)
        if lanes.full or batch is None:
            with report.timed(BACKBONES):
                computed = lanes.take()
                report.device_s += computed.wait()
            with report.timed(WRITING):
                writer.put(computed)
            report.count(computed.staged.clips)
            bar.show(len(computed.staged.clips))
        if batch is not None:
            with report.waiting(lanes):
                batch = next(source, None)
        report.cpu_s = time.process_time() - started


def _write(
    recipe: ExtractRecipe,
    networks: Networks,
    computed: Computed,
    opened: Writers,
    report: ExtractReport,
) -> None:
    """Append a batch to the stores that lack it, in a thread of its own."""
    started = time.perf_counter()
    work = computed.staged.work
    shard = next(iter(work.writers.values())).shard
    parts.note_media(recipe.out, shard, computed.staged.clips)
    for name in work.writers:
        _append(recipe, networks, name, computed)
    if work.last:
        opened.commit(work.writers)
    report.write_s += time.perf_counter() - started


def _append(recipe: ExtractRecipe, networks: Networks, name: str, computed: Computed) -> None:
    work, jobs_of_set = computed.staged.work, networks.jobs(name)
    writer = work.writers[name]
    done = writer.done
    for place, clip in enumerate(computed.staged.clips):
        if clip.clip_id in done:
            continue
        arrays, reasons, times = {}, {}, {}
        for modality, job in jobs_of_set.items():
            found = computed.of(job, place)
            if found is None:
                reasons[modality] = clip.reasons[job.spec]
            elif not float(np.abs(found).max()) <= writer.spec.modalities[modality].largest:
                reasons[modality] = Reason.BAD_VALUE
            else:
                arrays[modality], times[modality] = found, clip.times[job.spec]
        writer.append(clip.clip_id, arrays, reasons, times)
