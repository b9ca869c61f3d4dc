"""Layout of a store on disk: files, sizes, and the bytes of shards, records and the clip table.

A shard file is a Zarr chunk store and an HDF5 file at once. A column of the clip table is a Zarr
array of one raw chunk, which can be mapped. A commit record says what each clip of a shard has, why
not, when, and checksums; a shard without one does not count. Small files are read as a stranger's:
inside the store only, and never larger than they can rightly be.
"""

import errno
import hashlib
import json
import math
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import google_crc32c
import h5py
import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load, save

from karmma_pipeline import files
from karmma_pipeline.errors import StoreError
from karmma_pipeline.modalities import Reason
from karmma_pipeline.store.spec import ModalitySpec, StoredArray, StoreSpec

FORMAT = "karmma-feature-store"
#: What is written: the second if the list of clips has grown, which decides where shards end; the
#: third if a backbone is cut, so that rows are no tokens; the fourth if more frames lie before it
#: than it takes; the fifth if activations are int8 with a zero point. Other stores can be read by
#: older programs. Who changes what lies in a store writes a newer one, and goes on reading the
#: older.
VERSION, VERSION_GROWN, VERSION_CUT, VERSION_FRAMES, VERSION_AFFINE = 2, 3, 4, 5, 6

_OLDEST = 2
#: Where the tokens start in every shard file: after user block and HDF5 header.
PAYLOAD_OFFSET = 16_384

# HDF5 keeps its headers in 4 to 16 KB behind the user block, whatever its version; the offset is
# fixed, so that a reader needs no header and no hostile header can lead it elsewhere.
USER_BLOCK = 4096
_MAX_CHUNKS = (USER_BLOCK - 4) // 16
_CHUNK_BYTES = 1 << 20
_MAX_JSON = 64 << 20

MANIFEST = "manifest.json"
SPEC = "spec.json"
INDEX = "index.h5"
ROOT = "zarr.json"
CLIPS = "clips"
SPOOL = "spool"


def shard_file(root: Path, modality: str, shard: int, array: str = "tokens") -> Path:
    """Return the file of a shard's array (a Zarr chunk key)."""
    return root / shard_name(modality, shard, array)


def shard_name(modality: str, shard: int, array: str = "tokens") -> str:
    """Return the name of a shard's file inside the store."""
    return f"{modality}/{array}/c/{shard}/0"


def record_file(root: Path, shard: int) -> Path:
    """Return the commit record of a shard: written last, so it means that the shard is whole."""
    return root / "commit" / f"{shard:06d}.safetensors"


def spool_folder(root: Path, shard: int) -> Path:
    """Return where a shard lies while it is being written."""
    return root / SPOOL / f"{shard:06d}"


def former_record(root: Path, shard: int) -> Path:
    """Return where the commit record of a shard lies while clips of it are made again."""
    return spool_folder(root, shard) / "former.safetensors"


def chunk_rows(array: StoredArray, clips_per_shard: int) -> int:
    """Return the token rows of an inner chunk: about 1 MB, at most 255 chunks a shard."""
    # A chunk per clip makes Zarr libraries slow, one per shard makes them read all for one clip.
    wanted = max(1, _CHUNK_BYTES // array.token_bytes)
    return max(
        min(wanted, clips_per_shard * array.tokens),
        math.ceil(clips_per_shard * array.tokens / _MAX_CHUNKS),
    )


def capacity_rows(array: StoredArray, clips_per_shard: int) -> int:
    """Return the token rows that a shard can hold, whole inner chunks."""
    rows = chunk_rows(array, clips_per_shard)
    return math.ceil(clips_per_shard * array.tokens / rows) * rows


def file_rows(array: StoredArray, clips_per_shard: int, clips: int) -> int:
    """Return the token rows in a shard file with that many present clips, zero-padded."""
    rows = chunk_rows(array, clips_per_shard)
    return max(1, math.ceil(clips * array.tokens / rows)) * rows


def file_bytes(array: StoredArray, clips_per_shard: int, clips: int) -> int:
    """Return the size of a shard file."""
    return PAYLOAD_OFFSET + file_rows(array, clips_per_shard, clips) * array.token_bytes


def open_inside(root: Path, path: Path) -> int:
    """Open a regular file of a store for reading, and return its descriptor; see `open_name`."""
    return open_name(os.path.realpath(root), str(path.relative_to(root)))


def open_name(root: str, name: str) -> int:
    """Open a regular file for reading by its name inside a store.

    Names and not paths, since a store may have many thousand files. ``root`` is the store's
    folder without links.

    Raises:
        StoreError: the path leads out of the store by a link, or is no regular file.
        OSError: it is not there.
    """
    # NOFOLLOW refuses a link in place of the file, NONBLOCK keeps a pipe from waiting for a writer.
    # Links among the folders above pass both, so the name of what was opened is read back.
    try:
        descriptor = os.open(
            f"{root}/{name}", os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        )
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise _linked(f"{root}/{name}") from None
        raise
    try:
        real_path = os.readlink(f"/proc/self/fd/{descriptor}")  # noqa: PTH115  (see above)
        if real_path != f"{root}/{name}" or not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise _linked(f"{root}/{name}")
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _linked(path: str) -> StoreError:
    return StoreError(
        f"{path}: is a link or not a regular file; a store contains only regular files."
    )


def read_bytes(root: Path, path: Path) -> bytes:
    """Read a small file of a store whole; see `open_inside`."""
    with os.fdopen(open_inside(root, path), "rb") as file:
        if os.fstat(file.fileno()).st_size > _MAX_JSON:
            raise StoreError(f"{path}: is larger than {_MAX_JSON >> 20} MB, which is implausible.")
        return file.read()


def read_json(root: Path, path: Path) -> dict[str, Any]:
    """Read a JSON object of a store."""
    try:
        value = json.loads(read_bytes(root, path))
    except RecursionError:
        raise ValueError(f"{path}: nested too deep") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: not a JSON object")
    return value


def check_version(path: Path, description: dict[str, Any]) -> None:
    """Refuse what is no store, or one that this program is too old for.

    Args:
        path: of the description, named in errors.
        description: what stands there; without a version it counts as the oldest.

    Raises:
        StoreError: says which versions are read and what to do.
    """
    name, version = description.get("format"), description.get("version", _OLDEST)
    if name != FORMAT or not isinstance(version, int):
        raise StoreError(f"{path}: format {name!r} version {version!r} is not {FORMAT!r}.")
    if version > VERSION_AFFINE:
        raise StoreError(
            f"{path}: written by a newer version (store format {version}; this version reads up "
            f"to {VERSION_AFFINE}); update karmma-pipeline."
        )
    if version < _OLDEST:
        raise StoreError(
            f"{path}: format version {version} was never released; extract the store again."
        )


def write_manifest(root: Path, content: dict[str, Any]) -> None:
    """Write the manifest with its own digest."""
    files.write_json(root / MANIFEST, content | {"self": _digest(content)})


def read_manifest(root: Path) -> dict[str, Any]:
    """Read the manifest; every byte of it is checked.

    Raises:
        StoreError: it is missing or damaged.
    """
    path = root / MANIFEST
    if not path.is_file():
        raise StoreError(
            f"{root}: the store is not complete; run `karmma extract` with the same recipe to "
            "extract what is missing, or `karmma store finalize` if all parts are done."
        )
    try:
        data = read_bytes(root, path)
        manifest = json.loads(data)
        own = manifest.pop("self")
        # Compared as text, too: other spellings of the same JSON have the same digest.
        text = files.json_text(manifest | {"self": own})
        whole = own == _digest(manifest) and data.decode() == text
    except (OSError, KeyError, ValueError, AttributeError, RecursionError) as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(f"{path}: the file is damaged ({error}).") from None
    if not whole:
        raise StoreError(
            f"{path}: the file is damaged; run `karmma store verify --repair`, then `karmma "
            "store finalize` to rebuild it."
        )
    return manifest


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(files.json_text(content).encode()).hexdigest()


_EMPTY = np.uint64(2**64 - 1)
LITTLE = {"name": "bytes", "configuration": {"endian": "little"}}


def crc32c(data: Any, before: int = 0) -> int:
    """Return the CRC-32C (Castagnoli) of bytes, going on from that of the bytes before."""
    return int(google_crc32c.extend(before, bytes(data)))


def shard_index(array: StoredArray, clips_per_shard: int, clips: int) -> bytes:
    """Return the Zarr shard index: (offset, nbytes) per inner chunk, then its crc32c."""
    rows = chunk_rows(array, clips_per_shard)
    size = rows * array.token_bytes
    # Chunks behind the last present clip are "empty" by the standard (all ones), not stored.
    index = np.full((capacity_rows(array, clips_per_shard) // rows, 2), _EMPTY, "<u8")
    used = file_rows(array, clips_per_shard, clips) // rows
    index[:used, 0] = PAYLOAD_OFFSET + size * np.arange(used, dtype=np.uint64)
    index[:used, 1] = size
    data = index.tobytes()
    return data + crc32c(data).to_bytes(4, "little")


def create_shard_file(path: Path, array: StoredArray, clips_per_shard: int, clips: int) -> None:
    """Create a shard file with its index and room for the tokens, which are still undefined."""
    with h5py.File(
        path,
        "w",
        userblock_size=USER_BLOCK,
        libver=("v108", "v110"),
        alignment_threshold=1,
        alignment_interval=4096,
        locking=False,
    ) as file:
        plan = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        # Contiguous and unfiltered, or the tokens could not be mapped. Allocated early and not
        # filled: the writer copies the tokens in behind HDF5's back. No times: equal stores
        # must be equal bytes.
        plan.set_layout(h5py.h5d.CONTIGUOUS)
        plan.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        plan.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
        plan.set_obj_track_times(False)
        rows = file_rows(array, clips_per_shard, clips)
        space = h5py.h5s.create_simple((rows, array.width))
        kind = h5py.h5t.py_create(array.dtype)
        dataset = h5py.h5d.create(file.id, array.name.encode(), kind, space, plan)
        offset = dataset.get_offset()
    if offset != PAYLOAD_OFFSET:
        raise RuntimeError(
            f"HDF5 wrote the tokens at offset {offset}, but the format requires {PAYLOAD_OFFSET}"
        )
    # The user block is written last and past HDF5, which neither reads nor checks it.
    with path.open("r+b") as raw:
        raw.write(shard_index(array, clips_per_shard, clips))


def zarr_group(attributes: dict[str, Any]) -> dict[str, Any]:
    """Return the metadata of a Zarr v3 group."""
    return {"zarr_format": 3, "node_type": "group", "attributes": attributes}


def zarr_shards(
    spec: ModalitySpec, array: StoredArray, clips_per_shard: int, shards: int
) -> dict[str, Any]:
    """Return the Zarr v3 metadata of a sharded array of a modality."""
    rows = capacity_rows(array, clips_per_shard)
    sharding = {
        "name": "sharding_indexed",
        "configuration": {
            "chunk_shape": [chunk_rows(array, clips_per_shard), array.width],
            "codecs": [LITTLE],
            "index_codecs": [LITTLE, {"name": "crc32c"}],
            "index_location": "start",
        },
    }
    return zarr_array(
        [max(1, shards) * rows, array.width],
        [rows, array.width],
        array.dtype,
        [sharding],
        {
            "logical_dtype": spec.dtype if array.name == "tokens" else array.dtype.name,
            "tokens_per_clip": spec.tokens,
        },
    )


def zarr_array(
    shape: list[int], chunk: list[int], dtype: np.dtype[Any], codecs: list[Any], attributes: Any
) -> dict[str, Any]:
    """Return the metadata of a Zarr v3 array."""
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": shape,
        "data_type": "uint8" if dtype == np.bool_ else dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": 0,
        "codecs": codecs,
        "attributes": attributes,
    }


def check_outside(path: Path, here: bool = True) -> None:
    """Refuse to write into a store what is none of its files.

    Args:
        path: folder that is to be written.
        here: it must be no store itself either.

    Raises:
        StoreError: it is, or lies in, a store.
    """
    whole = path.resolve()
    for folder in [whole, *whole.parents] if here else whole.parents:
        if (folder / SPEC).is_file() and (folder / ROOT).is_file():
            raise StoreError(
                f"{path}: is inside the feature store {folder}; choose another folder."
            )


def column_file(root: Path, name: str, dimensions: int) -> Path:
    """Return the raw bytes of a column."""
    return root.joinpath(CLIPS, name, "c", *("0",) * dimensions)


@contextmanager
def column_writer(
    root: Path, name: str, dtype: Any, shape: tuple[int, ...], **attributes: Any
) -> Iterator[BinaryIO]:
    """Yield a file that takes the column's bytes, little-endian, in the order of the clips."""
    kind = np.dtype(dtype)
    chunk = [max(1, side) for side in shape]
    meta = zarr_array(list(shape), chunk, kind, [LITTLE], attributes)
    files.write_json(root / CLIPS / name / "zarr.json", meta)
    path = column_file(root, name, len(shape))
    with files.replacing(path) as temporary, temporary.open("wb") as file:
        yield file


def write_column(root: Path, name: str, values: npt.NDArray[Any], **attributes: Any) -> None:
    """Write a whole column."""
    little = np.ascontiguousarray(values, values.dtype.newbyteorder("<"))
    with column_writer(root, name, values.dtype, values.shape, **attributes) as file:
        file.write(little.tobytes())


def map_column(root: Path, name: str, dtype: Any, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """Map a column read-only.

    Raises:
        OSError: it is missing, or its size is not exactly that of the shape.
        StoreError: it is a link.
    """
    path = column_file(root, name, len(shape))
    size = math.prod(shape) * np.dtype(dtype).itemsize
    with os.fdopen(open_inside(root, path), "rb") as file:
        actual = os.fstat(file.fileno()).st_size
        if actual != size:
            raise OSError(f"{path} has {actual} bytes, not {size}")
        if size == 0:  # an empty file cannot be mapped
            return np.zeros(shape, dtype)
        return np.memmap(file, dtype, "r", shape=shape)


@dataclass(frozen=True)
class Record:
    """One row per clip of the shard, in clip order; columns in canonical modality order.

    reason: uint8 [clips, M], 0 is present. crc32c: uint32 [clips, M] of the clip's bytes.
    times: modality to float64 [clips, 2, T], requested and real seconds, NaN where absent.
    files: uint32, CRC-32C of each of the shard's files in the order of `StoreSpec.arrays`.
    """

    reason: npt.NDArray[np.uint8]
    crc32c: npt.NDArray[np.uint32]
    times: Mapping[str, npt.NDArray[np.float64]]
    files: npt.NDArray[np.uint32]

    def to_bytes(self) -> bytes:
        """Serialise; equal records are equal bytes."""
        tensors: dict[str, npt.NDArray[Any]] = {
            "reason": self.reason,
            "crc32c": self.crc32c,
            "files": self.files,
            "self": np.array([crc32c(self.content())], np.uint32),
        }
        tensors |= {f"times.{m}": np.ascontiguousarray(t) for m, t in self.times.items()}
        return save(tensors)

    def content(self, *, with_files: bool = True) -> bytes:
        """Return everything that it says; without the files' checksums, only of the clips."""
        parts: list[npt.NDArray[Any]] = [self.reason, self.crc32c]
        parts += [self.times[m] for m in sorted(self.times)]
        parts += [self.files] if with_files else []
        return b"".join(part.tobytes() for part in parts)

    def present(self, column: int) -> npt.NDArray[np.bool_]:
        """Return which clips have the modality of a column, bool [clips]."""
        return self.reason[:, column] == Reason.PRESENT


def write_record(root: Path, shard: int, record: Record) -> None:
    """Commit a shard: the last write of all."""
    files.write_bytes(record_file(root, shard), record.to_bytes())


def parse_record(path: Path, data: bytes, spec: StoreSpec, clips: int) -> Record:
    """Check the bytes of a record against themselves and the store.

    Args:
        path: named in errors.
        data: the record's bytes.
        spec: of the store.
        clips: of the shard.

    Raises:
        StoreError: it is damaged, or of another shape.
    """
    try:
        tensors = load(data)
        times = {m: tensors[f"times.{m}"] for m in spec.order}
        record = Record(tensors["reason"], tensors["crc32c"], times, tensors["files"])
        own = tensors["self"].tolist()
    except (KeyError, SafetensorError) as error:
        raise _damaged(path, str(error)) from None
    # Shapes before the checksum: a record that fits byte by byte may still be another store's.
    kinds = [t.dtype.name for t in (record.reason, record.crc32c, record.files)]
    fits = (
        kinds == ["uint8", "uint32", "uint32"]
        and record.reason.shape == record.crc32c.shape == (clips, len(spec.order))
        and record.files.shape == (len(spec.arrays),)
        and all(
            t.shape == (clips, 2, spec.modalities[m].frames) and t.dtype == np.float64
            for m, t in times.items()
        )
    )
    if not fits:
        raise StoreError(f"{path}: does not match the store's clips and modalities.")
    if own != [crc32c(record.content())] or record.reason.max(initial=0) > max(Reason):
        raise _damaged(path, "checksum mismatch")
    return record


def _damaged(path: Path, why: str) -> StoreError:
    return StoreError(
        f"{path}: the commit record is damaged ({why}); remove it and extract again; only that "
        "shard is rebuilt."
    )
