"""Notes of the clips of an extraction, and its tables: failures with reasons, and media read.

Stores keep a reason per clip and modality and no more. The rest is noted in a file per shard
before the shard's clips are stored, and becomes a table when all shards are there.
"""

import csv
import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from karmma_pipeline import files
from karmma_pipeline.data.manifest import Clip
from karmma_pipeline.data.sources import Source
from karmma_pipeline.extraction.types import NATURAL, DecodedClip
from karmma_pipeline.modalities import Reason
from karmma_pipeline.store import Catalog

FAILURES, MEDIA = "failures.csv", "media.csv"
#: The folder of the notes, a file per shard, which one part alone writes.
NOTES = "media_notes"

_FAILURE_COLUMNS = ("clip_id", "modality", "stage", "reason", "hint", "detail")
_MEDIA_COLUMNS = ("clip_id", "audio_rate_hz", "audio_windows_padded")
# In a note: modality to reason code to detail.
_DECODER = "_decoder"
_FAULTS = "faults"

#: At either end of a file, as many bytes as its note has a digest of.
END_BYTES = 1 << 20

# Characters of a detail: of a longer one, its beginning and its end are kept.
_MAX_DETAIL = 300

_STAGE = {
    Reason.FILE_MISSING: "open",
    Reason.NO_STREAM: "open",
    Reason.NOT_IN_DATASET: "manifest",
    Reason.TOO_SHORT: "sample",
    Reason.OUT_OF_RANGE: "sample",
    Reason.BAD_VALUE: "backbone",
    Reason.NO_CHANNEL: "open",
    Reason.GAP: "sample",
}


class SourceState(NamedTuple):
    """What a file or folder was when it was read; ``head`` and ``tail`` are hexadecimal.

    Of a folder of pictures: how many bytes they have, and a digest of their names and sizes.
    """

    size: int
    head: str
    tail: str
    inode: int
    changed_ns: int

    def is_same(self, other: "SourceState") -> bool:
        """Tell whether two states are of the same content, as far as the ends of files tell."""
        return self[:3] == other[:3]


def state_of(path: Path, before: SourceState | None = None) -> SourceState | None:
    """Return the state of a file or folder; None if it is not there.

    Args:
        path: what to look at.
        before: a state that is returned if nothing has touched the path since.
    """
    try:
        state = path.stat()
        changed_ns = state.st_ctime_ns
        if path.is_dir():
            folders = [Path(folder) for folder, _, _ in os.walk(path)]
            changed_ns = max(folder.stat().st_ctime_ns for folder in folders)
        size = before.size if before and path.is_dir() else state.st_size
        if before and (size, state.st_ino, changed_ns) == (before[0], *before[3:]):
            return before
        return _read_state(path, state.st_size, state.st_ino, changed_ns)
    except OSError:
        return None


# Clips of one video follow one another.
@lru_cache(maxsize=16)
def _read_state(path: Path, size: int, inode: int, changed_ns: int) -> SourceState | None:
    if path.is_dir():
        sizes = {str(p.relative_to(path)): p.stat().st_size for p in _files_in(path)}
        names = hashlib.sha256(repr(sorted(sizes.items())).encode()).hexdigest()[:32]
        return SourceState(sum(sizes.values()), names, "", inode, changed_ns)
    if not path.is_file():  # a pipe would be waited for
        return None
    with path.open("rb") as file:
        head = hashlib.sha256(file.read(END_BYTES)).hexdigest()[:32]
        file.seek(max(0, size - END_BYTES))
        tail = hashlib.sha256(file.read(END_BYTES)).hexdigest()[:32]
    return SourceState(size, head, tail, inode, changed_ns)


def _files_in(folder: Path) -> Iterator[Path]:
    for place, _, names in os.walk(folder):
        yield from (Path(place, name) for name in names)


def note_sources(clip: Clip) -> dict[str, Any]:
    """Return what a note says of a clip's span and sources, JSON-plain; to be asked before reading.

    A source that changes while it is read is then told from what it was, and read again.
    """
    by_source: dict[tuple[str, str], list[str]] = defaultdict(list)
    for modality, source in clip.media.items():
        by_source[str(source.path), settings_of(source)].append(modality)
    sources = [
        [of, path, settings, state_of(Path(path))] for (path, settings), of in by_source.items()
    ]
    job = os.environ.get("SLURM_JOB_ID")
    note: dict[str, Any] = {"span": [clip.start_s, clip.stop_s], "sources": sources}
    return note | ({"job": job} if job else {})


def settings_of(source: Source) -> str:
    """Return what else decides what is read: the fields that have not their default value."""
    set_ = [(f.name, getattr(source, f.name)) for f in fields(source) if f.name != "path"]
    defaults = {f.name: f.default for f in fields(source)}
    return repr([(name, value) for name, value in set_ if value != defaults[name]])


@dataclass
class _Notes:
    """What was noted: a row per clip, and the detail of each clip, modality and reason code."""

    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    details: dict[tuple[str, str, int], str] = field(default_factory=dict)


def note_media(
    out: Path,
    shard: int,
    clips: Iterable[DecodedClip],
    read: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """Note clips that are about to be stored.

    Args:
        out: the folder of the extraction.
        shard: whose clips they are.
        clips: what came of them.
        read: what was read of each, see `note_sources`.

    Raises:
        StoreError: the disk is full, or fails.
    """
    lines = [json.dumps({**_note(clip), **(read or {}).get(clip.clip_id, {})}) for clip in clips]
    path = out / NOTES / f"{shard}.jsonl"
    with files.disk_errors(path):
        path.parent.mkdir(exist_ok=True)
        with path.open("ab") as file:
            # A line break first: what a killed run left half-written ends there.
            file.write("".join(f"\n{line}" for line in lines).encode())


def _note(clip: DecodedClip) -> dict[str, Any]:
    faults: dict[str, dict[int, str]] = {}
    for spec, detail in clip.details.items():
        reason = clip.reasons[spec]
        if reason is not Reason.NOT_IN_DATASET:  # the manifest says it already
            faults.setdefault(spec.modality, {}).setdefault(int(reason), one_line(detail))
    return {
        "clip_id": clip.clip_id,
        "audio_rate_hz": clip.audio_rate or "",
        "audio_windows_padded": clip.padded,
        **{f"{modality}{_DECODER}": decoder for modality, decoder in clip.decoders.items()},
        **({_FAULTS: faults} if faults else {}),
    }


def one_line(detail: str) -> str:
    """Return a detail as one line of bounded length."""
    line = " ".join(detail.split())
    if len(line) <= _MAX_DETAIL:
        return line
    # A long path comes first and what was wrong last: neither may push the other out.
    half = _MAX_DETAIL // 2 - 2
    return f"{line[:half]} .. {line[-half:]}"


def write_tables(out: Path, stores: Sequence[Catalog]) -> int:
    """Write both tables of an extraction; return how many clips lost something to an error."""
    notes = _read_notes(out / NOTES)
    # Several sets may have lost the same clip's modality in the same way.
    lost = sorted({row for s in stores for shard in range(s.shards) for row in s.absent(shard)})
    rows = (_failure_row(*one, detail=notes.details.get(one, "")) for one in lost)
    _write_csv(out / FAILURES, _FAILURE_COLUMNS, rows)
    ids = [clip_id.decode() for clip_id in stores[0].clip_ids]
    noted = [notes.rows[clip_id] for clip_id in ids if clip_id in notes.rows]
    decoders = sorted({n for row in noted for n in row if n.endswith(_DECODER)})
    _write_csv(out / MEDIA, (*_MEDIA_COLUMNS, *decoders), noted)
    return len({clip_id for clip_id, _, reason in lost if reason not in NATURAL})


def _failure_row(clip_id: str, modality: str, reason: Reason, detail: str) -> dict[str, str]:
    stage = _STAGE.get(reason, "decode")
    values = (clip_id, modality, stage, reason.label, reason.hint_for(detail), detail)
    return dict(zip(_FAILURE_COLUMNS, values, strict=True))


def _write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    with (
        files.replacing(path) as temporary,
        temporary.open("w", encoding="utf-8", newline="") as file,
    ):
        writer = csv.DictWriter(file, columns, restval="", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def read_failures(out: Path) -> list[dict[str, str]]:
    """Return the rows of the table of what is absent; none without one.

    Tables of older versions have other names for two reasons (`time_off`, `refused`) and no
    detail.
    """
    table = out / FAILURES
    if not table.is_file():
        return []
    with table.open(encoding="utf-8", newline="") as file:
        return [*csv.DictReader(file)]


def count_failed(out: Path) -> int:
    """Return how many clips lost a modality to an error, as the table says; 0 without one."""
    natural = {reason.label for reason in NATURAL}
    return len({r["clip_id"] for r in read_failures(out) if r["reason"] not in natural})


def read_notes(out: Path) -> dict[str, dict[str, Any]]:
    """Return the last note of each clip."""
    return _read_notes(out / NOTES).rows


def _read_notes(folder: Path) -> _Notes:
    """Read all notes; of several about a clip, the last one counts.

    Details are kept from all of them: each reason that stores hold was noted once, and a clip may
    be read again for one set when another has it already.
    """
    notes = _Notes()
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
                clip_id = str(row["clip_id"])
                faults = [(m, int(c), str(d)) for m, of in _faults(row) for c, d in of.items()]
            except (ValueError, KeyError, TypeError, AttributeError):  # half a line
                continue
            notes.rows[clip_id] = row
            notes.details |= {(clip_id, m, code): detail for m, code, detail in faults}
    return notes


def _faults(row: dict[str, Any]) -> Iterable[tuple[str, dict[str, str]]]:
    faults: dict[str, dict[str, str]] = row.get(_FAULTS, {})
    return faults.items()
