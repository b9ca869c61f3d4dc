"""What an extraction will cost: disk, exactly; time, from a few clips done for real."""

import math
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from karmma_pipeline.data.manifest import Clip, Manifest
from karmma_pipeline.errors import ManifestError
from karmma_pipeline.extraction.estimate.survey import Presence
from karmma_pipeline.extraction.inference import openvino_engine
from karmma_pipeline.extraction.inference.workers import max_workers
from karmma_pipeline.extraction.pipeline import extract
from karmma_pipeline.extraction.recipe import ExtractRecipe
from karmma_pipeline.extraction.types import input_spec, stored_as
from karmma_pipeline.models.backbones import BackboneChoice
from karmma_pipeline.models.device import pick_device
from karmma_pipeline.store import ModalitySpec
from karmma_pipeline.store.format import layout
from karmma_pipeline.views import Views

# Clips that follow one another in the list, as extraction meets them.
_RUN = 8


def disk(recipe: ExtractRecipe, manifest: Manifest, present: Presence) -> dict[str, Any]:
    """Work out the bytes of every shard file from the clips that will be in it, JSON-plain."""
    size, clips = recipe.store.clips_per_shard, len(manifest.clips)
    tokens: dict[str, dict[str, int]] = defaultdict(dict)
    tables = 0
    for name, choices in recipe.sets.items():
        for modality, choice in choices.items():
            arrays = _stored(modality, choice, recipe).arrays
            shards = [int(present[modality][at : at + size].sum()) for at in range(0, clips, size)]
            files = (layout.file_bytes(array, size, there) for array in arrays for there in shards)
            tokens[name][modality] = sum(files)
            times = 16 * input_spec(modality, choice).times
            tables += 2 * clips * (times + 5) + 12 * clips  # in commit records, in the clip table
        tables += clips * (120 + 4 * len(manifest.heads))
    places = (recipe.out.absolute(), *recipe.out.absolute().parents)
    return {
        "token_bytes": tokens,
        "table_bytes_about": tables,
        "total_bytes_about": tables + sum(sum(of.values()) for of in tokens.values()),
        "free_bytes": shutil.disk_usage(next(p for p in places if p.exists())).free,
        "shards": math.ceil(clips / size),
    }


def _stored(modality: str, choice: BackboneChoice, recipe: ExtractRecipe) -> ModalitySpec:
    return ModalitySpec(**stored_as(modality, choice, recipe.store.dtype))


def cuts(recipe: ExtractRecipe) -> dict[str, dict[str, int]]:
    """Return the bytes of a clip for every place where a cut network could be cut.

    Returns:
        ``set.modality`` of the networks that are cut, to the name of each cut, and ``tokens``
        without one, to bytes.
    """
    return {
        f"{name}.{modality}": {
            cut or "tokens": _stored(modality, choice.cut_at(cut), recipe).clip_bytes
            for cut in (*choice.cuts, None)
        }
        for name, choices in recipe.sets.items()
        for modality, choice in choices.items()
        if choice.cut is not None
    }


def time_per_clip(recipe: ExtractRecipe, manifest: Manifest, present: Presence) -> dict[str, Any]:
    """Extract a few clips into a temporary folder, and time all but the first batches.

    Until all workers are busy much happens that happens only once. Nothing is left behind.

    Raises:
        KarmmaError: there is nothing to extract, weights are missing, or another fault.
    """
    there = np.stack(list(present.values()))
    usable = np.flatnonzero(there.all(axis=0) if there.all(axis=0).any() else there.any(axis=0))
    if not len(usable):
        raise ManifestError("not measured: no clip has all of its files")
    device = pick_device(recipe.device)
    # Clips until everybody is at work, and a batch that is small next to so few clips.
    busy, small = (max_workers(device), 1) if device.type == "cpu" else (_RUN, _RUN)
    few = _chosen([manifest.clips[i] for i in usable.tolist()], 5 * busy)
    size = small if recipe.batch_size == "auto" else recipe.batch_size
    with tempfile.TemporaryDirectory(prefix="karmma-plan-") as name:
        changes = {"out": Path(name) / "out", "batch_size": size, "max_failures": 1.0}
        changes |= {"views": Views()}  # of a clip's views perhaps not all are among the few
        started, some = perf_counter(), Manifest(few, manifest.heads)
        marks = extract(recipe.model_copy(update=changes), manifest=some).marks
        total_s = perf_counter() - started
    last, end = marks[-1]
    first, begin = next((mark for mark in marks if mark[0] >= busy), marks[-1])
    clip_s = (end - begin) / (last - first) if last > first else total_s / last
    return {
        "device": device.type,
        "measured_on_clips": last,
        "seconds_per_clip": clip_s,
        "without_start_up": last > first,
        "problem": "",
    }


def faster_with_openvino(recipe: ExtractRecipe) -> list[str]:
    """Return the networks that openvino, which is installed, computes faster on this CPU."""
    if not openvino_engine.is_installed() or pick_device(recipe.device).type != "cpu":
        return []
    choices = [choice for choices in recipe.sets.values() for choice in choices.values()]
    names = (choice.name for choice in choices if choice.engine == "torch")
    return [name for name in dict.fromkeys(names) if name in openvino_engine.FASTER]


def _chosen(clips: Sequence[Clip], count: int) -> tuple[Clip, ...]:
    """Return runs of neighbours from evenly spaced places of the list."""
    starts = np.linspace(0, max(0, len(clips) - _RUN), max(1, count // _RUN) + 2)[1:-1].astype(int)
    numbers = dict.fromkeys(n for s in starts.tolist() for n in range(s, min(s + _RUN, len(clips))))
    return tuple(clips[n] for n in numbers)[:count]
