"""What stopped and killed runs left in a store, and files that are not the store's."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from karmma_pipeline.data.store import layout
from karmma_pipeline.data.store.catalog import Catalog
from karmma_pipeline.data.store.check import foreign_files
from karmma_pipeline.data.store.writer import lock_holder


@dataclass(frozen=True)
class Garbage:
    """Something that may go: what it is, where, how large."""

    path: Path
    what: str
    size: int

    def __str__(self) -> str:
        return f"{self.path}: {self.what}, {self.size / 1e6:.1f} MB"


def garbage(root: Path) -> Iterator[Garbage]:
    """Yield what may be taken away: temporary files, spools of committed shards, foreign files.

    Spools that an extraction will go on with, and whatever a living process writes, stay.
    """
    catalog = Catalog(root)
    spools = root / layout.SPOOL
    committed = catalog.committed()
    listed: set[Path] = set()
    for folder in sorted(spools.glob("*")) if spools.is_dir() else []:
        number = int(folder.name) if folder.name.isdecimal() else -1
        if folder.is_dir() and not folder.is_symlink() and not lock_holder(folder / "lock"):
            if number in committed or not 0 <= number < catalog.shards:
                listed.add(folder)
                yield Garbage(folder, "spool of a shard that is done", _size(folder))
        elif lock_holder(folder / "lock"):
            listed.add(folder)
    alive = any(lock_holder(path) for path in spools.glob("*/lock"))
    for path, name in foreign_files(catalog):
        if any(folder in path.parents for folder in listed):
            continue
        temporary = path.name.startswith(".") and path.suffix == ".tmp"
        if temporary and alive:
            continue  # a living writer's, perhaps
        what = "left over from a stopped run" if temporary else f"foreign file {name}"
        yield Garbage(path, what, path.lstat().st_size)


def collect(found: list[Garbage]) -> None:
    """Take it away."""
    for one in found:
        if one.path.is_dir() and not one.path.is_symlink():
            shutil.rmtree(one.path)
        else:
            one.path.unlink(missing_ok=True)


def _size(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*"))
