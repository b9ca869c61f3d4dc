"""What an HDF5 file of a store may not do: point at storage outside itself.

Our reader never follows an HDF5 header: it maps fixed offsets. Others read the same files with
h5py, for whom external storage, links and virtual datasets can hand out any file of the user.
"""

from collections.abc import Iterator
from pathlib import Path

import h5py

from karmma_pipeline.store.format import layout
from karmma_pipeline.store.spec import StoredArray, StoreSpec


def shard_faults(path: Path, array: StoredArray, rows: int) -> Iterator[str]:
    """Yield what is wrong with a shard as an HDF5 file: it holds one plain dataset."""
    try:
        with h5py.File(path, "r", locking=False) as file:
            if list(file) != [array.name]:
                yield f"the HDF5 file contains {sorted(file)}, not [{array.name!r}]"
                return
            yield from _faults(file, array.name)
            dataset = file[array.name]
            if isinstance(dataset, h5py.Dataset):
                if dataset.shape != (rows, array.width) or dataset.dtype != array.dtype:
                    yield f"the HDF5 dataset is {dataset.dtype} {dataset.shape}"
                elif dataset.id.get_offset() != layout.PAYLOAD_OFFSET:
                    yield f"the HDF5 dataset has the offset {dataset.id.get_offset()}"
    except (OSError, KeyError, RuntimeError) as error:
        yield f"truncated or not an HDF5 file ({error})"


def index_faults(path: Path, spec: StoreSpec, shards: int) -> Iterator[str]:
    """Yield what is wrong with the HDF5 view: virtual datasets may name the shards alone."""
    allowed = {
        f"{m}/{array.name}": {
            str(layout.shard_file(Path(), m, s, array.name)) for s in range(shards)
        }
        for m, array in spec.arrays
    }
    try:
        with h5py.File(path, "r", locking=False) as file:
            for group in file:
                yield from _faults(file, group)
                if not isinstance(file.get(group, getlink=True), h5py.HardLink):
                    continue
                for name in file[group]:
                    yield from _faults(file, f"{group}/{name}", allowed.get(f"{group}/{name}"))
    except (OSError, KeyError, RuntimeError) as error:
        yield f"truncated or not an HDF5 file ({error})"


def _faults(file: h5py.File, name: str, sources: set[str] | None = None) -> Iterator[str]:
    # The link itself, not what it leads to: opening a hostile one would already follow it.
    link = file.get(name, getlink=True)
    if not isinstance(link, h5py.HardLink):
        yield f"{name} is an HDF5 {type(link).__name__}, which may refer to any file"
        return
    dataset = file[name]
    if not isinstance(dataset, h5py.Dataset):
        return
    if dataset.external:
        yield f"{name} has HDF5 external storage: {dataset.external[0][0]!r}"
    if dataset.is_virtual:
        named = {source.file_name for source in dataset.virtual_sources()}
        outside = sorted(named - (sources or set()))
        if outside:
            yield f"{name} is a virtual dataset over {outside[0]!r}"
