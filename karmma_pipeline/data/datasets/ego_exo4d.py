"""Ego-Exo4D's keysteps from its JSON, seen by the wearer's camera.

Documentation: https://docs.ego-exo4d-data.org/annotations/keystep. Videos of a take share one
clock, on which the segments are given in seconds.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from karmma_pipeline import files
from karmma_pipeline.config import Recipe
from karmma_pipeline.data import annotations
from karmma_pipeline.data.datasets.listing import MISSING, Listing, SourceCounts
from karmma_pipeline.data.manifest import Clip, Manifest, unique
from karmma_pipeline.data.sources import FileSource, Source
from karmma_pipeline.errors import ManifestError

HEAD = "keystep"
# How the RGB video of the wearer's Aria glasses ends; other streams and cameras do not.
_EGO = "_214-1.mp4"

_FOLDERS = {
    "448": "frame_aligned_videos/downscaled/448",
    "full": "frame_aligned_videos",
}

EgoExo4dSplit = Literal["train", "val"]
Size = Literal["448", "full"]


class EgoExo4dKeysteps(Recipe):
    """Ego-Exo4D's keystep segments as its downloader lays them out."""

    kind: Literal["ego_exo4d_keysteps"] = Field(description="Data set.")
    root: Path = Field(description="Folder with takes/ and annotations/.")
    annotations: Path | None = Field(
        None, description="Folder of keystep_*.json; null: annotations in root."
    )
    splits: tuple[EgoExo4dSplit, ...] = Field(
        ("train", "val"), min_length=1, description="Splits to use."
    )
    prefer: tuple[Size, ...] = Field(
        ("448", "full"), min_length=1, description="Video sizes to look for, in this order."
    )


def read(dataset: EgoExo4dKeysteps) -> Manifest:
    """Read the annotations and find the media; a clip's id is TAKE_NAME.SEGMENT.

    Raises:
        ManifestError: an annotation file is missing or faulty; file and take are named.
    """
    folder = dataset.annotations or dataset.root / "annotations"
    tables = {
        split: (
            path := folder / f"keystep_{split}.json",
            annotations.read_json(path, dict, "annotation file"),
        )
        for split in dict.fromkeys(dataset.splits)
    }
    vocabulary: dict[int, str] = {}
    for path, table in tables.values():
        vocabulary |= _vocabulary(path, table)
    ids = {unique_id: number for number, unique_id in enumerate(sorted(vocabulary))}
    reader = _TakeReader(dataset, ids)
    clips: list[tuple[str, Clip]] = []
    left_out: list[str] = []
    notes = []
    for split, (path, table) in tables.items():
        takes: dict[str, Any] = annotations.section(path, table, "annotations", dict)
        items = [(f"take {uid!r:.60}", take) for uid, take in takes.items()]
        some = annotations.collect(path, items, reader.take, left_out)
        segments = [
            (f"{where}: segments entry {number + 1}", (name, source, number, segment))
            for where, (name, source, of) in some
            for number, segment in enumerate(of)
        ]
        kept = annotations.collect(path, segments, partial(reader.clip, split=split), left_out)
        clips += [(f"{path.name} {where}", clip) for where, clip in kept]
        notes.append(f"{split}: {len(kept):,} segments of {len(some):,} takes")
    lines = (*notes, *reader.counts.lines("takes"))
    unequal, names = unique(folder, clips, left_out), _names(vocabulary)
    return Manifest(unequal, {HEAD: names}, notes=lines, left_out=tuple(left_out))


def _vocabulary(path: Path, table: Mapping[str, Any]) -> dict[int, str]:
    """Return the keysteps' unique ids and names; the ids have gaps."""
    words = table.get("vocabulary")
    if not isinstance(words, dict) or not words:
        raise ManifestError(f"{path}: has no object 'vocabulary'.")
    names = {}
    for number, name in words.items():
        if not (
            number.isascii() and number.isdigit() and len(number) < 10 and isinstance(name, str)
        ):
            raise ManifestError(
                f"{path}: vocabulary: {number!r:.40}: {name!r:.40} is not a keystep."
            )
        names[int(number)] = name
    return names


def _names(vocabulary: Mapping[int, str]) -> tuple[str, ...]:
    """Return class names by rising unique id; the id is added to duplicates."""
    names = [vocabulary[number] for number in sorted(vocabulary)]
    twice = {name for name in names if names.count(name) > 1}
    pairs = zip(sorted(vocabulary), names, strict=True)
    return tuple(f"{name} ({number})" if name in twice else name for number, name in pairs)


@dataclass
class _TakeReader:
    """Turns takes into clips, and counts what was found of them."""

    dataset: EgoExo4dKeysteps
    ids: Mapping[int, int]
    listing: Listing = field(default_factory=Listing)
    counts: SourceCounts = field(default_factory=SourceCounts)

    def take(self, take: Any) -> tuple[str, Source | None, list[Any]]:
        """Return a take's name, the source of all its clips, and its segments."""
        name = annotations.safe_name("take_name", annotations.field(take, "take_name", str))
        segments = annotations.field(take, "segments", list, [])
        return name, self._media(name) if segments else None, segments

    def clip(self, item: tuple[str, Source, int, Any], split: EgoExo4dSplit) -> Clip:
        take, source, number, segment = item
        start_s = annotations.field(segment, "start_time", float)
        stop_s = annotations.field(segment, "end_time", float)
        step = annotations.field(segment, "step_unique_id", int)
        if stop_s <= start_s:
            raise ValueError(f"end_time={stop_s}: is not after start_time={start_s}")
        if step not in self.ids:
            raise ValueError(f"step_unique_id={step}: is not in the vocabulary")
        media = dict.fromkeys(("rgb", "flow", "audio"), source)
        clip_id = files.check_name(f"{take}.{number}")
        return Clip(clip_id, media, start_s, stop_s, {HEAD: self.ids[step]}, split, take)

    def _media(self, take: str) -> FileSource:
        root = self.dataset.root
        for size in self.dataset.prefer:
            folder = root / "takes" / take / _FOLDERS[size]
            ego = sorted(n for n in self.listing.names(folder) if n.endswith(_EGO))
            if ego:
                self.counts.add("rgb", f"as {size} video", folder / ego[0])
                return FileSource(folder / ego[0])
        path = root / "takes" / take / _FOLDERS[self.dataset.prefer[0]] / f"aria01{_EGO}"
        self.counts.add("rgb", MISSING, path)
        return FileSource(path)
