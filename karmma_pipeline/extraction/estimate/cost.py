"""What an extraction will cost: disk, exactly; time, from a few clips done for real."""

import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt

from karmma_pipeline import files
from karmma_pipeline.data.manifest import Manifest
from karmma_pipeline.errors import KarmmaError, ManifestError
from karmma_pipeline.extraction.estimate.survey import FOUND, Survey
from karmma_pipeline.extraction.inference import openvino_engine
from karmma_pipeline.extraction.inference.workers import max_workers
from karmma_pipeline.extraction.media.integrity import Outcome
from karmma_pipeline.extraction.pipeline import check_room, extract
from karmma_pipeline.extraction.recipe import ExtractRecipe, check_files
from karmma_pipeline.extraction.tables import read_failures
from karmma_pipeline.extraction.types import NATURAL, input_spec, stored_as
from karmma_pipeline.modalities import Reason
from karmma_pipeline.models.backbones import BackboneChoice
from karmma_pipeline.models.device import pick_device
from karmma_pipeline.store import ModalitySpec
from karmma_pipeline.store.format import layout
from karmma_pipeline.views import Views

# Clips that follow one another in the list, as extraction meets them.
_RUN = 8


def disk(
    recipe: ExtractRecipe, manifest: Manifest, reasons: Mapping[str, npt.NDArray[np.uint8]]
) -> dict[str, Any]:
    """Work out the bytes of every shard file from the clips that will be in it, JSON-plain.

    Args:
        recipe: the extraction.
        manifest: its rows.
        reasons: modality to the reason's code of each row, see `Survey.reasons`.
    """
    size, rows = recipe.store.clips_per_shard, len(manifest.clips)
    specs = _specs(recipe)
    tokens: dict[str, dict[str, int]] = {name: {} for name in specs}
    tables, lost = rows * (120 + 4 * len(manifest.heads)) * len(specs), 0
    for name, modalities in specs.items():
        for m, spec in modalities.items():
            there = reasons[m] == Reason.PRESENT
            wanted = there | ~np.isin(reasons[m], [*NATURAL])
            tokens[name][m] = _shard_bytes(spec, there, size)
            lost += _shard_bytes(spec, wanted, size) - tokens[name][m]
            times = 16 * input_spec(m, recipe.sets[name][m]).times
            tables += 2 * rows * (times + 5) + 12 * rows  # in commit records, in the clip table
    total = tables + sum(sum(of.values()) for of in tokens.values())
    return {
        "token_bytes": tokens,
        "table_bytes_about": tables,
        "total_bytes_about": total,
        "total_bytes_about_without_faults": total + lost,
        "free_bytes": files.free_bytes(recipe.out),
        "shards": math.ceil(rows / size),
    }


def problem(recipe: ExtractRecipe, manifest: Manifest) -> str:
    """Return why the extraction would end before its first clip; empty if it would not."""
    try:
        check_files(recipe, manifest)
        check_room(recipe.out, manifest, _specs(recipe))
    except KarmmaError as error:
        return str(error)
    return ""


def _specs(recipe: ExtractRecipe) -> dict[str, dict[str, ModalitySpec]]:
    return {
        name: {m: _stored(m, choice, recipe) for m, choice in choices.items()}
        for name, choices in recipe.sets.items()
    }


def _shard_bytes(spec: ModalitySpec, there: npt.NDArray[np.bool_], size: int) -> int:
    counts = [int(there[at : at + size].sum()) for at in range(0, len(there), size)]
    return sum(layout.file_bytes(array, size, count) for array in spec.arrays for count in counts)


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

    Raises:
        KarmmaError: there is nothing to extract, weights are missing, or another fault.
    """
    views = recipe.views.count
    there = np.stack([of == Reason.PRESENT for of in seen.reasons().values()]).repeat(views, axis=1)
    usable = np.flatnonzero(there.all(axis=0) if there.all(axis=0).any() else there.any(axis=0))
    if not len(usable):
        raise ManifestError("not measured: no clip has all of its files")
    device = pick_device(recipe.device)
    # Clips until everybody is at work, and a batch that is small next to so few clips.
    busy, small = (max_workers(device), 1) if device.type == "cpu" else (_RUN, _RUN)
    rows = _chosen(usable.tolist(), 5 * busy)
    few = Manifest(tuple(manifest.clips[n] for n in rows), manifest.heads)
    size = small if recipe.batch_size == "auto" else recipe.batch_size
    with tempfile.TemporaryDirectory(prefix="karmma-plan-") as name:
        out = Path(name) / "out"
        changes = {"out": out, "batch_size": size, "max_failures": 1.0}
        changes |= {"views": Views()}  # of a clip's views perhaps not all are among the few
        started = perf_counter()
        marks = extract(recipe.model_copy(update=changes), manifest=few).marks
        total_s = perf_counter() - started
        lost: dict[tuple[str, str], Outcome] = {
            (row["clip_id"], row["modality"]): (Reason[row["reason"].upper()], row["detail"])
            for row in read_failures(out)
        }
    ids = {manifest.clips[n].clip_id: seen.clips[n // views].clip_id for n in rows}
    seen.learn(
        {(of, m): lost.get((row, m), FOUND) for row, of in ids.items() for m in seen.modalities}
    )
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
    choices = [choice for of in recipe.sets.values() for choice in of.values()]
    names = dict.fromkeys(choice.name for choice in choices if choice.engine == "torch")
    return [name for name in names if name in openvino_engine.FASTER]


def _chosen(rows: Sequence[int], count: int) -> list[int]:
    """Return runs of neighbours from evenly spaced places of the list."""
    starts = np.linspace(0, max(0, len(rows) - _RUN), max(1, count // _RUN) + 2)[1:-1].astype(int)
    return [*dict.fromkeys(row for at in starts.tolist() for row in rows[at : at + _RUN])][:count]
