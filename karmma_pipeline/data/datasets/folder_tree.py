"""A folder per class with videos in it, below train, val and test folders or split by a seed."""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from karmma_pipeline import files
from karmma_pipeline.config import Recipe
from karmma_pipeline.data.datasets.listing import VIDEO_SUFFIXES
from karmma_pipeline.data.manifest import Clip, Manifest, unique
from karmma_pipeline.data.sources import FileSource, Source
from karmma_pipeline.errors import ManifestError, counted

_SPLITS = ("train", "val", "test")
_ALIASES = {"train": "train", "training": "train", "val": "val", "valid": "val"}
_ALIASES |= {"validation": "val", "test": "test", "testing": "test"}
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")
_ID_LENGTH = 90


class FolderTree(Recipe):
    """``root/CLASS/video.mp4``, or ``root/train/CLASS/video.mp4`` and so on."""

    kind: Literal["folder_tree"] = Field(description="Folder layout.")
    root: Path = Field(
        description="Folder with one folder per class, or with train, val and "
        "test folders of these."
    )
    head: str = Field("action", pattern="^[A-Za-z0-9_][A-Za-z0-9_.-]{0,59}$", description="Head.")
    split: dict[Literal["train", "val", "test"], float] = Field(
        {"train": 0.8, "val": 0.2},
        description="Share of each split, if there are no train, val and test folders. The "
        "split of a video depends only on the seed and its path, so it does not change when "
        "videos are added.",
    )
    seed: int = Field(0, description="Seed of the random split.")

    @model_validator(mode="after")
    def _shares(self) -> Self:
        if (
            not self.split
            or min(self.split.values()) < 0
            or abs(sum(self.split.values()) - 1) > 1e-9
        ):
            raise ValueError("the shares must be non-negative and sum to 1")
        return self


def read(dataset: FolderTree) -> Manifest:
    """List the videos of a tree, sorted by path.

    Raises:
        ManifestError: the folder cannot be read or holds no class folder with videos.
    """
    root = dataset.root
    tops = _folders(root)
    splits = {name: _ALIASES[name.lower()] for name in tops if name.lower() in _ALIASES}
    if splits and len(splits) < len(tops):
        stray = next(name for name in tops if name not in splits)
        raise ManifestError(
            f"{root}: has the split folder {next(iter(splits))!r} next to the folder {stray!r}; "
            "put either all classes or none into split folders."
        )
    places = (
        [(c, f"{s}/{c}", split) for s, split in splits.items() for c in _folders(root / s)]
        if splits
        else [(name, name, "") for name in tops]
    )
    other: dict[str, list[str]] = {}
    videos = [(place, video) for place in places for video in _videos(root, place[1], other)]
    names = tuple(sorted({name for (name, _, _), _ in videos}))
    ids = {name: number for number, name in enumerate(names)}
    stems = Counter(_stem(video).casefold() for _, video in videos)
    clips = []
    for (name, _, split), relative in videos:
        source: Source = FileSource(root / relative)
        clip = Clip(
            _clip_id(relative, alone=stems[_stem(relative).casefold()] == 1),
            dict.fromkeys(("rgb", "flow", "audio"), source),
            0.0,
            None,
            {dataset.head: ids[name]},
            split or _drawn(dataset, relative),
        )
        clips.append((relative, clip))
    if not clips:
        raise ManifestError(
            f"{root}: no videos in class folders; known extensions: "
            f"{' '.join(sorted(VIDEO_SUFFIXES))}."
        )
    how = "by folder" if splits else f"drawn with seed {dataset.seed}"
    found = f"{counted(len(clips), 'video')} in {counted(len(names), 'class', 'classes')}"
    notes = [f"{found}, split {how}"]
    empty = sorted({name for name, _, _ in places} - {*names})
    if empty:
        notes.append(f"folders without videos, ignored: {', '.join(empty)}")
    for suffix, files_of in sorted(other.items()):
        ending = f"with the extension {suffix}" if suffix else "without an extension"
        notes.append(f"files {ending} are ignored: {len(files_of):,} (such as {files_of[0]})")
    return Manifest(unique(root, clips), {dataset.head: names}, notes=tuple(notes))


def _folders(root: Path) -> list[str]:
    try:
        with os.scandir(root) as entries:
            return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))
    except OSError as error:
        raise ManifestError(f"{root}: the folder cannot be read ({error.strerror}).") from None


def _videos(root: Path, folder: str, other: dict[str, list[str]]) -> Iterator[str]:
    """Yield the videos below a class folder, relative to root; links below it are not followed.

    Other files are added to ``other`` by their suffix.
    """
    for place, folders, names in os.walk(root / folder):
        folders.sort()
        below = Path(place).relative_to(root)
        for name in sorted(names):
            if name.startswith("."):
                continue
            suffix = Path(name).suffix.lower()
            if suffix in VIDEO_SUFFIXES:
                yield str(below / name)
            else:
                other.setdefault(suffix, []).append(str(below / name))


def _stem(relative: str) -> str:
    plain = relative.replace(os.sep, ".")
    return plain[: -len(Path(plain).suffix)]


def _clip_id(relative: str, *, alone: bool) -> str:
    """Return an id made of the path; where that is not safe or unique, a digest makes it so."""
    stem = _stem(relative)
    safe = _UNSAFE.sub("_", stem).lstrip(".-")[:_ID_LENGTH]
    if safe != stem or not alone:
        digest = hashlib.sha256(relative.encode(errors="surrogateescape")).hexdigest()
        safe = f"{safe or 'clip'}-{digest[:8]}"
    return files.check_name(safe)


def _drawn(dataset: FolderTree, relative: str) -> str:
    key = f"{dataset.seed}/{relative}".encode(errors="surrogateescape")
    # A hash and no generator: a video keeps its split when others come or go.
    draw = int.from_bytes(hashlib.sha256(key).digest()[:8], "big") / 2**64
    for split in _SPLITS:
        draw -= dataset.split.get(split, 0.0)  # type: ignore[call-overload]
        if draw < 0:
            return split
    return max(dataset.split, key=dataset.split.__getitem__)
