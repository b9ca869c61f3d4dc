"""Whole shards shared out among the tasks of an array, and what is still to do."""

import csv
import json
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from karmma_pipeline import config, files
from karmma_pipeline.errors import StoreError, TooManyFailuresError
from karmma_pipeline.extraction.recipe import ExtractRecipe
from karmma_pipeline.extraction.types import NATURAL, DecodedClip
from karmma_pipeline.jobs import Part
from karmma_pipeline.modalities import Reason
from karmma_pipeline.store import Catalog, FeatureStore, finalize
from karmma_pipeline.store.format import layout

TABLE = "failures.csv"
RECIPE = "recipe.yaml"
"""In the folder of an extraction: the resolved recipe that made it."""


def shard_seconds(catalog: Catalog) -> list[float]:
    """Return how many seconds of video each shard decodes: what its work is measured by.

    A clip that is its whole file counts as a middling clip, for its length is only known once
    the file is opened.
    """
    start_s, stop_s = catalog.column("start_s", np.float64), catalog.column("stop_s", np.float64)
    seconds = np.asarray(stop_s - start_s)
    known = seconds[np.isfinite(seconds)]
    middling = float(np.median(known)) if len(known) else 1.0
    seconds = np.where(np.isfinite(seconds), seconds, middling)
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
            f"{recipe.out}: {len(missing)} shards are missing ({shards}); run "
            f"`{commands(recipe.out / RECIPE, parts)}`, it makes only these."
        )
    failed = join(recipe, stores)
    check_failures(recipe, failed, Catalog(next(iter(stores.values()))).count)
    return failed


def join(recipe: ExtractRecipe, stores: Mapping[str, Path]) -> int:
    """Complete whole stores and write the table of failures; return how many clips failed."""
    for path in stores.values():
        finalize(path)
    opened = {name: FeatureStore.open(path) for name, path in stores.items()}
    failed = write_failures(recipe.out / TABLE, opened)
    ids = next(iter(opened.values())).clip_ids
    write_media_table(recipe.out, (clip_id.decode() for clip_id in ids))
    files.sweep([recipe.out])
    return failed


def is_joined(store: Path) -> bool:
    """Tell whether a store was completed; see `finalize`."""
    return (store / layout.MANIFEST).is_file()


def count_failed(recipe: ExtractRecipe) -> int:
    """Return how many clips lost a modality to an error, as the table says; 0 without one."""
    table = recipe.out / TABLE
    if not table.is_file():
        return 0
    natural = {reason.name.lower() for reason in NATURAL}
    with table.open(newline="") as file:
        return len({r["clip_id"] for r in csv.DictReader(file) if r["reason"] not in natural})


def check_failures(recipe: ExtractRecipe, failed: int, clips: int) -> None:
    """See that not more clips failed than the recipe allows.

    Raises:
        TooManyFailuresError: they did.
    """
    if failed > recipe.max_failures * clips:
        raise TooManyFailuresError(
            f"{recipe.out / TABLE}: {failed} of {clips} clips lost a modality to an "
            f"error, max_failures={recipe.max_failures} allows {recipe.max_failures:.0%}; "
            "the stores are complete, the table says what to do."
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


FAILURE_COLUMNS = ("clip_id", "modality", "stage", "reason", "hint")
_STAGE = {
    Reason.FILE_MISSING: "open",
    Reason.NO_STREAM: "open",
    Reason.NOT_IN_DATASET: "manifest",
    Reason.TOO_SHORT: "sample",
    Reason.OUT_OF_RANGE: "sample",
    Reason.BAD_VALUE: "backbone",
}


def write_failures(path: Path, stores: Mapping[str, FeatureStore]) -> int:
    """Write the table and return how many clips lost something to an error."""
    rows = sorted({row for store in stores.values() for row in _failure_rows(store)})
    with files.replacing(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(FAILURE_COLUMNS)
        for clip_id, modality, code in rows:
            reason = Reason(code)
            stage = _STAGE.get(reason, "decode")
            writer.writerow([clip_id, modality, stage, reason.name.lower(), reason.hint])
    return len({clip_id for clip_id, _, code in rows if Reason(code) not in NATURAL})


def _failure_rows(store: FeatureStore) -> Iterator[tuple[str, str, int]]:
    for clip, column in np.argwhere(np.asarray(store.reasons) != Reason.PRESENT):
        clip_id = store.clip_ids[clip].decode()
        yield clip_id, store.modalities[column], int(store.reasons[clip, column])


MEDIA_TABLE = "media.csv"
MEDIA_NOTES = "media_notes"
"""The folder of the notes, a file per shard, which one part alone writes."""

_MEDIA_COLUMNS = ("clip_id", "audio_rate_hz", "audio_windows_padded")


def note_media(out: Path, shard: int, clips: Iterable[DecodedClip]) -> None:
    """Note clips that are about to be stored.

    Raises:
        StoreError: the disk is full, or fails.
    """
    lines = [
        json.dumps(
            {
                "clip_id": clip.clip_id,
                "audio_rate_hz": clip.audio_rate or "",
                "audio_windows_padded": clip.padded,
                **{f"{m}_decoder": decoder for m, decoder in clip.decoders.items()},
            }
        )
        for clip in clips
    ]
    path = out / MEDIA_NOTES / f"{shard}.jsonl"
    with files.disk_errors(path):
        path.parent.mkdir(exist_ok=True)
        with path.open("ab") as file:
            # A line break first: what a killed run left half-written ends there.
            file.write("".join(f"\n{line}" for line in lines).encode())


def write_media_table(out: Path, clip_ids: Iterable[str]) -> None:
    """Write media.csv: a row per clip that was noted, in the order of ``clip_ids``."""
    notes = _read_media_notes(out / MEDIA_NOTES)
    decoders = sorted({name for found in notes.values() for name in found} - {*_MEDIA_COLUMNS})
    with files.replacing(out / MEDIA_TABLE) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*_MEDIA_COLUMNS, *decoders], restval="")
        writer.writeheader()
        writer.writerows(notes[clip_id] for clip_id in clip_ids if clip_id in notes)


def _read_media_notes(folder: Path) -> Mapping[str, dict[str, Any]]:
    found = {}
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text(errors="replace").splitlines():
            try:
                one = json.loads(line)
                found[str(one["clip_id"])] = one
            except (ValueError, KeyError, TypeError):  # half a line
                continue
    return found
