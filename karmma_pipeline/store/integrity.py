"""Whether every byte of a store is as it was written, and which shards must be made again."""

import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

import numpy as np

from karmma_pipeline import files, locks
from karmma_pipeline.errors import StoreError
from karmma_pipeline.jobs import StopFlag
from karmma_pipeline.logs import progress_bar
from karmma_pipeline.store.catalog import Catalog, described_files
from karmma_pipeline.store.finalize import digested_files
from karmma_pipeline.store.format import layout
from karmma_pipeline.store.format.hdf5_safety import index_faults, shard_faults
from karmma_pipeline.store.format.layout import Record, crc32c, shard_index
from karmma_pipeline.store.spec import StoredArray

_PIECE = 4 << 20

# Types on disk: as what unsigned number their bits are read, and the bits of the exponent.
_EXPONENTS = {
    "float16": ("<u2", 0x7C00),
    "bfloat16": ("<u2", 0x7F80),
    "float32": ("<u4", 0x7F800000),
}


@dataclass(frozen=True)
class Damage:
    """A damaged place and the clips that it costs.

    shard is -1 where a file of the whole store is damaged; ``path`` is relative to the store.
    """

    shard: int
    modality: str
    what: str
    clip_ids: tuple[str, ...] = ()
    path: str = ""

    def __str__(self) -> str:
        clips = f": {', '.join(self.clip_ids)}" if self.clip_ids else ""
        place = f"shard {self.shard} {self.modality}" if self.shard >= 0 else self.path
        return f"{place}: {self.what}{clips}"


def verify(root: Path, stop: StopFlag | None = None) -> list[Damage]:
    """Return every damage of a store; none if it is whole.

    Raises:
        StoreError: it cannot even be opened.
        StoppedError: a stop was asked for.
    """
    catalog = Catalog(root)
    records: list[int] = []
    damages: list[Damage] = []
    try:
        manifest = layout.read_manifest(root)
        records = manifest["records"]
        damages += _check_files(catalog, manifest["files"])
    except StoreError as error:
        damages.append(Damage(-1, "all", str(error), path=layout.MANIFEST))
    for shard in progress_bar(range(catalog.shards), "verify", unit="shard"):
        (stop or StopFlag(resumes=False)).check("nothing was changed")
        damages += _check_shard(catalog, shard, records[shard] if shard < len(records) else None)
    return damages + list(_foreign(catalog))


def repair(root: Path, damages: list[Damage]) -> list[str]:
    """Take away what is damaged, so that `karmma extract` with the same recipe makes it anew.

    Returns what was done, one line each. Other shards and foreign files are left alone.
    """
    catalog = Catalog(root)
    shards = sorted({d.shard for d in damages if d.shard >= 0})
    ours = {*described_files(catalog.spec), *digested_files(catalog.spec), layout.MANIFEST}
    mine = [d.path for d in damages if d.shard < 0 and d.path in ours]
    lines = []
    if shards or mine:
        (root / layout.MANIFEST).unlink(missing_ok=True)  # first: the store is incomplete now
    for shard in shards:
        # Its files have the clips that are not made again.
        if layout.former_record(root, shard).is_file():
            lines.append(f"shard {shard}: is being rebuilt; `karmma extract` will resume it")
            continue
        layout.record_file(root, shard).unlink(missing_ok=True)
        for m, array in catalog.spec.arrays:
            layout.shard_file(root, m, shard, array.name).unlink(missing_ok=True)
        lines.append(f"shard {shard}: removed")
    for name in mine:
        if name == layout.SPEC:
            lines.append(f"{name}: cannot be rebuilt; restore it from a copy of the store")
        else:
            (root / name).unlink(missing_ok=True)
            lines.append(f"{name}: removed")
    return lines


def _check_files(catalog: Catalog, digests: dict[str, str]) -> Iterator[Damage]:
    if set(digests) != set(digested_files(catalog.spec)):
        yield Damage(
            -1, "all", "does not list exactly the files of this store", path=layout.MANIFEST
        )
        return
    for name, digest in digests.items():
        try:
            os.close(layout.open_inside(catalog.root, catalog.root / name))
            if files.sha256(catalog.root / name) != digest:
                yield Damage(-1, "all", "checksum mismatch", path=name)
            elif name == layout.INDEX:
                for fault in index_faults(catalog.root / name, catalog.spec, catalog.shards):
                    yield Damage(-1, "all", fault, path=name)
        except FileNotFoundError:
            yield Damage(-1, "all", "the file is missing", path=name)
        except StoreError:
            yield Damage(-1, "all", "is a link or not a regular file", path=name)


def _check_shard(catalog: Catalog, shard: int, checksum: int | None) -> Iterator[Damage]:
    path, clips = layout.record_file(catalog.root, shard), tuple(catalog.clips_in(shard))
    try:
        data = layout.read_bytes(catalog.root, path)
        record = catalog.parse_record(shard, data)
    except (OSError, StoreError) as error:
        missing = isinstance(error, FileNotFoundError)
        what = f"{path}: the commit record is missing" if missing else str(error)
        yield Damage(shard, "all", what, clips)
        return
    if checksum is not None and crc32c(data) != checksum:
        yield Damage(shard, "all", f"{path}: the commit record does not match the manifest", clips)
        return
    for number, (m, array) in enumerate(catalog.spec.arrays):
        column = catalog.spec.order.index(m)
        yield from _check_array(catalog, shard, record, column, array, int(record.files[number]))


def _check_array(
    catalog: Catalog, shard: int, record: Record, column: int, array: StoredArray, checksum: int
) -> Iterator[Damage]:
    m, size = catalog.spec.order[column], catalog.spec.clips_per_shard
    present = np.flatnonzero(record.present(column))
    clips = catalog.clips_in(shard)
    every = tuple(clips[i] for i in present)
    path = layout.shard_file(catalog.root, m, shard, array.name)
    try:
        descriptor = layout.open_inside(catalog.root, path)
    except FileNotFoundError:
        yield Damage(shard, m, "the file is missing", every)
        return
    except StoreError:
        yield Damage(shard, m, "the file is a link or not a regular file", every)
        return
    with os.fdopen(descriptor, "rb") as file:
        if os.fstat(file.fileno()).st_size != layout.file_bytes(array, size, len(present)):
            yield Damage(shard, m, "the file has the wrong size", every)
            return
        crc = 0
        while data := file.read(_PIECE):
            crc = crc32c(data, crc)
        # The bytes are as they were written, but whoever wrote them may mean harm: the HDF5 headers
        # are looked at too, with h5py, and only now.
        if crc == checksum:
            faults = shard_faults(path, array, layout.file_rows(array, size, len(present)))
            yield from (Damage(shard, m, fault, every) for fault in faults)
            bad = [every[i] for i in _non_finite(file, catalog, m, array, len(every))]
            if bad:
                yield Damage(shard, m, "NaN or infinity in the tokens", tuple(bad))
            return
        file.seek(0)
        head = file.read(layout.PAYLOAD_OFFSET)
    try:
        yield from _locate(catalog, shard, record, column, array, head)
    except FileNotFoundError:  # the array beside it, reported by itself
        yield Damage(shard, m, "checksum mismatch", every)


def _non_finite(
    file: BufferedReader, catalog: Catalog, modality: str, array: StoredArray, clips: int
) -> Iterator[int]:
    """Yield which of the stored clips hold a number that is NaN or infinite.

    Both have all bits of the exponent set, which is far quicker to look for than to make
    numbers of what is stored. Our writer refuses them; other programs and copies need not.
    """
    dtype = "float16" if array.name == "scale" else catalog.spec.modalities[modality].dtype
    if dtype not in _EXPONENTS:
        return
    word, exponent = _EXPONENTS[dtype]
    file.seek(layout.PAYLOAD_OFFSET)
    for number in range(clips):
        bits = np.frombuffer(file.read(array.clip_bytes), word)
        if int((bits & bits.dtype.type(exponent)).max(initial=0)) == exponent:
            yield number


def _locate(
    catalog: Catalog, shard: int, record: Record, column: int, array: StoredArray, head: bytes
) -> Iterator[Damage]:
    """Say where a shard's file differs: in which clips, or around them."""
    m, one = catalog.spec.order[column], catalog.spec.modalities[catalog.spec.order[column]]
    present = np.flatnonzero(record.present(column))
    clips, located = catalog.clips_in(shard), False
    with ExitStack() as stack:
        opened = []
        for other in one.arrays:
            path = layout.shard_file(catalog.root, m, shard, other.name)
            opened.append((stack.enter_context(path.open("rb")), other.clip_bytes))
            opened[-1][0].seek(layout.PAYLOAD_OFFSET)
        # A record has one checksum per clip and modality, over all its arrays in their order.
        for position in present:
            crc = 0
            for file, size in opened:
                crc = crc32c(file.read(size), crc)
            if crc != record.crc32c[position, column]:
                located = True
                yield Damage(shard, m, "checksum mismatch", (clips[position],))
    index = shard_index(array, catalog.spec.clips_per_shard, len(present))
    if head[: len(index)] != index:
        yield Damage(shard, m, "the Zarr index is damaged")
    elif not located:
        yield Damage(shard, m, "the HDF5 header or the padding is damaged; the tokens are intact")


def _foreign(catalog: Catalog) -> Iterator[Damage]:
    for path, name in foreign_files(catalog):
        what = (
            "left over from an interrupted run" if files.is_temporary(path) else "unexpected file"
        )
        yield Damage(-1, "all", f"{what}; `karmma store gc` removes it", path=name)


def foreign_files(catalog: Catalog) -> Iterator[tuple[Path, str]]:
    """Yield the files that a store does not have, with their names relative to it."""
    spec, known = catalog.spec, {*digested_files(catalog.spec), layout.MANIFEST}
    prefixes = {f"{m}/{array.name}/c/" for m, array in spec.arrays}
    # An extraction goes on with the spools of shards that are not committed yet.
    waiting = set(range(catalog.shards)) - catalog.committed()
    spools = {str(layout.spool_folder(Path(), shard)) for shard in waiting}
    for folder, folders, names in os.walk(catalog.root):
        links = [f for f in folders if Path(folder, f).is_symlink()]
        for file in sorted([*names, *links]):
            path = Path(folder, file)
            name = str(path.relative_to(catalog.root))
            if name in known or str(Path(name).parent) in spools:
                continue
            if not _is_shard(name, prefixes, catalog.shards):
                yield path, name


def _is_shard(name: str, prefixes: set[str], shards: int) -> bool:
    """Tell whether a name is that of a shard's file or commit record."""
    path = Path(name)
    number = path.stem if path.suffix else path.parent.name
    if not number.isdecimal() or int(number) >= shards:
        return False
    # Compared as a whole name: a copy such as 01 or 1.old beside shard 1 is none of its files.
    shard = int(number)
    names = {f"{prefix}{shard}/0" for prefix in prefixes}
    return name in names | {str(layout.record_file(Path(), shard))}


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
        if folder.is_dir() and not folder.is_symlink() and not locks.holder(folder / "lock"):
            if number in committed or not 0 <= number < catalog.shards:
                listed.add(folder)
                yield Garbage(folder, "temporary file of a finished shard", _size(folder))
        elif locks.holder(folder / "lock"):
            listed.add(folder)
    # A temporary file of another machine cannot be told from one of a dead process: while anybody
    # holds a shard of this store, all of them stay.
    alive = any(locks.holder(path) for path in spools.glob("*/lock"))
    for path, name in foreign_files(catalog):
        if any(folder in path.parents for folder in listed):
            continue
        temporary = files.is_temporary(path)
        if temporary and alive:
            continue  # a living writer's, perhaps
        what = "left over from an interrupted run" if temporary else f"unexpected file {name}"
        yield Garbage(path, what, path.lstat().st_size)


def collect(garbage: list[Garbage]) -> None:
    """Take it away."""
    for one in garbage:
        if one.path.is_dir() and not one.path.is_symlink():
            shutil.rmtree(one.path)
        else:
            one.path.unlink(missing_ok=True)


def _size(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*"))
