"""Clips to extract again: those with changed files, and those selected by --retry.

A source is another one than that noted in `tables` if its span, path, size or digests differ; its
times never matter, except that a file whose inode and time of change are as noted is not read for
its digests.
"""

import hashlib
import os
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from karmma_pipeline import files
from karmma_pipeline.data.manifest import Clip
from karmma_pipeline.errors import ConfigError, StoreError, counted
from karmma_pipeline.extraction.tables import END_BYTES, SourceState, settings_of, state_of
from karmma_pipeline.modalities import Reason
from karmma_pipeline.store import Catalog

#: What `--retry` takes beside reasons: clips whose files are others than those that were read.
CHANGED = "changed"

PASSING = tuple(reason.label for reason in Reason if reason.is_passing)

_PATHS_NAMED = 5


def _has_grown(path: Path, before: SourceState) -> bool:
    """Tell whether a file begins with what it was before and goes on: a download went on."""
    if not path.is_file() or path.stat().st_size <= before.size:
        return False
    with path.open("rb") as file:
        head = file.read(min(before.size, END_BYTES))
    return hashlib.sha256(head).hexdigest()[:32] == before.head


@dataclass(frozen=True)
class Retry:
    """What is tried again, whether its files have changed or not.

    reasons: of absent modalities. changed: clips that have tokens of files that were replaced, too.
    """

    reasons: frozenset[Reason] = frozenset()
    changed: bool = False

    @classmethod
    def parse(cls, names: Iterable[str]) -> "Retry":
        """Read the names of passing reasons, or ``changed``; none are all reasons.

        Raises:
            ConfigError: there is no such reason, or it is final.
        """
        given = [name for name in names if name]
        for name in given:
            if name not in (*PASSING, CHANGED):
                final = name in {reason.label for reason in Reason}
                why = "is permanent, so a retry would not help" if final else "is not a reason"
                raise ConfigError(
                    f"--retry {name}: {why}; allowed: {', '.join((*PASSING, CHANGED))}."
                )
        reasons = frozenset(Reason[name.upper()] for name in given if name != CHANGED)
        if not given:
            reasons = frozenset(reason for reason in Reason if reason.is_passing)
        return cls(reasons, CHANGED in given)


#: What has become of a source: grown is one that was missing or that goes on where it ended;
#: replaced has other bytes at its path; other is another file, or another stream or span of it.
Change = Literal["same", "gone", "grown", "replaced", "other"]


@dataclass(frozen=True)
class _ReadClip:
    """A clip that was read before.

    absent: modality to why; a modality of no store is in it as none. changes: modality to its
    path and what has become of its source.
    """

    clip: Clip
    absent: Mapping[str, Reason]
    changes: Mapping[str, tuple[str, Change]]
    job: str | None

    @property
    def is_spoilt(self) -> bool:
        """Whether something of it could not be read, so that its files are not as they should."""
        return any(reason.is_passing for reason in self.absent.values())

    def changed(self) -> dict[str, tuple[str, Change]]:
        """Return the modalities of which there is something else to read now."""
        return {m: one for m, one in self.changes.items() if one[1] not in {"same", "gone"}}


def clips_again(
    clips: Sequence[Clip],
    notes: Mapping[str, Mapping[str, Any]],
    catalogs: Collection[Catalog],
    retry: Retry,
) -> dict[str, bool]:
    """Return the clips that are made again, by id: true if what they had must not stay.

    Args:
        clips: of the list.
        notes: by clip, see `tables.read_notes`.
        catalogs: of the stores.
        retry: what is asked for.

    Raises:
        StoreError: features were made of files that have been replaced by others; the clips
            are named.
    """
    absent = _absences(clips, notes, catalogs)
    read = [
        _ReadClip(c, absent[c.clip_id], dict(_changes(c, note, absent[c.clip_id])), note.get("job"))
        for c in clips
        if (note := notes.get(c.clip_id))
    ]
    known = set(_known_to_have_changed(read))
    again: dict[str, bool] = {}
    replaced: dict[str, list[str]] = defaultdict(list)
    job = os.environ.get("SLURM_JOB_ID")
    for one in read:
        clip_id, changed = one.clip.clip_id, one.changed()
        for modality, (path, change) in changed.items():
            expected = change == "grown" or (change == "replaced" and path in known)
            if modality not in one.absent and not expected:
                replaced[path].append(clip_id)
        if changed:
            again[clip_id] = True
        # A job that the batch system begins again goes on; it does not try all from the start.
        elif retry.reasons.intersection(one.absent.values()) and (not job or one.job != job):
            again[clip_id] = False
    if replaced and not retry.changed:
        raise _others(replaced)
    return again


def _absences(
    clips: Sequence[Clip],
    notes: Mapping[str, Mapping[str, Any]],
    catalogs: Collection[Catalog],
) -> dict[str, dict[str, Reason]]:
    """Return why modalities of clips are absent: as stores say, and before that their notes."""
    stored = {modality for catalog in catalogs for modality in catalog.spec.order}
    found: dict[str, dict[str, Reason]] = {
        clip.clip_id: dict.fromkeys(clip.media.keys() - stored, Reason.NOT_IN_DATASET)
        for clip in clips
    }
    for clip_id, note in notes.items():
        for modality, codes in note.get("faults", {}).items():
            for code in codes:
                found.get(clip_id, {})[modality] = Reason(int(code))
    for catalog in catalogs:
        for shard in sorted(catalog.committed()):
            for clip_id, modality, reason in catalog.absent(shard):
                found.get(clip_id, {})[modality] = reason
    return found


def _changes(
    clip: Clip, note: Mapping[str, Any], absent: Mapping[str, Reason]
) -> Iterator[tuple[str, tuple[str, Change]]]:
    """Yield each modality with its path and what has become of its source."""
    noted = note.get("sources")
    before = {m: (path, rest, state) for of, path, rest, state in noted or () for m in of}
    for modality, source in clip.media.items():
        change: Change = "same"
        path, rest, state = before.get(modality, ("", "", None))
        if noted is None:  # an older program said only what was missing
            if absent.get(modality) is Reason.FILE_MISSING and files.exists(source.path):
                change = "grown"
        elif rest != settings_of(source) or note.get("span") != [clip.start_s, clip.stop_s]:
            change = "other"
        else:
            change = _change(source.path, state)
            if change == "replaced" and path != str(source.path):
                change = "other"
        yield modality, (str(source.path), change)


def _change(path: Path, noted: Sequence[Any] | None) -> Change:
    before = SourceState(*noted) if noted else None
    now = state_of(path, before)
    if now is None:
        return "gone"
    if before is None:
        return "grown"
    if before.is_same(now):
        return "same"
    return "grown" if _has_grown(path, before) else "replaced"


def _known_to_have_changed(read: Iterable[_ReadClip]) -> Iterator[str]:
    """Yield the files of which all clips are made again without being asked.

    Those that were not whole, as they have grown or as some clip of them could not be read; and
    those of which another part of this extraction, or a run that was killed, has done so already.
    """
    for one in read:
        for path, change in one.changes.values():
            if change in {"grown", "same"} or (change == "replaced" and one.is_spoilt):
                yield path


def _others(replaced: Mapping[str, Sequence[str]]) -> StoreError:
    files = [(path, list(dict.fromkeys(ids))) for path, ids in replaced.items()]
    named = "; ".join(
        f"{path} (clip {ids[0]!r}{f' and {len(ids) - 1} more' if len(ids) > 1 else ''})"
        for path, ids in files[:_PATHS_NAMED]
    )
    unnamed = len(files) - _PATHS_NAMED
    more = f"; and {counted(unnamed, 'more file')}" if unnamed > 0 else ""
    return StoreError(
        "features were extracted from other files, or other parts of them, than the manifest "
        f"lists now: {named}{more}. Restore the files, extract these clips again with `--retry "
        f"{CHANGED}`, or choose another folder with --set out=FOLDER."
    )
