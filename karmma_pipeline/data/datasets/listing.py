"""Finds the files of a data set under a folder, and counts what was found."""

import os
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path


class Listing:
    """Contents of folders, each read once: on network disks a look per file takes minutes."""

    def __init__(self) -> None:
        self._names: dict[Path, frozenset[str]] = {}
        self._below: dict[tuple[Path, str], frozenset[str]] = {}

    def names(self, folder: Path) -> frozenset[str]:
        """Return the names in a folder, none if it cannot be read."""
        if folder not in self._names:
            names: frozenset[str] = frozenset()
            with suppress(OSError, ValueError), os.scandir(folder) as entries:
                names = frozenset(entry.name for entry in entries)
            self._names[folder] = names
        return self._names[folder]

    def has(self, path: Path) -> bool:
        """Tell whether something lies at a path."""
        return path.name in self.names(path.parent)

    def first(self, root: Path, candidates: Iterable[str]) -> Path | None:
        """Return the first of the paths, relative to root, at which something lies."""
        for candidate in candidates:
            folder, _, name = candidate.rpartition("/")
            below = self._below.get((root, folder))  # texts: a Path for each costs seconds in all
            if below is None:
                below = self._below[root, folder] = self.names(root / folder)
            if name in below:
                return root / candidate
        return None


class SourceCounts:
    """Counts by modality what kind of source each video has; `lines` says it to people."""

    def __init__(self) -> None:
        self._kinds: dict[str, Counter[str]] = {}
        self._example: dict[tuple[str, str], Path] = {}

    def add(self, modality: str, kind: str, path: Path) -> None:
        """Count one video; kind ``missing`` for one that is not there."""
        self._kinds.setdefault(modality, Counter())[kind] += 1
        self._example.setdefault((modality, kind), path)

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
                    f"{modality}: sources are mixed, and features differ a little between them; "
                    "the recipe's `dataset` can ask for one kind"
                )
        return lines


MISSING = "missing"
