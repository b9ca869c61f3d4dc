"""EPIC-KITCHENS-100 as published: its CSV files, and its media in any layout in use.

Annotations: https://github.com/epic-kitchens/epic-kitchens-100-annotations. A clip's id is its
``narration_id``. MP4 files are addressed by timestamp, because ``start_frame`` counts on a grid
of 60 fps (two-digit videos) or 50 fps (three-digit videos) that the MP4s do not have; the
released frames do lie on that grid and are addressed by number.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from pydantic import Field

from karmma_pipeline.config import Recipe
from karmma_pipeline.data import annotations
from karmma_pipeline.data.annotations import Row
from karmma_pipeline.data.datasets.epic_media import EpicMedia, Prefer, grid_fps
from karmma_pipeline.data.datasets.listing import Listing
from karmma_pipeline.data.manifest import NOT_KNOWN, UNKNOWN, Clip, Groups, Manifest, unique
from karmma_pipeline.errors import ManifestError, counted

REQUIRED = ("narration_id", "participant_id", "video_id", "start_timestamp", "stop_timestamp")
FRAMES = ("start_frame", "stop_frame")
HEADS = ("verb", "noun")

_VIDEO_ID = re.compile(r"P\d{2}_\d{2,3}", re.ASCII)
_PARTICIPANT = re.compile(r"P\d{2}", re.ASCII)
_UNKNOWN_CLASS = {"-1", "-1.0"}


class EpicKitchens(Recipe):
    """EPIC-KITCHENS-100 as its downloader and its annotation repository lay it out."""

    kind: Literal["epic_kitchens_100"] = Field(description="Data set.")
    root: Path = Field(description="Folder of the media, such as EPIC-KITCHENS.")
    annotations: Path = Field(description="Folder of the CSV files.")
    splits: dict[str, Path] = Field(
        {"train": Path("EPIC_100_train.csv"), "val": Path("EPIC_100_validation.csv")},
        min_length=1,
        description="Split -> CSV in the annotations folder. Files without labels are "
        "allowed, such as EPIC_100_test_timestamps.csv and the UDA targets.",
    )
    media: Prefer = Field(Prefer(), description="Which files to use if several exist.")


def read(dataset: EpicKitchens) -> Manifest:
    """Read the annotations and find the media.

    Raises:
        ManifestError: an annotation file is missing or faulty; file, line and column are named.
    """
    folder, listing = dataset.annotations, Listing()
    heads = {head: _class_list(folder, listing, head) for head in HEADS}
    left_out: list[str] = []
    ends = _video_ends(folder, left_out)
    rows = {split: _table(folder / file) for split, file in dataset.splits.items()}
    media = EpicMedia(dataset.root, dataset.media)
    reader = _NarrationReader(heads, ends, media)
    clips: list[tuple[str, Clip]] = []
    notes = []
    for split, file in dataset.splits.items():
        items = [(f"line {row.line}", row) for row in rows[split]]
        read = partial(reader.clip, split=split)
        some = annotations.collect(folder / file, items, read, left_out)
        clips += [(f"{file.name} {where}", clip) for where, clip in some]
        labelled = any(label != UNKNOWN for _, c in some for label in c.labels.values())
        without = "" if labelled else ", without labels"
        notes.append(f"{split}: {counted(len(some), 'clip')} of {file}{without}")
    return Manifest(
        unique(folder, clips, left_out),
        heads,
        _groups(folder, listing, heads),
        (*notes, *reader.notes(), *media.lines()),
        tuple(left_out),
    )


def _table(path: Path) -> list[Row]:
    rows = annotations.read_table(path, (*REQUIRED, *FRAMES), "annotation file")
    if not rows:
        raise ManifestError(f"{path}: the file lists no clips.")
    classes = [f"{head}_class" in rows[0] for head in HEADS]
    if any(classes) and not all(classes):
        raise ManifestError(
            f"{path}: has only one of verb_class and noun_class; it needs both or neither."
        )
    return rows


def _class_list(folder: Path, listing: Listing, head: str) -> tuple[str, ...]:
    names = (f"EPIC_100_{head}_classes.csv", f"EPIC_100_{head}_classes_v2.csv")
    path = listing.first(folder, (*names, f"{head}_classes.csv")) or folder / names[0]
    rows = annotations.read_table(path, ("id", "key"), "class list")
    keys = []
    for number, row in enumerate(rows):
        if row["id"] != str(number) or not row["key"]:
            raise ManifestError(f"{path}: line {row.line}: id={row['id']!r}: must be {number}.")
        keys.append(row["key"])
    if not keys or len(set(keys)) < len(keys):
        raise ManifestError(f"{path}: the class list is empty or has duplicate keys.")
    return tuple(keys)


def _video_ends(folder: Path, left_out: list[str]) -> Mapping[str, float]:
    """Return the duration of each video in seconds; nothing if the list is not there."""
    path = folder / "EPIC_100_video_info.csv"
    if not path.is_file():
        return {}
    rows = annotations.read_table(path, ("video_id", "duration"), "video list")
    items = ((f"line {row.line}", row) for row in rows)
    read = lambda row: (row["video_id"], row.time("duration"))  # noqa: E731
    pairs = annotations.collect(path, items, read, left_out)
    return {video: end for _, (video, end) in pairs if end}


def _groups(folder: Path, listing: Listing, heads: Mapping[str, tuple[str, ...]]) -> Groups:
    """Return the published lists of unseen participants and tail classes that are there."""
    unseen: set[str] = set()
    for part in ("validation", "test"):
        path = folder / f"EPIC_100_unseen_participant_ids_{part}.csv"
        if listing.has(path):
            rows = annotations.read_table(path, ("participant_id",), "list")
            unseen |= {row["participant_id"] for row in rows}
    tail = {}
    for head in HEADS:
        path = folder / f"EPIC_100_tail_{head}s.csv"
        if listing.has(path):
            rows = annotations.read_table(path, (head,), "list")
            items = ((f"line {row.line}", row) for row in rows)
            ids = annotations.collect(path, items, partial(_class, column=head, names=heads[head]))
            tail[head] = tuple(sorted({i for _, i in ids if i != UNKNOWN}))
    return Groups(tuple(sorted(unseen)), tail)


def _class(row: Row, column: str, names: tuple[str, ...]) -> int:
    unknown = row[column] in NOT_KNOWN or row[column] in _UNKNOWN_CLASS
    number = None if unknown else row.whole(column)
    if number is None:
        return UNKNOWN
    if number >= len(names):
        raise ValueError(f"{column}={number}: the last class is {len(names) - 1}")
    return number


@dataclass
class _NarrationReader:
    """Turns rows into clips, and counts what is odd about them."""

    heads: Mapping[str, tuple[str, ...]]
    ends: Mapping[str, float]
    media: EpicMedia
    clamped: int = 0
    apart: int = 0
    unlisted: int = 0
    unlabelled: int = 0

    def clip(self, row: Row, split: str) -> Clip:
        clip_id, video = row.name("narration_id"), row.name("video_id", _VIDEO_ID)
        participant = row.name("participant_id", _PARTICIPANT)
        if not video.startswith(f"{participant}_"):
            raise ValueError(
                f"participant_id={participant!r}: video_id={video!r} belongs to another participant"
            )
        start_s, stop_s = row.span("start_timestamp", "stop_timestamp")
        frames = self._frames(row)
        if stop_s is None or not row["start_timestamp"]:
            which = "stop" if stop_s is None else "start"
            raise ValueError(f"{which}_timestamp is empty")
        fps = grid_fps(video)
        self.apart += any(
            abs(t * fps - frame) > 1.5 for t, frame in zip((start_s, stop_s), frames, strict=True)
        )
        end = self.ends.get(video)
        self.unlisted += end is None
        if end is not None and start_s < end < stop_s:
            stop_s = end
            self.clamped += 1
        labels = {h: self._label(row, h) for h in HEADS}
        self.unlabelled += UNKNOWN in labels.values() and f"{HEADS[0]}_class" in row
        sources = self.media.sources(participant, video, frames, end)
        return Clip(clip_id, sources, start_s, stop_s, labels, split, participant)

    def _frames(self, row: Row) -> tuple[int, int]:
        first, last = (row.whole(column) for column in FRAMES)
        if first is None or last is None or last < first:
            raise ValueError(f"stop_frame={row['stop_frame']!r}: is before start_frame")
        return first, last

    def _label(self, row: Row, head: str) -> int:
        column = f"{head}_class"
        return _class(row, column, self.heads[head]) if column in row else UNKNOWN

    def notes(self) -> list[str]:
        lines = []
        if self.clamped:
            lines.append(
                f"clips that extend past the end of their video and are cut there: {self.clamped:,}"
            )
        if self.apart:
            lines.append(
                "clips whose times and frame numbers differ by more than a frame (videos use "
                f"the times, frame folders the numbers): {self.apart:,}"
            )
        if self.unlabelled:
            lines.append(f"clips whose verb or noun class is not given: {self.unlabelled:,}")
        if self.unlisted:
            lines.append(f"clips whose video has no entry in video_info: {self.unlisted:,}")
        return lines
