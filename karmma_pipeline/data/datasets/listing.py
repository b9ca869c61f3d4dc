"""Finds the files of a data set under a folder, and counts what was found."""

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from karmma_pipeline import files

#: How video files end, in lower case: those of the containers that FFmpeg reads.
VIDEO_SUFFIXES = frozenset(
    {".mp4", ".m4v", ".mov", ".qt", ".3gp", ".3g2", ".mj2", ".f4v", ".mkv", ".mk3d", ".webm"}
    | {".avi", ".divx", ".mpg", ".mpeg", ".mpe", ".m1v", ".m2v", ".vob", ".ts", ".mts", ".m2t"}
    | {".m2ts", ".wmv", ".asf", ".flv", ".ogv", ".ogm", ".rm", ".rmvb", ".mxf", ".dv", ".nut"}
)

PICTURE_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"))


class Listing:
    """Contents of folders, each read once: on network disks a look per file takes minutes."""

    def __init__(self) -> None:
        self._names: dict[Path, Mapping[str, bool]] = {}
        self._below: dict[tuple[Path, str], Mapping[str, bool]] = {}
        self._stems: dict[Path, dict[str, list[str]]] = {}

    def names(self, folder: Path) -> Mapping[str, bool]:
        """Return the names in a folder, and whether each is one; none if it cannot be read."""
        if folder not in self._names:
            names: dict[str, bool] = {}
            with suppress(OSError, ValueError), os.scandir(folder) as entries:
                names = {entry.name: entry.is_dir() for entry in entries}
            self._names[folder] = names
        return self._names[folder]

    def has(self, path: Path) -> bool:
        """Tell whether something lies at a path."""
        return path.name in self.names(path.parent)

    def first(self, root: Path, candidates: Iterable[str], *, folder: bool = False) -> Path | None:
        """Return the first of the paths, relative to root, at which a file or a folder lies."""
        for candidate in candidates:
            place, _, name = candidate.rpartition("/")
            below = self._below.get((root, place))  # texts: a Path for each costs seconds in all
            if below is None:
                below = self._below[root, place] = self.names(root / place)
            if below.get(name) is folder:
                return root / candidate
        return None

    def video(self, root: Path, candidates: Iterable[str]) -> Path | None:
        """Return the first of some paths without suffix at which a video lies.

        Whatever its suffix, and in upper or lower case; the first by name if there are several.
        """
        for candidate in candidates:
            place, _, stem = candidate.rpartition("/")
            for name in self._alike(root / place, stem):
                is_folder = self._names[root / place][name]
                if not is_folder and Path(name).suffix.lower() in VIDEO_SUFFIXES:
                    return root / place / name
        return None

    def _alike(self, folder: Path, stem: str) -> list[str]:
        """Return the names in a folder that differ in case and ending at most."""
        if folder not in self._stems:
            stems = self._stems[folder] = {}
            for name in sorted(self.names(folder)):
                stems.setdefault(Path(name).stem.casefold(), []).append(name)
        return self._stems[folder].get(stem.casefold(), [])

    def beside(self, path: Path) -> str:
        """Say what lies where a file is missing; empty if there is nothing like it."""
        folder = path.parent
        if not os.access(above := files.existing(folder), os.R_OK | os.X_OK):
            return f"no permission to read {above}"
        if os.path.islink(path):  # noqa: PTH114  (that of a Path raises below closed folders)
            return f"a link to {path.readlink()}, which does not exist"
        alike = self._alike(path.parent, path.stem)
        if "\\" in path.name and path.name not in alike:
            return "separate folders by /, not by a backslash"
        if self.names(path.parent).get(path.name):
            return "it is a folder, not a file"
        if alike and path.name not in alike:
            return f"did you mean {alike[0]}?"
        there = bool(self.names(folder)) or files.exists(folder)
        return "" if there else f"no such folder: {folder}"


def missing(path: Path) -> str:
    """Return a missing file's path for people, with what lies in its place."""
    folder = path.parent
    hint = _listed(folder, folder.stat().st_mtime_ns if files.exists(folder) else 0).beside(path)
    return f"{path}: {hint}" if hint else str(path)


@lru_cache(maxsize=16)
def _listed(_folder: Path, _changed_ns: int) -> Listing:
    return Listing()


class SourceCounts:
    """Counts by modality what kind of source each video has; `lines` says it to people."""

    def __init__(self) -> None:
        self._kinds: dict[str, Counter[str]] = {}
        self._example: dict[tuple[str, str], str] = {}

    def add(self, modality: str, kind: str, path: Path, hint: str = "") -> None:
        """Count one video; kind ``missing`` for one that is not there, and what is, if anything."""
        self._kinds.setdefault(modality, Counter())[kind] += 1
        self._example.setdefault((modality, kind), f"{path}; {hint}" if hint else str(path))

    def lines(self, what: str = "videos") -> list[str]:
        """Return a sentence per modality, and a warning where kinds are mixed."""
        lines = []
        for modality, kinds in self._kinds.items():
            total = kinds.total()
            parts = [
                f"{n:,} of {total:,} {what} {kind} (such as {self._example[modality, kind]})"
                for kind, n in kinds.most_common()
            ]
            lines.append(f"{modality}: " + "; ".join(parts))
            there = [kind for kind in kinds if kind != MISSING]
            if len(there) > 1:
                lines.append(
                    f"{modality}: sources of several kinds are mixed, and their features differ "
                    "slightly; select one kind under `dataset` in the recipe"
                )
        return lines


MISSING = "missing"
