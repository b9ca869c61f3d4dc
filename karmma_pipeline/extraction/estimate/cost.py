"""What an extraction will cost: disk, exactly; time, from a few clips done for real."""

import math
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from karmma_pipeline.data.manifest import Clip, Manifest
from karmma_pipeline.extraction.inference.workers import max_workers
from karmma_pipeline.extraction.pipeline import extract
from karmma_pipeline.extraction.recipe import ExtractRecipe
from karmma_pipeline.extraction.types import input_spec
from karmma_pipeline.models.device import pick_device
from karmma_pipeline.store import ModalitySpec
from karmma_pipeline.store.format import layout

# Clips that follow one another in the list, as extraction meets them.
_RUN = 8


@dataclass(frozen=True)
class Disk:
    """Bytes of the token files of each set and modality, and of everything beside them."""

    tokens: Mapping[str, Mapping[str, int]]
    tables: int
    shards: int
    free: int

    @property
    def total(self) -> int:
        """All bytes."""
        return self.tables + sum(sum(of.values()) for of in self.tokens.values())


@dataclass(frozen=True)
class Time:
    """Seconds per clip, measured; why not, if it could not be.

    steady: the start of the command could be told apart and is left out.
    """

    clips: int = 0
    clip_s: float | None = None
    device: str = ""
    steady: bool = True
    problem: str = ""


def disk(
    recipe: ExtractRecipe, manifest: Manifest, present: Mapping[str, npt.NDArray[np.bool_]]
) -> Disk:
    """Work out the bytes of every shard file from the clips that will be in it."""
    size, clips = recipe.store.clips_per_shard, len(manifest.clips)
    tokens: dict[str, dict[str, int]] = {}
    tables = 0
    for name, choices in recipe.sets.items():
        tokens[name] = {}
        for modality, choice in choices.items():
            count, width = choice.output_shape
            spec = ModalitySpec(tokens=count, width=width, dtype=recipe.store.dtype)
            there = present[modality]
            tokens[name][modality] = sum(
                layout.file_bytes(array, size, int(there[first : first + size].sum()))
                for array in spec.arrays
                for first in range(0, clips, size)
            )
            times = 16 * input_spec(modality, choice).times
            tables += 2 * clips * (times + 5) + 12 * clips  # in commit records, in the clip table
        tables += clips * (120 + 4 * len(manifest.heads))
    return Disk(tokens, tables, math.ceil(clips / size), _free(recipe.out))


def _free(folder: Path) -> int:
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def time_per_clip(
    recipe: ExtractRecipe, manifest: Manifest, present: Mapping[str, npt.NDArray[np.bool_]]
) -> Time:
    """Extract a few clips into a temporary folder, twice, and compare.

    The difference of a short and a longer run is free of what only happens once, such as the
    start of processes. Nothing is left behind.

    Raises:
        KarmmaError: weights are missing, or another fault of the recipe.
    """
    device = pick_device(recipe.device)
    workers = max_workers(device)  # all are busy from the first clip on
    counts = (workers, 4 * workers) if device.type == "cpu" else (_RUN, 6 * _RUN)
    usable = np.flatnonzero(np.stack(list(present.values())).all(axis=0))
    if not len(usable):
        usable = np.flatnonzero(np.stack(list(present.values())).any(axis=0))
    if not len(usable):
        return Time(problem="no clip's files are there")
    chosen = _chosen([manifest.clips[i] for i in usable.tolist()], counts[1])
    if device.type == "cpu" and recipe.batch_size == "auto":
        recipe = recipe.model_copy(update={"batch_size": 1})  # as good, and fair to few clips
    with tempfile.TemporaryDirectory(prefix="karmma-plan-") as name:
        seconds = [_seconds(recipe, manifest, chosen[:n], Path(name) / f"{n}") for n in counts]
    short, long = min(counts[0], len(chosen)), len(chosen)
    slope = (seconds[1] - seconds[0]) / (long - short) if long > short else 0.0
    clip_s = slope if slope > 0 else seconds[1] / long
    return Time(long, clip_s, device.type, steady=slope > 0)


def _chosen(clips: list[Clip], count: int) -> list[Clip]:
    """Return runs of neighbours from evenly spaced places of the list."""
    if len(clips) <= count:
        return clips
    runs = max(1, count // _RUN)
    length = math.ceil(count / runs)
    starts = np.linspace(0, len(clips) - length, runs + 2)[1:-1].astype(int)
    numbers = dict.fromkeys(n for s in starts.tolist() for n in range(s, s + length))
    return [clips[n] for n in numbers][:count]


def _seconds(recipe: ExtractRecipe, manifest: Manifest, clips: list[Clip], out: Path) -> float:
    """Return how long the loop over these clips takes, start and end of the command left out."""
    few = Manifest(tuple(clips), manifest.heads)
    return extract(
        recipe.model_copy(update={"out": out, "max_failures": 1.0}), manifest=few
    ).total_s


def tasks(hours: float, shards: int, task_hours: float) -> int:
    """Return how many array tasks make parts of about that length; each needs a shard."""
    return max(1, min(shards, math.ceil(hours / task_hours)))
