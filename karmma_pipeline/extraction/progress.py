"""Progress of an extraction: remaining shards, their assignment to tasks, bar and summary."""

import shlex
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from karmma_pipeline import config, files
from karmma_pipeline.errors import StoreError, TooManyFailuresError, counted
from karmma_pipeline.extraction.recipe import ExtractRecipe
from karmma_pipeline.extraction.tables import FAILURES, write_tables
from karmma_pipeline.extraction.types import DecodedClip
from karmma_pipeline.jobs import Part
from karmma_pipeline.logs import progress_bar
from karmma_pipeline.store import Catalog, finalize
from karmma_pipeline.store.format import layout

#: In the folder of an extraction: the resolved recipe that made it.
RECIPE = "recipe.yaml"

STARTING, BACKBONES = "start-up", "backbones"
#: What keeps the networks, or keeps them from working; start-up ends with the first batch.
DECODING, WRITING = "decode wait", "write wait"

_BOUND = {BACKBONES: "backbone-bound", DECODING: "decode-bound", WRITING: "write-bound"}
_RATE = "{desc} {percentage:3.0f}%|{bar:10}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"


@dataclass(repr=False)
class ExtractReport:
    """What an extraction did; ``seconds`` that passed by what they went to.

    Attributes:
        cpu_s: CPU seconds of the main process, without start-up.
        decode_s: CPU seconds of the decode processes on decoding, all together.
        write_s: seconds that the writer worked, beside the networks.
        device_s: seconds that a GPU worked; a CPU's are those of the backbones.
        workers: decode processes.
        forward_workers: batches that are computed at the same time, each on one CPU.
        halved: batches that did not fit into memory and were halved.
        padded: audio windows that reach past their track.
        audio_rates: clips by the rate, in Hz, at which their sound was recorded.
        decoders: clips by modality and what read it.
        marks: clips that were done, and when, after each batch.
    """

    stores: dict[str, Path]
    clips: int = 0
    failed: int = 0
    complete: bool = False
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    cpu_s: float = 0.0
    decode_s: float = 0.0
    write_s: float = 0.0
    device_s: float = 0.0
    workers: int = 0
    forward_workers: int = 0
    halved: int = 0
    padded: int = 0
    audio_rates: Counter[int] = field(default_factory=Counter)
    decoders: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    marks: list[tuple[int, float]] = field(default_factory=list)

    def count(self, batch: list[DecodedClip]) -> None:
        """Take note of a batch that is done."""
        self.clips += len(batch)
        self.marks.append((self.clips, time.perf_counter()))
        self.padded += sum(clip.padded for clip in batch)
        self.audio_rates.update(clip.audio_rate for clip in batch if clip.audio_rate)
        for clip in batch:
            for modality, decoder in clip.decoders.items():
                self.decoders[modality][decoder] += 1

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Add the time that passes to what it goes to."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[what] += time.perf_counter() - started

    @contextmanager
    def waiting(self, idle_share: Callable[[], float]) -> Iterator[None]:
        """Share out the time until a batch comes: idle workers wait for it, the others compute.

        Args:
            idle_share: tells which share of them is idle, 0..1, at the moment.
        """
        before, started = idle_share(), time.perf_counter()
        try:
            yield
        finally:
            passed, idle = time.perf_counter() - started, (before + idle_share()) / 2
            self.seconds[DECODING] += idle * passed
            self.seconds[BACKBONES] += (1 - idle) * passed

    @property
    def total_s(self) -> float:
        """Seconds from the first batch to the last, without start-up."""
        return sum(s for what, s in self.seconds.items() if what != STARTING)

    @property
    def rate(self) -> float:
        """Clips per second, without start-up."""
        return self.clips / self.total_s if self.total_s else 0.0

    @property
    def bound(self) -> str:
        """Which stage the others wait for, as one word."""
        waits = {what: self.seconds.get(what, 0.0) for what in (DECODING, WRITING)}
        longest = max(waits, key=lambda what: waits[what])
        return _BOUND[longest if waits[longest] > 0.5 * self.total_s else BACKBONES]

    def shares(self) -> str:
        """Say what the time went to, the largest share first."""
        total = self.total_s or 1.0
        running = {what: s for what, s in self.seconds.items() if what != STARTING}
        ordered = sorted(running.items(), key=lambda pair: -pair[1])
        return ", ".join(f"{what} {s / total:.0%}" for what, s in ordered if s > 0.005 * total)

    def __repr__(self) -> str:
        return self.summary()

    def summary(self) -> str:
        """Return the closing lines of the command."""
        lines = [f"store {name}: {path}" for name, path in self.stores.items()]
        if self.clips:
            lines.append(
                f"{counted(self.clips, 'clip')} in {self.total_s:.0f} s, {per_second(self.rate)}: "
                f"{self.bound} ({self.shares()})"
            )
        if self.halved:
            lines.append(
                f"{counted(self.halved, 'batch', 'batches')} did not fit into memory and ran in "
                "halves; reduce batch_size or memory_gb to avoid this"
            )
        if not self.complete:
            lines.append("this part is done; the stores will be complete when all other parts are")
        elif self.failed:
            lines.append(
                f"{counted(self.failed, 'clip')} lost a modality to an error; see failures.csv"
            )
        return "\n".join(lines)

    def facts(self) -> dict[str, Any]:
        """Return what extract.json holds, JSON-plain."""
        return {
            "clips": self.clips,
            "failed": self.failed,
            "clips_per_s": round(self.rate, 4),
            "bound": self.bound,
            "seconds": {what: round(s, 3) for what, s in self.seconds.items()},
            "decode_processes": self.workers,
            "lanes": self.forward_workers,
            "cpu_seconds": round(self.cpu_s, 3),
            "cpu_seconds_decoding": round(self.decode_s, 3),
            "seconds_writing_beside": round(self.write_s, 3),
            "seconds_gpu_busy": round(self.device_s, 3),
            "batches_halved": self.halved,
            "peak_memory_bytes": _peak_memory(),
            "audio_windows_padded": self.padded,
            "decoders": {modality: dict(counts) for modality, counts in self.decoders.items()},
            "audio_native_rates": {str(hz): n for hz, n in sorted(self.audio_rates.items())},
        }


class Bar:
    """The line in the terminal: clips, rate, where the time goes, when it will be done."""

    def __init__(self, total: int, report: ExtractReport) -> None:
        self._report = report
        self._bar = progress_bar(
            total=total, desc="extract", unit="clip", bar_format=_RATE, file=sys.stderr
        )

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def skip(self, clips: int) -> None:
        """Count clips that an earlier run has done; they say nothing about the rate."""
        if self._bar.disable:  # tqdm then has none of these attributes
            return
        self._bar.n += clips
        self._bar.initial += clips
        self._bar.last_print_n += clips

    def show(self, clips: int) -> None:
        """Count clips that are done now."""
        report = self._report
        if report.total_s >= 1:  # before, the rate is that of a batch, such as 10,000 clips/s
            text = f"{per_second(report.rate)}, {report.bound}"
            self._bar.set_postfix_str(text, refresh=False)
        self._bar.update(clips)


def _peak_memory() -> int:
    """Return the most bytes that this process has had in memory.

    Not `resource.getrusage`: its peak is that of the program before `exec`, too.
    """
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def per_second(rate: float) -> str:
    """Return a rate for people: clips per second, or of a slow one seconds per clip."""
    return f"{rate:.1f} clips/s" if rate >= 1 or not rate else f"{1 / rate:.1f} s/clip"


def shard_seconds(catalog: Catalog) -> list[float]:
    """Return how many seconds of video each shard decodes: what its work is measured by.

    A clip that is its whole file counts as one of median length, for its length is only known once
    the file is opened.
    """
    start_s, stop_s = catalog.column("start_s", np.float64), catalog.column("stop_s", np.float64)
    seconds = np.asarray(stop_s - start_s)
    known = seconds[np.isfinite(seconds)]
    median = float(np.median(known)) if len(known) else 1.0
    seconds = np.where(np.isfinite(seconds), seconds, median)
    return [float(seconds[catalog.shard_range(s)].sum()) for s in range(catalog.shards)]


def missing_shards(stores: Iterable[Path]) -> set[int]:
    """Return the shards that some of the stores of one extraction lack.

    Raises:
        StoreError: a store was not even begun.
    """
    catalogs = [Catalog(path) for path in stores]
    return {s for c in catalogs for s in set(range(c.shards)) - c.committed()}


def missing_parts(stores: Sequence[Path], count: int) -> list[Part]:
    """Return the parts of ``count`` that have something to do.

    Raises:
        StoreError: a store was not even begun.
    """
    missing = missing_shards(stores)
    costs = shard_seconds(Catalog(stores[0]))
    parts = [Part(index, count) for index in range(count)]
    return [part for part in parts if missing.intersection(part.shards(costs))]


def finish(recipe: ExtractRecipe, count: int = 1) -> int:
    """Join what all parts have made; run again, it changes nothing.

    Args:
        recipe: of the extraction.
        count: the number of parts it was shared out to, to name what is missing.

    Returns:
        How many clips lost a modality to an error.

    Raises:
        StoreError: shards are missing; the message has the command that makes them.
        TooManyFailuresError: complete, but more clips failed than the recipe allows.
    """
    stores = {name: recipe.out / name for name in recipe.sets}
    missing = missing_shards(stores.values())
    if missing:
        parts = missing_parts(list(stores.values()), count)
        shards = ", ".join(map(str, sorted(missing)[:20])) + (", ..." if len(missing) > 20 else "")
        raise StoreError(
            f"{recipe.out}: {counted(len(missing), 'shard')} missing ({shards}); run "
            f"`{commands(recipe.out / RECIPE, parts)}`, which extracts only these."
        )
    failed = join(recipe, stores)
    check_failures(recipe, failed, Catalog(next(iter(stores.values()))).count)
    return failed


def join(recipe: ExtractRecipe, stores: Mapping[str, Path]) -> int:
    """Complete whole stores and write their tables; return how many clips failed."""
    for path in stores.values():
        finalize(path)
    failed = write_tables(recipe.out, [Catalog(path) for path in stores.values()])
    files.sweep([recipe.out])
    return failed


def is_joined(store: Path) -> bool:
    """Tell whether a store was completed; see `finalize`."""
    return (store / layout.MANIFEST).is_file()


def check_failures(recipe: ExtractRecipe, failed: int, clips: int) -> None:
    """See that not more clips failed than the recipe allows.

    Raises:
        TooManyFailuresError: they did.
    """
    if not recipe.allows(failed, clips):
        raise TooManyFailuresError(
            f"{recipe.out / FAILURES}: {failed} of {counted(clips, 'clip')} lost a modality to an "
            f"error, but max_failures={recipe.max_failures} allows only {recipe.max_failures:.0%}; "
            "the stores are complete nevertheless. See the hints in the table."
        )


def commands(recipe: Path, parts: Sequence[Part]) -> str:
    """Return the shortest command that makes what some parts lack."""
    name = shlex.quote(str(recipe))
    if len(parts) == 1 and parts[0].count > 1:
        return f"karmma extract {name} --part {parts[0]}"
    if parts and parts[0].count > 1:
        numbers = ",".join(str(part.index + 1) for part in parts)
        exported = f"--export=ALL,KARMMA_PARTS={parts[0].count}"
        return f"sbatch --array={numbers} {exported} extract/slurm.sbatch {name}"
    return f"karmma extract {name}"


def recipe_of(store: Path) -> ExtractRecipe | None:
    """Return the recipe of the extraction that a store belongs to, if it lies beside it."""
    path = store.parent / RECIPE
    if not path.is_file():
        return None
    recipe = config.load(ExtractRecipe, path).model_copy(update={"out": store.parent})
    return recipe if store.name in recipe.sets else None
