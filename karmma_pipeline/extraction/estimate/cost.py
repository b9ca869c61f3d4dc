"""What an extraction will cost: disk, exactly; time, from a few clips done for real."""

import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from karmma_pipeline import files
from karmma_pipeline.data.manifest import Manifest
from karmma_pipeline.errors import ConfigError
from karmma_pipeline.extraction.estimate.survey import FOUND, Survey
from karmma_pipeline.extraction.inference.batching import max_workers
from karmma_pipeline.extraction.pipeline import check_room, extract
from karmma_pipeline.extraction.recipe import ExtractRecipe, check_files
from karmma_pipeline.extraction.tables import read_failures
from karmma_pipeline.extraction.types import stored_as
from karmma_pipeline.modalities import Reason
from karmma_pipeline.models.backbones import BackboneChoice
from karmma_pipeline.models.device import pick_device
from karmma_pipeline.store import ModalitySpec
from karmma_pipeline.store.format import layout
from karmma_pipeline.views import Views

# Clips that follow one another in the list, as extraction meets them.
_RUN = 8


def disk(recipe: ExtractRecipe, seen: Survey) -> dict[str, Any]:
    """Work out the bytes of all token files from the clips that will be in them, JSON-plain."""
    size, counts = recipe.store.clips_per_shard, {}
    rows = [clip.clip_id for clip in seen.clips for _ in range(recipe.views.count)]
    shards = [rows[at : at + size] for at in range(0, len(rows), size)]
    for m in seen.modalities:
        counts[m] = [sum(seen.outcomes[of, m] == FOUND for of in shard) for shard in shards]
    return {
        "token_bytes": {
            name: {
                m: sum(layout.file_bytes(a, size, n) for a in spec.arrays for n in counts[m])
                for m, spec in modalities.items()
            }
            for name, modalities in _specs(recipe).items()
        },
        "free_bytes": files.free_bytes(recipe.out),
        "shards": len(shards),
    }


def check(recipe: ExtractRecipe, manifest: Manifest) -> None:
    """Refuse what an extraction would refuse before its first clip.

    Raises:
        KarmmaError: not one of the files is there, or the disk is too small.
    """
    check_files(recipe, manifest)
    check_room(recipe.out, manifest, _specs(recipe))


def _specs(recipe: ExtractRecipe) -> dict[str, dict[str, ModalitySpec]]:
    return {
        name: {m: _stored(m, choice, recipe) for m, choice in choices.items()}
        for name, choices in recipe.sets.items()
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


def time_per_clip(recipe: ExtractRecipe, manifest: Manifest, seen: Survey) -> dict[str, Any]:
    """Extract a few clips into a temporary folder, and time all but the first batches.

    Until all workers are busy much happens that happens only once. Nothing is left behind; what
    became of the clips is told to the survey.

    Returns:
        JSON-plain; nothing but why it is not known, where that says nothing of the extraction:
        there are no clips to do it with, or no such device here.

    Raises:
        KarmmaError: extraction would end so, too.
    """
    views = recipe.views.count
    there = Counter(clip_id for (clip_id, _), found in seen.outcomes.items() if found == FOUND)
    if not there:
        return {"problem": "not measured: no clip has all its files"}
    # Of clips that have more or less, those that have most.
    most = max(there.values())
    usable = [n for n, clip in enumerate(seen.clips) if there[clip.clip_id] == most]
    try:
        device = pick_device(recipe.device)
    except ConfigError as error:
        return {"problem": str(error)}
    # Clips until everybody is at work, and a batch that is small next to so few clips.
    busy, small = (max_workers(device), 1) if device.type == "cpu" else (_RUN, _RUN)
    rows = _chosen([n * views + v for n in usable for v in range(views)], 5 * busy)
    few = Manifest(tuple(manifest.clips[n] for n in rows), manifest.heads)
    size = small if recipe.batch_size == "auto" else recipe.batch_size
    with tempfile.TemporaryDirectory(prefix="karmma-plan-") as name:
        out = Path(name) / "out"
        changes = {"out": out, "batch_size": size, "max_failures": 1.0}
        changes |= {"views": Views()}  # of a clip's views perhaps not all are among the few
        marks = [(0, perf_counter())]
        marks += extract(recipe.model_copy(update=changes), manifest=few).marks
        ids = {manifest.clips[n].clip_id: seen.clips[n // views].clip_id for n in rows}
        shown = {(of, m): FOUND for of in ids.values() for m in seen.modalities}
        for row in read_failures(out):
            outcome = Reason[row["reason"].upper()], row["detail"]
            shown[ids[row["clip_id"]], row["modality"]] = outcome
    seen.learn(shown)
    last, end = marks[-1]
    first, begin = next((mark for mark in marks if busy <= mark[0] < last), marks[0])
    return {
        "device": device.type,
        "measured_on_clips": last,
        "seconds_per_clip": (end - begin) / (last - first),
        "without_start_up": first > 0,
        "problem": "",
    }


def _chosen(rows: Sequence[int], count: int) -> list[int]:
    """Return runs of neighbours from evenly spaced places of the list."""
    starts = np.linspace(0, max(0, len(rows) - _RUN), max(1, count // _RUN) + 2)[1:-1].astype(int)
    return [*dict.fromkeys(row for at in starts.tolist() for row in rows[at : at + _RUN])][:count]
