"""Clips, their media, and manifests in CSV.

Every data set is turned into a `Manifest` before anything is decoded. Columns of the CSV:
``clip_id, video, start, stop``, one per label set, ``split``, ``group`` (such as the
participant). Optional: ``audio`` (a separate file), ``frames`` (a folder or tar of numbered
pictures, instead of or beside ``video``) with ``fps``, ``flow`` (a file, or a folder or tar of
numbered u and v pictures), ``video_stream`` and ``audio_stream`` (numbers of streams). An empty
``audio`` or ``flow`` cell means that the clip has none. Times are seconds or ``HH:MM:SS.ff`` on
the file's clock, an empty ``stop`` is the whole file, relative paths start at the CSV's folder.

A recipe's ``sensors`` name further columns, each a modality with a file per cell; a list of sensors
alone needs no video. A clip has one source per modality it natively has.
"""

import csv
import difflib
import json
import re
import unicodedata
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from pydantic import Field

from karmma_pipeline import files
from karmma_pipeline.config import Recipe
from karmma_pipeline.data import annotations
from karmma_pipeline.data.annotations import Row
from karmma_pipeline.data.sensors import check_series_file
from karmma_pipeline.data.sources import (
    FileSource,
    FrameSource,
    SensorSource,
    Source,
)
from karmma_pipeline.errors import ManifestError, counted
from karmma_pipeline.metrics import ACTION
from karmma_pipeline.store.spec import check_head_names
from karmma_pipeline.views import View

RESERVED = (
    "clip_id",
    "video",
    "video_stream",
    "frames",
    "fps",
    "flow",
    "audio",
    "audio_stream",
    "start",
    "stop",
    "split",
    "group",
)
REQUIRED = ("clip_id",)
TIMES = ("start", "stop")
NOT_KNOWN = frozenset(
    ["", "NA", "N/A", "n/a", "#N/A", "<NA>", "NaN", "nan", "NULL", "null", "None"]
)
"""Cells that say that a label, a split or a group is not known: those that pandas reads so."""
SIDECAR = "groups.json"
"""File beside the stores with the data set's `Groups`; evaluation reads it."""

UNKNOWN = -1
"""Label of a clip whose class is not given."""


@dataclass(frozen=True, slots=True)
class Clip:
    """A labelled span of a video; times in seconds, ``stop_s`` None is the file's end.

    A modality without an entry in ``media`` is not in the data set for this clip. ``view``: which
    part of it is looked at; None: the whole clip, in the middle of its pictures.
    """

    clip_id: str
    media: Mapping[str, Source]
    start_s: float
    stop_s: float | None
    labels: Mapping[str, int]
    split: str = ""
    group: str = ""
    view: View | None = None


@dataclass(frozen=True)
class Groups:
    """Groups of clips with scores of their own, as a data set publishes them.

    unseen: values of ``Clip.group`` that the training split does not have.
    tail: head to ids of its rare classes.
    """

    unseen: tuple[str, ...] = ()
    tail: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Manifest:
    """Clips in the files' order, and the class names of each head.

    notes: sentences on what was found on disk, for people.
    left_out: entries of a published list that are faulty, each with where it stands and why.
    """

    clips: tuple[Clip, ...]
    heads: Mapping[str, tuple[str, ...]]
    groups: Groups = Groups()
    notes: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()


def describe_heads(heads: Mapping[str, Sequence[str]]) -> list[str]:
    """Return a sentence per head, with its first classes."""
    return [
        f"{head}: {counted(len(names), 'class', 'classes')} "
        f"({', '.join(names[:5])}{', ...' if names[5:] else ''})"
        for head, names in heads.items()
    ]


def unique(
    path: Path, clips: Iterable[tuple[str, Clip]], left_out: list[str] | None = None
) -> tuple[Clip, ...]:
    """Return the clips if no id is a duplicate; upper and lower case count as equal.

    Args:
        path: the file or folder that is named in the error.
        clips: each with where it stands, such as ``line 7``.
        left_out: what is faulty already; the later ones of duplicates are added.

    Raises:
        ManifestError: there are duplicate ids, or there are no clips.
    """
    seen: dict[str, str] = {}
    faults: list[str] = []
    kept: list[Clip] = []
    for where, clip in clips:
        folded = clip.clip_id.casefold()
        if folded in seen:
            faults.append(
                f"{where}: duplicate clip_id={clip.clip_id!r}, also in {seen[folded]} "
                "(case-insensitive)"
            )
        else:
            seen[folded] = where
            kept.append(clip)
    if left_out is None:
        annotations.raise_faults(path, faults)
    else:
        left_out += [f"{path}/{fault}" for fault in faults]
    if not kept and left_out:
        raise ManifestError(f"every entry is invalid: {'; '.join(left_out[:10])}.")
    if not kept:
        raise ManifestError(f"{path}: the manifest lists no clips.")
    return tuple(kept)


FrameName = Annotated[
    str,
    Field(pattern=r"^([^{}/][^{}]*)?(\{video\}[^{}]*)?\{:0?\d{0,2}d\}[^{}]*$", max_length=100),
]
"""File name of a numbered picture, such as ``img_{:05d}.jpg``."""


class PictureNames(Recipe):
    """How numbered pictures are named, in folders and tars."""

    frame_name: FrameName = Field(
        "img_{:05d}.jpg",
        description="File name of an image: {:05d} stands for its number, {video} for the "
        "name of its folder. Other names are detected if all images of a folder follow one "
        "pattern.",
    )
    flow_names: tuple[FrameName, FrameName] = Field(
        ("u/frame_{:010d}.jpg", "v/frame_{:010d}.jpg"),
        description="File names of the horizontal and the vertical component of a flow frame.",
    )
    first_frame: int = Field(1, ge=0, description="Number of the first image.")
    flow_bound_px: float = Field(
        20.0, gt=0, description="Flow in px encoded by bytes 0 and 255 of a flow image."
    )


# Other names that people give to reserved columns, without underscores and in lower case.
_MEANT = {
    "clip_id": {"id", "clip", "uid", "clipname", "narrationid"},
    "video": {"file", "filename", "path", "filepath", "videopath", "videofile", "videoname"},
    "frames": {"framefolder", "framespath", "images", "imagefolder"},
    "fps": {"framerate", "framespersecond"},
    "flow": {"opticalflow", "flowpath", "flowfolder"},
    "audio": {"sound", "wav", "audiopath", "audiofile"},
    "split": {"subset", "partition", "fold", "set"},
    "group": {"participant", "participantid", "subject", "subjectid", "person", "personid"},
}
# Names of times, written so, with words and units that people put beside them: clips whose start or
# end goes by unnoticed run through their whole files.
_BEFORE = "(?:t|time|timestamp|frame|clip|segment|action|narration)*"
_UNITS = (
    "(?:s|secs?|seconds?|time|timestamp|m|ms|msecs?|milli(?:second)?s|us|ns|frames?|number|index)*"
)
_TIMES = {
    "start": re.compile(f"{_BEFORE}(?:start|begin|beginning|onset){_UNITS}|from|t0"),
    "stop": re.compile(f"{_BEFORE}(?:stop|end|ending|offset|finish){_UNITS}|to|until|t1"),
}
_LENGTH = re.compile(f"{_BEFORE}(?:duration|dur|length|len){_UNITS}")
_NO_SECONDS = re.compile("ms|milli|us$|ns$|frame|number|index")
_NAMELESS = re.compile(r"\(column \d+\)|Unnamed: \d+")
_DECIMAL = re.compile(r"-?\d{1,15}(\.\d{0,15})?", re.ASCII)
_OR_ELSE = "delete it or, if it is a label, list all label columns in the recipe: {}."

# Of so few clips each may well have a class of its own.
_FEW_CLIPS = 20


def read_manifest(
    path: Path,
    pictures: PictureNames | None = None,
    heads: Sequence[str] | None = None,
    sensors: Collection[str] = (),
) -> Manifest:
    """Read a manifest CSV; labels get ids in the order of their sorted names over all splits.

    Args:
        path: the CSV.
        pictures: names of the pictures in its ``frames`` and ``flow`` folders.
        heads: columns that are label sets; None: all that are not reserved.
        sensors: columns that name a file of a sensor, whose modality is called so.

    Raises:
        ManifestError: names every faulty line and column (the first ten); or a column looks like
            a reserved one by another name, or like no label set.
    """
    pictures = pictures or PictureNames()
    rows = annotations.read_table(path, REQUIRED)
    if not rows:
        raise ManifestError(f"{path}: the manifest lists no clips.")
    columns = list(rows[0].cells)
    there = [c for c in columns if c in sensors]
    names, notes = _head_columns(path, [c for c in columns if c not in there], heads)
    if "video" not in columns and "frames" not in columns and not there:
        raise ManifestError(f"{path}: no column video or frames.")
    labels = {name: _Labels.of([row[name] for row in rows]) for name in names}
    if heads is None:
        _check_sizes(path, labels)
    clips = annotations.collect(
        path,
        ((f"line {row.line}", row) for row in rows),
        lambda row: _clip(row, path.parent, labels, pictures, there),
    )
    notes += [f"{name}: {one.note}" for name, one in labels.items() if one.note]
    if same := annotations.look_alike({clip.split for _, clip in clips}):
        notes.append(f"distinct splits with similar names: {'; '.join(same)}")
    sets = {name: one.names for name, one in labels.items()}
    return Manifest(unique(path, clips), sets, notes=tuple(notes))


def _head_columns(
    path: Path, columns: Sequence[str], heads: Sequence[str] | None
) -> tuple[list[str], list[str]]:
    """Return the columns that are heads, and sentences on those that are nothing."""
    index = [c for c in columns if _NAMELESS.fullmatch(c)]
    free = [c for c in columns if c not in RESERVED and c not in index]
    for head in heads or ():
        if head not in free:
            near = difflib.get_close_matches(head, free, n=1)
            hint = f"; did you mean {near[0]!r}" if near else ""
            why = "is reserved" if head in RESERVED else f"is not a column{hint}"
            raise ManifestError(f"{path}: dataset.heads: {head!r} {why}.")
    for column in free if heads is None else set(free) - {*heads}:
        reserved = _meant(column, columns)
        if reserved and (heads is None or reserved in TIMES):
            other = reserved in TIMES and _NO_SECONDS.search(_plain(column))
            raise ManifestError(
                f"{path}: unknown column {column!r}; did you mean "
                f"{reserved}{' (seconds)' if reserved in TIMES else ''}? "
                f"{'Convert it to seconds and rename' if other else 'Rename'} it, "
                f"{_OR_ELSE.format(_naming(path, column))}"
            )
        if "start" in columns and "stop" not in columns and _LENGTH.fullmatch(_plain(column)):
            raise ManifestError(
                f"{path}: column {column!r}, but no column stop: every clip would extend to the "
                "end of its file. Add a column stop (start plus length, in seconds), and "
                f"{_OR_ELSE.format(_naming(path, column))}"
            )
    chosen = list(heads) if heads is not None else free
    for head in chosen:
        _check_head(path, head, chosen)
    try:
        check_head_names(chosen)
    except ValueError as error:
        others = [head for head in chosen if head.casefold() != ACTION]
        raise ManifestError(
            f"{path}: {error}; rename the column, or list the other label columns in the recipe: "
            f"{_naming(path, *others)}."
        ) from None
    unused = [*index, *(c for c in free if c not in chosen)]
    return chosen, [f"ignored columns: {', '.join(unused)}"] if unused else []


def _check_head(path: Path, head: str, heads: Sequence[str]) -> None:
    try:
        files.check_name(head)
    except ValueError as error:
        plain = unicodedata.normalize("NFKD", head).encode("ascii", "ignore").decode()
        better = re.sub(r"[^A-Za-z0-9._-]+", "_", plain).strip("_.-")
        raise ManifestError(
            f"{path}: column {head!r}: invalid name of a head ({error}); rename the column to "
            f"{better or 'label'!r}."
        ) from None
    if sum(head.casefold() == other.casefold() for other in heads) > 1:
        raise ManifestError(f"{path}: two heads have the name {head!r}, ignoring case.")


def _meant(column: str, columns: Sequence[str]) -> str | None:
    """Return the reserved column that is not there and that a column looks like."""
    plain = _plain(column)
    for name in RESERVED:
        if name in columns:
            continue
        alike = name.replace("_", "")
        turned = plain[:1] == alike[0] and sorted(plain) == sorted(alike)
        close = difflib.SequenceMatcher(None, plain, alike).ratio() >= 0.85
        time = name in _TIMES and _TIMES[name].fullmatch(plain)
        if plain == alike or plain in _MEANT.get(name, ()) or turned or close or time:
            return name
    return None


def _naming(path: Path, *heads: str) -> str:
    # JSON is YAML, and escapes what would end a line or a list.
    names = ", ".join(
        head if re.fullmatch(r"[\w .-]+", head) else json.dumps(head) for head in heads
    )
    return f"dataset: {{kind: csv, path: {path}, heads: [{names}]}}"


def _plain(column: str) -> str:
    return re.sub(r"[\W_]+", "", column.casefold())


def _check_sizes(path: Path, labels: Mapping[str, "_Labels"]) -> None:
    for name, one in labels.items():
        if one.known >= _FEW_CLIPS and 2 * len(one.names) > one.known:
            raise ManifestError(
                f"{path}: column {name!r} has {len(one.names):,} classes in {one.known:,} "
                "clips, which is unusual for a label. Delete it, or list the label columns in "
                f"the recipe: {_naming(path, 'verb')}."
            )


@dataclass(frozen=True)
class _Labels:
    """The classes of one column: names by id, a cell's id, clips that have one, and a remark."""

    names: tuple[str, ...]
    ids: Mapping[str, int]
    known: int
    note: str

    @classmethod
    def of(cls, cells: Sequence[str]) -> "_Labels":
        """Sort out which cells are classes; numbers are ordered as numbers."""
        classes = {cell for cell in cells if cell not in NOT_KNOWN}
        names = {cell: cell for cell in classes}
        if classes and all(_DECIMAL.fullmatch(cell) for cell in classes):
            # pandas writes whole numbers with a point where one is missing: 3.0 is class 3.
            names = {cell: re.sub(r"\.0*$", "", cell) for cell in classes}
            if min(map(float, classes)) >= UNKNOWN:  # among other negative numbers it is a class
                names = {cell: name for cell, name in names.items() if float(name) != UNKNOWN}
            order = sorted(set(names.values()), key=lambda name: (float(name), name))
        else:
            order = sorted(classes)
        places = {name: place for place, name in enumerate(order)}
        ids = {cell: places[name] for cell, name in names.items()}
        unknown = [cell for cell in cells if cell not in ids]
        kinds = ", ".join(sorted({cell or "empty" for cell in unknown}))
        note = f"{len(unknown):,} of {counted(len(cells), 'clip')} without a class ({kinds})"
        notes = [note] if unknown else []
        if same := annotations.look_alike(order):
            notes.append(f"distinct classes with similar names: {'; '.join(same[:5])}")
        return cls(tuple(order), ids, len(cells) - len(unknown), "; ".join(notes))


def _clip(
    row: Row,
    folder: Path,
    labels: Mapping[str, _Labels],
    pictures: PictureNames,
    sensors: Sequence[str],
) -> Clip:
    clip_id = row.name("clip_id")
    media: dict[str, Source] = {}
    video = _file(row, folder, "video", row.whole("video_stream"))
    rgb = _frames(row, folder, pictures) or video
    if rgb is not None:
        media["rgb"] = rgb
    elif not any(row[c] for c in sensors):
        column = next((c for c in ("video", "frames") if c in row), sensors[0] if sensors else "")
        raise ValueError(f"{column} is empty")
    flow = _flow(row, folder, pictures) if "flow" in row else rgb
    if flow is not None:
        media["flow"] = flow
    sound = _file(row, folder, "audio" if "audio" in row else "video", row.whole("audio_stream"))
    if sound is not None:
        media["audio"] = sound
    media |= {c: source for c in sensors if (source := _series(row, folder, c)) is not None}
    start_s, stop_s = row.span("start", "stop")
    ids = {head: of.ids.get(row[head], UNKNOWN) for head, of in labels.items()}
    split, group = ("" if (x := row.get(c)) in NOT_KNOWN else x for c in ("split", "group"))
    return Clip(clip_id, media, start_s, stop_s, ids, split, group)


def _path(row: Row, folder: Path, column: str) -> Path | None:
    text = row.get(column)
    if not text:
        return None
    if "://" in text:
        raise ValueError(f"{column}={text!r:.60}: a URL; download the file and give its path")
    # No system takes longer ones: to look for such a file is an error of its own.
    longest = max(len(part.encode()) for part in text.split("/"))
    if "\0" in text or longest > 255 or len(str(folder.absolute() / text).encode()) > 4000:
        raise ValueError(f"{column}={text[:60]!r}: not a path")
    return folder / (Path(text).expanduser() if text.startswith("~/") else text)


def _file(row: Row, folder: Path, column: str, stream: int | None) -> FileSource | None:
    path = _path(row, folder, column)
    return None if path is None else FileSource(path, stream)


def _series(row: Row, folder: Path, column: str) -> SensorSource | None:
    path = _path(row, folder, column)
    if path is None:
        return None
    try:
        check_series_file(path)
    except ValueError as error:
        raise ValueError(f"{column}={row[column]!r:.60}: {error}") from None
    return SensorSource(path)


def _fps(row: Row, column: str) -> float:
    try:
        fps = annotations.parse_number(row.get("fps"))
    except ValueError:
        fps = 0.0
    if not 0 < fps < 100_000:
        raise ValueError(f"fps={row.get('fps')!r}: {column} needs the frame rate, such as 25")
    return fps


def _frames(row: Row, folder: Path, pictures: PictureNames) -> FrameSource | None:
    path = _path(row, folder, "frames")
    if path is None:
        return None
    name = pictures.frame_name.replace("{video}", re.sub("[{}]", r"\g<0>\g<0>", path.stem))
    return FrameSource(path, (name,), _fps(row, "frames"), pictures.first_frame)


def _flow(row: Row, folder: Path, pictures: PictureNames) -> Source | None:
    path = _path(row, folder, "flow")
    if path is None:
        return None
    if path.suffix not in {"", ".tar"} and not path.is_dir():
        return FileSource(path)
    return FrameSource(
        path,
        pictures.flow_names,
        _fps(row, "flow"),
        pictures.first_frame,
        bound_px=pictures.flow_bound_px,
    )


def write_manifest(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Write rows (all with the same keys) as a manifest CSV."""
    with (
        files.replacing(path) as temporary,
        temporary.open("w", encoding="utf-8", newline="") as file,
    ):
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
