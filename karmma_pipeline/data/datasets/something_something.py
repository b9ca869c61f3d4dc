"""Something-Something V2 as published: its JSON files, videos or frames, and object boxes.

A clip is a whole file; there is no sound. Labels are templates without their brackets, with the
published ids. Object boxes are those of Something-Else (Materzynska et al., CVPR 2020,
https://github.com/joaanna/something_else): one JSON file, or the four parts of its download.
"""

import mmap
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from karmma_pipeline.config import Recipe
from karmma_pipeline.data import annotations
from karmma_pipeline.data.datasets.listing import MISSING, Listing, SourceCounts
from karmma_pipeline.data.manifest import UNKNOWN, Clip, FrameName, Manifest, unique
from karmma_pipeline.data.sources import BoxSource, FileSource, FrameSource, Source
from karmma_pipeline.errors import ManifestError, counted

HEAD = "action"
#: Rate of the data set's videos, Hz, and of the grid of its frames and boxes.
FPS = 12.0

_FILES = {"train": "train", "val": "validation", "test": "test"}
_FOLDERS = ("", "20bn-something-something-v2/", "videos/", "frames/")
_SUFFIXES = (".webm", ".mp4", ".avi", ".mkv")
_ID = re.compile(r"[0-9]{1,9}")

SomethingSplit = Literal["train", "val", "test"]


class SomethingSomething(Recipe):
    """Something-Something V2 as it is delivered, or as frames."""

    kind: Literal["something_something_v2"] = Field(description="Data set.")
    root: Path = Field(description="Folder of the videos, or of frame folders, one per video.")
    annotations: Path = Field(
        description="Folder of the JSON files; both naming schemes are known."
    )
    splits: tuple[SomethingSplit, ...] = Field(
        ("train", "val"),
        min_length=1,
        description="Splits to use; test has no labels.",
    )
    prefer: Literal["auto", "video", "frames"] = Field(
        "auto", description="auto: the video file if it exists, else the frame folder."
    )
    frame_name: FrameName = Field(
        "img_{:05d}.jpg",
        description="File name of a frame, such as {video}_{:06d}.jpg. Other names are "
        "detected if all frames of a folder follow one pattern.",
    )
    frame_fps: float = Field(FPS, gt=0, description="Rate at which frames were extracted, Hz.")
    boxes: tuple[Path, ...] = Field(
        (), description="Something-Else annotation files (JSON), for the modality boxes."
    )


def read(dataset: SomethingSomething) -> Manifest:
    """Read the annotations and find the media.

    Raises:
        ManifestError: an annotation file is missing or faulty; file and entry are named.
    """
    folder, listing = dataset.annotations, Listing()
    templates = _templates(_file(folder, listing, "labels"))
    reader = _VideoReader(dataset, templates, index_boxes(dataset.boxes))
    clips: list[tuple[str, Clip]] = []
    left_out: list[str] = []
    notes = []
    for split in dict.fromkeys(dataset.splits):
        path = _file(folder, listing, _FILES[split])
        entries: list[Any] = annotations.read_json(path, list, "annotation file")
        items = [(f"entry {i}", entry) for i, entry in enumerate(entries, 1)]
        some = annotations.collect(path, items, partial(reader.clip, split=split), left_out)
        clips += [(f"{path.name} {where}", clip) for where, clip in some]
        labelled = any(clip.labels[HEAD] != UNKNOWN for _, clip in some)
        without = "" if labelled else ", without labels"
        notes.append(f"{split}: {counted(len(some), 'clip')}{without}")
    names = tuple(sorted(templates, key=templates.__getitem__))
    kept = unique(folder, clips, left_out)
    lines = (*notes, *reader.lines())
    return Manifest(kept, {HEAD: names}, notes=lines, left_out=tuple(left_out))


def _file(folder: Path, listing: Listing, name: str) -> Path:
    old, new = f"something-something-v2-{name}.json", f"{name}.json"
    return listing.first(folder, (old, new)) or folder / old


def _templates(path: Path) -> dict[str, int]:
    """Return template to id; the ids must be 0, 1, 2, ..."""
    table = annotations.read_json(path, dict, "label list")
    ids = {}
    for template, number in table.items():
        if not isinstance(number, str | int) or not _ID.fullmatch(str(number)):
            raise ManifestError(f"{path}: {template!r}: the id {number!r:.40} is not a number.")
        ids[template] = int(number)
    if sorted(ids.values()) != list(range(len(ids))) or not ids:
        raise ManifestError(f"{path}: the ids of the {len(ids)} templates are not 0, 1, 2, ....")
    return ids


@dataclass
class _VideoReader:
    """Turns entries into clips, and counts what was found of them."""

    dataset: SomethingSomething
    templates: Mapping[str, int]
    boxes: Mapping[str, BoxSource]
    listing: Listing = field(default_factory=Listing)
    counts: SourceCounts = field(default_factory=SourceCounts)

    def clip(self, entry: Any, split: SomethingSplit) -> Clip:
        video = annotations.field(entry, "id", str)
        if not _ID.fullmatch(video):
            raise ValueError(f"id={video!r:.60}: must be a string of digits")
        rgb = self._media(video)
        media: dict[str, Source] = {"rgb": rgb, "flow": rgb}
        if self.dataset.boxes:
            there = self.boxes.get(video)
            self.counts.add(
                "boxes", MISSING if there is None else "annotated", self.dataset.boxes[0]
            )
            if there is not None:
                media["boxes"] = there
        return Clip(video, media, 0.0, None, {HEAD: self._label(entry)}, split)

    def _label(self, entry: Any) -> int:
        template = annotations.field(entry, "template", str, "")
        if not template:
            return UNKNOWN
        name = template.replace("[", "").replace("]", "")
        if name not in self.templates:
            raise ValueError(f"template={template!r:.90}: is not in the label list")
        return self.templates[name]

    def _media(self, video: str) -> Source:
        root, prefer = self.dataset.root, self.dataset.prefer
        path = folder = None
        if prefer != "frames":
            names = (f"{f}{video}{suffix}" for f in _FOLDERS for suffix in _SUFFIXES)
            path = self.listing.first(root, names)
            path = path or self.listing.video(root, (f"{f}{video}" for f in _FOLDERS))
        if path is None and prefer != "video":
            folder = self.listing.first(root, (f"{f}{video}" for f in _FOLDERS), folder=True)
        if path is not None:
            self.counts.add("rgb", "as video files", path)
            return FileSource(path)
        if folder is None and prefer != "frames":
            path = root / f"{video}.webm"
            self.counts.add("rgb", MISSING, path)
            return FileSource(path)
        self.counts.add(
            "rgb", MISSING if folder is None else "as frames in a folder", folder or root / video
        )
        name = self.dataset.frame_name.replace("{video}", video)
        return FrameSource(folder or root / video, (name,), self.dataset.frame_fps)

    def lines(self) -> Sequence[str]:
        return [*self.counts.lines(), "audio: not part of this data set"]


# How a video's entry begins: inside of one no key is a number. Quotes in texts are escaped.
_ENTRY = re.compile(rb'"([0-9]{1,9})"\s*:\s*(?=\[)')


def index_boxes(paths: Sequence[Path]) -> dict[str, BoxSource]:
    """Return the box source of every video in the files; of two for one video the later counts.

    Raises:
        ManifestError: a file cannot be read or has no such entries.
    """
    boxes: dict[str, BoxSource] = {}
    for path in paths:
        boxes |= _scan(path)
    return boxes


def _scan(path: Path) -> dict[str, BoxSource]:
    try:
        # Gigabytes of JSON are searched through a mapping and never parsed: an index costs seconds
        # and no memory, and each clip later reads its own entry alone.
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            begins = [(m.group(1).decode(), m.start(), m.end()) for m in _ENTRY.finditer(data)]
            size = len(data)
    except OSError as error:
        raise ManifestError(f"{path}: the boxes cannot be read ({error.strerror}).") from None
    except ValueError:
        raise ManifestError(f"{path}: the file of boxes is empty.") from None
    if not begins:
        raise ManifestError(
            f'{path}: not a Something-Else annotation file: no entry of the form "VIDEO ID": '
            "[frames]."
        )
    ends = [start for _, start, _ in begins[1:]] + [size]
    return {
        video: BoxSource(path, video, (start, end))
        for (video, _, start), end in zip(begins, ends, strict=True)
    }
