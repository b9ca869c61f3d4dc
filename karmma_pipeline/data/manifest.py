"""Manifests: lists of labelled clips, read from one CSV as people write it.

Columns: ``clip_id, video, start, stop``, one column per label set, ``split``; optionally
``audio`` and ``flow`` (separate files; an empty cell means that the clip has none) and
``group`` (such as the participant). Times are seconds or ``HH:MM:SS.ff`` on the file's clock,
an empty ``stop`` is the whole file, relative paths start at the CSV's folder.
"""

import csv
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from karmma_pipeline import files
from karmma_pipeline.data.sources import FileSource, Source
from karmma_pipeline.errors import ManifestError

RESERVED = ("clip_id", "video", "audio", "flow", "start", "stop", "split", "group")
REQUIRED = ("clip_id", "video")
UNKNOWN = -1
"""Label of a clip whose class is not given."""

_CLIP_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,119}")
_CLOCK = re.compile(r"(?:(\d+):)?(\d+):(\d{1,2}(?:\.\d+)?)")


@dataclass(frozen=True, slots=True)
class Clip:
    """A labelled span of a video; times in seconds, ``stop_s`` None is the file's end.

    A modality without an entry in ``media`` is not in the data set for this clip.
    """

    clip_id: str
    media: Mapping[str, Source]
    start_s: float
    stop_s: float | None
    labels: Mapping[str, int]
    split: str = ""
    group: str = ""


@dataclass(frozen=True)
class Manifest:
    """Clips in the file's order, and the class names of each head."""

    clips: tuple[Clip, ...]
    heads: Mapping[str, tuple[str, ...]]


def parse_time(text: str) -> float:
    """Return seconds from ``12.5`` or ``[HH:]MM:SS.ff`` with any number of decimals.

    Raises:
        ValueError: the text is no finite time from 0 on.
    """
    clock = _CLOCK.fullmatch(text.strip())
    if clock:
        hours, minutes, seconds = clock.groups()
        return int(hours or 0) * 3600 + int(minutes) * 60 + float(seconds)
    value = float(text)
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(text)
    return value


def check_clip_id(clip_id: str) -> str:
    """Return the id if it is safe as a name everywhere.

    Raises:
        ValueError: it is not; the message says what is allowed.
    """
    if not _CLIP_ID.fullmatch(clip_id):
        raise ValueError("allowed are 1 to 120 of A-Z a-z 0-9 . _ - and no leading - or .")
    return clip_id


def read_manifest(path: Path) -> Manifest:
    """Read a manifest; labels get ids in the order of their sorted names over all splits.

    Raises:
        ManifestError: names every faulty line and column (the first ten).
    """
    rows = _read_rows(path)
    heads = [c for c in rows[0][1] if c not in RESERVED]
    names = {head: _class_names(row[head] for _, row in rows) for head in heads}
    ids = {head: {name: i for i, name in enumerate(names[head])} for head in heads}
    clips: list[Clip] = []
    faults: list[str] = []
    seen: dict[str, int] = {}
    for line, row in rows:
        try:
            clip = _clip(row, path.parent, ids)
        except ValueError as error:
            faults.append(f"line {line}: {error}")
            continue
        folded = clip.clip_id.casefold()
        if folded in seen:
            faults.append(
                f"line {line}: clip_id={clip.clip_id!r} stands already in line {seen[folded]} "
                "(upper and lower case count as equal)"
            )
        seen[folded] = line
        clips.append(clip)
    if faults:
        more = f"; and {len(faults) - 10} more" if len(faults) > 10 else ""
        raise ManifestError(f"{path}: {'; '.join(faults[:10])}{more}.")
    return Manifest(tuple(clips), names)


def _read_rows(path: Path) -> list[tuple[int, dict[str, str]]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, restkey="", restval=None, strict=True)
            columns = [c.strip() for c in reader.fieldnames or ()]
            missing = [c for c in REQUIRED if c not in columns]
            if missing:
                raise ManifestError(
                    f"{path}: no column {' and '.join(missing)}; the first line must name "
                    f"the columns, it reads {','.join(columns)!r}."
                )
            if len(set(columns)) < len(columns):
                raise ManifestError(f"{path}: a column name stands twice in {','.join(columns)!r}.")
            reader.fieldnames = columns
            rows = []
            for row in reader:
                if "" in row or None in row.values():
                    raise ManifestError(
                        f"{path}: line {reader.line_num}: has not {len(columns)} cells "
                        "like the first line; quote cells that hold a comma."
                    )
                rows.append((reader.line_num, {k: (v or "").strip() for k, v in row.items()}))
    except OSError as error:
        raise ManifestError(f"{path}: the manifest cannot be read ({error.strerror}).") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise ManifestError(f"{path}: not a UTF-8 CSV file ({error}).") from None
    if not rows:
        raise ManifestError(f"{path}: the manifest lists no clips.")
    return rows


def _class_names(cells: Iterable[str]) -> tuple[str, ...]:
    names = sorted({cell for cell in cells if cell})
    if all(re.fullmatch(r"\d+", name) for name in names):
        names.sort(key=int)
    return tuple(names)


def _clip(row: Mapping[str, str], folder: Path, ids: Mapping[str, Mapping[str, int]]) -> Clip:
    try:
        check_clip_id(row["clip_id"])
    except ValueError as error:
        raise ValueError(f"clip_id={row['clip_id']!r}: {error}") from None
    if not row["video"]:
        raise ValueError("video is empty")
    video: Source = FileSource(folder / row["video"])
    media = dict.fromkeys(("rgb", "flow", "audio"), video)
    for modality in ("flow", "audio"):
        if row.get(modality):
            media[modality] = FileSource(folder / row[modality])
        elif modality in row:
            del media[modality]
    start_s, stop_s = _time(row, "start") or 0.0, _time(row, "stop")
    if stop_s is not None and stop_s <= start_s:
        raise ValueError(f"stop={row['stop']!r} is not after start={row.get('start', '')!r}")
    labels = {head: of.get(row[head], UNKNOWN) for head, of in ids.items()}
    return Clip(
        row["clip_id"], media, start_s, stop_s, labels, row.get("split", ""), row.get("group", "")
    )


def _time(row: Mapping[str, str], column: str) -> float | None:
    text = row.get(column, "")
    if not text:
        return None
    try:
        return parse_time(text)
    except ValueError:
        raise ValueError(f"{column}={text!r}: write seconds from 0 on, or HH:MM:SS.ff") from None


def write_manifest(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Write rows (all with the same keys) as a manifest CSV."""
    with files.replacing(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
