"""Ego4D's action clips of the forecasting benchmark (FHO, long-term anticipation), from its JSON.

Documentation: https://ego4d-data.org/docs/data/annotations-schemas. Times of an action are
relative to its five-minute clip file; the whole video serves too, with the clip's start added.
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
from karmma_pipeline.data.manifest import UNKNOWN, Clip, Manifest, unique
from karmma_pipeline.data.sources import FileSource, Source
from karmma_pipeline.errors import ManifestError, counted

HEADS = ("verb", "noun")
_FILES = {"train": "train", "val": "val", "test": "test_unannotated"}

Ego4dSplit = Literal["train", "val", "test"]
MediaFolder = Literal["clips", "full_scale", "video_540ss"]


class Ego4dLta(Recipe):
    """Ego4D's FHO actions as its downloader lays them out."""

    kind: Literal["ego4d_fho_lta"] = Field(description="Data set.")
    root: Path = Field(description="Folder of the release (v1 or v2) with clips or full videos.")
    annotations: Path | None = Field(
        None, description="Folder of fho_lta_*.json; null: annotations in root."
    )
    splits: tuple[Ego4dSplit, ...] = Field(
        ("train", "val"), min_length=1, description="Which of train, val and test (without labels)."
    )
    prefer: tuple[MediaFolder, ...] = Field(
        ("clips", "full_scale", "video_540ss"),
        min_length=1,
        description="Folders to search for videos, in this order.",
    )


def read(dataset: Ego4dLta) -> Manifest:
    """Read the annotations and find the media; a clip's id is CLIP_UID_ACTION.

    Raises:
        ManifestError: an annotation file is missing or faulty; file and entry are named.
    """
    folder = dataset.annotations or dataset.root / "annotations"
    heads = _taxonomy(folder / "fho_lta_taxonomy.json")
    left_out: list[str] = []
    reader = _ActionReader(dataset, heads, _videos(dataset.root / "ego4d.json", left_out))
    clips: list[tuple[str, Clip]] = []
    notes = []
    for split in dict.fromkeys(dataset.splits):
        path = folder / f"fho_lta_{_FILES[split]}.json"
        table = annotations.read_json(path, dict, "annotation file")
        entries: list[Any] = annotations.section(path, table, "clips", list)
        items = [(f"clips entry {i}", entry) for i, entry in enumerate(entries, 1)]
        some = annotations.collect(path, items, partial(reader.clip, split=split), left_out)
        clips += [(f"{path.name} {where}", clip) for where, clip in some]
        notes.append(f"{split}: {counted(len(some), 'clip')}")
    lines = (*notes, *reader.counts.lines("clips"), *reader.notes())
    kept = unique(folder, clips, left_out)
    return Manifest(kept, heads, notes=lines, left_out=tuple(left_out))


def _taxonomy(path: Path) -> dict[str, tuple[str, ...]]:
    table = annotations.read_json(path, dict, "taxonomy")
    heads = {}
    for head in HEADS:
        names = table.get(f"{head}s")
        if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
            raise ManifestError(f"{path}: has no list of names '{head}s'.")
        if len(set(names)) < len(names):
            raise ManifestError(f"{path}: duplicate name in '{head}s'.")
        heads[head] = tuple(names)
    return heads


@dataclass(frozen=True)
class _Videos:
    """Videos that ego4d.json says are special.

    silent: without a sound track: recorded mute, or redacted.
    stereo: two views side by side; Ego4D's own features are of the left one.
    """

    silent: frozenset[str] = frozenset()
    stereo: frozenset[str] = frozenset()


def _videos(path: Path, left_out: list[str]) -> _Videos:
    if not path.is_file():
        return _Videos()
    table = annotations.read_json(path, dict, "list of videos")
    entries: list[Any] = annotations.section(path, table, "videos", list)
    items = [(f"videos entry {i}", entry) for i, entry in enumerate(entries, 1)]
    facts = [fact for _, fact in annotations.collect(path, items, _video, left_out)]
    return _Videos(
        frozenset(uid for uid, silent, _ in facts if silent),
        frozenset(uid for uid, _, stereo in facts if stereo),
    )


def _video(entry: Any) -> tuple[str, bool, bool]:
    facts = annotations.field(entry, "video_metadata", dict, {})
    silent = facts.get("audio_base_denominator", 1) is None
    stereo = annotations.field(entry, "is_stereo", bool, False)
    return annotations.field(entry, "video_uid", str), silent, stereo


@dataclass
class _ActionReader:
    """Turns entries into clips, and counts what was found of them."""

    dataset: Ego4dLta
    heads: Mapping[str, tuple[str, ...]]
    videos: _Videos
    listing: Listing = field(default_factory=Listing)
    counts: SourceCounts = field(default_factory=SourceCounts)
    stereo: int = 0

    def notes(self) -> list[str]:
        """Say how many clips are halves of pictures."""
        if not self.stereo:
            return []
        return [f"clips in side-by-side stereo, of which the left half is used: {self.stereo:,}"]

    def clip(self, entry: Any, split: Ego4dSplit) -> Clip:
        video, clip = (
            annotations.safe_name(key, annotations.field(entry, key, str))
            for key in ("video_uid", "clip_uid")
        )
        start_s = annotations.field(entry, "action_clip_start_sec", float)
        stop_s = annotations.field(entry, "action_clip_end_sec", float)
        if stop_s <= start_s:
            raise ValueError(f"action_clip_end_sec={stop_s}: is not after {start_s}")
        source, offset_s = self._media(video, clip, entry)
        media: dict[str, Source] = {"rgb": source, "flow": source}
        if video not in self.videos.silent:
            media["audio"] = source
        labels = {head: self._label(entry, head) for head in HEADS}
        clip_id = f"{clip}_{annotations.field(entry, 'action_idx', int)}"
        return Clip(
            files.check_name(clip_id),
            media,
            start_s + offset_s,
            stop_s + offset_s,
            labels,
            split,
            video,
        )

    def _media(self, video: str, clip: str, entry: Any) -> tuple[FileSource, float]:
        root, left_half = self.dataset.root, video in self.videos.stereo
        self.stereo += left_half
        for place in self.dataset.prefer:
            path = self.listing.video(root, [f"{place}/{clip if place == 'clips' else video}"])
            if path is not None:
                self.counts.add("rgb", f"in {place}", path)
                return FileSource(path, left_half=left_half), self._offset(place, entry)
        place = self.dataset.prefer[0]
        path = root / f"{place}/{clip if place == 'clips' else video}.mp4"
        self.counts.add("rgb", MISSING, path)
        return FileSource(path, left_half=left_half), self._offset(place, entry)

    @staticmethod
    def _offset(place: MediaFolder, entry: Any) -> float:
        return 0.0 if place == "clips" else annotations.field(entry, "clip_parent_start_sec", float)

    def _label(self, entry: Any, head: str) -> int:
        number = annotations.field(entry, f"{head}_label", int, UNKNOWN)
        if not UNKNOWN <= number < len(self.heads[head]):
            raise ValueError(
                f"{head}_label={number}: the taxonomy has {len(self.heads[head])} classes"
            )
        return number
