"""How each clip's media were read, beside the stores: media.csv.

A line is noted before its clip is stored, so that none is missing whatever is killed, by whichever
part of the extraction; a clip that is read again is noted again, and its last line counts.
"""

import csv
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from karmma_pipeline import files
from karmma_pipeline.extract.decode import Decoded

TABLE = "media.csv"
NOTES = "media_notes"
"""The folder of the notes, a file per shard, which one part alone writes."""

_FIXED = ("clip_id", "audio_rate_hz", "audio_windows_padded")


def note(out: Path, shard: int, clips: Iterable[Decoded]) -> None:
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
    path = out / NOTES / f"{shard}.jsonl"
    with files.disk_errors(path):
        path.parent.mkdir(exist_ok=True)
        with path.open("ab") as file:
            # A line break first: what a killed run left half-written ends there.
            file.write("".join(f"\n{line}" for line in lines).encode())


def write_table(out: Path, clip_ids: Iterable[str]) -> None:
    """Write media.csv: a row per clip that was noted, in the order of ``clip_ids``."""
    notes = _read(out / NOTES)
    decoders = sorted({name for found in notes.values() for name in found} - {*_FIXED})
    with files.replacing(out / TABLE) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*_FIXED, *decoders], restval="")
        writer.writeheader()
        writer.writerows(notes[clip_id] for clip_id in clip_ids if clip_id in notes)


def _read(folder: Path) -> Mapping[str, dict[str, Any]]:
    found = {}
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text(errors="replace").splitlines():
            try:
                one = json.loads(line)
                found[str(one["clip_id"])] = one
            except (ValueError, KeyError, TypeError):  # half a line
                continue
    return found
