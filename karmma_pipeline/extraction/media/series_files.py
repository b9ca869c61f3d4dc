"""Series of samples from the files in which people keep them, whatever their kind.

CSV and text, NPY and NPZ, MAT (version 5, and 7.3, which is HDF5), HDF5, Parquet. No reader runs
code from a file or follows a link out of it. S samples, C channels.
"""

import csv
import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from karmma_pipeline.data.manifest import NOT_KNOWN
from karmma_pipeline.data.sensors import Column, Sensor
from karmma_pipeline.extraction.media.interface import MediaFaultError, first_line
from karmma_pipeline.modalities import Reason

Values = npt.NDArray[np.float64]
Array = npt.NDArray[Any]

# Bytes that an array may claim: an hour of 100 channels at 1 kHz is 3 GB.
_MOST_BYTES = 8 << 30

#: Classes of MATLAB that are plain numbers.
_NUMERIC = {"double", "single", *(f"{u}int{b}" for u in ("", "u") for b in (8, 16, 32, 64))}

_SEPARATORS = (",", ";", "\t")
_PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}


@dataclass(frozen=True)
class _Columns:
    """What a file offers: how many columns, their names if they have some, and their values.

    take: numbers of columns to float64 [S, columns].
    others: arrays beside it that may hold the time stamps.
    """

    count: int
    names: Sequence[str]
    take: Callable[[Sequence[int]], Values]
    others: Mapping[str, Array]


def read_series_file(path: Path, sensor: Sensor) -> tuple[Values, Values | None]:
    """Read the channels of a sensor and, if the file has some, their time stamps.

    Returns:
        float64 [S, C], and float64 [S] in the file's own unit (seconds where it states one).

    Raises:
        MediaFaultError: the file is missing or damaged, or it lacks a column.
    """
    if not path.is_file():
        raise MediaFaultError(Reason.FILE_MISSING, str(path))
    try:
        columns = _OPENERS[path.suffix.lower()](path, sensor)
        return _chosen(path, columns, sensor)
    except (MediaFaultError, MemoryError):
        raise
    # Readers of damaged files raise whatever their parsing runs into.
    except Exception as error:
        detail = f"{path}: {first_line(error)}"
        raise MediaFaultError(Reason.DECODE_ERROR, detail) from None


def _chosen(path: Path, columns: _Columns, sensor: Sensor) -> tuple[Values, Values | None]:
    time = sensor.time
    apart = columns.others.get(time) if isinstance(time, str) else None
    at = None if time is None or apart is not None else _place(path, columns, time)
    if isinstance(sensor.channels, int):
        wanted = [i for i in range(columns.count) if i != at]
        if len(wanted) != sensor.channels:
            raise _lacks(path, f"has {len(wanted)} channels, not {sensor.channels}")
    else:
        wanted = [_place(path, columns, column) for column in sensor.channels]
    table = columns.take(wanted if at is None else [*wanted, at])
    values, stamps = table[:, : len(wanted)], None if at is None else table[:, -1]
    if apart is not None:
        stamps = np.asarray(apart, np.float64).ravel()
        if len(stamps) != len(values):
            raise _lacks(path, f"{time!r} has {len(stamps)} times for {len(values)} samples")
    return values, stamps


def _place(path: Path, columns: _Columns, column: Column) -> int:
    if isinstance(column, int):
        if column >= columns.count:
            raise _lacks(path, f"has {columns.count} columns, no column {column}")
        return column
    names = list(columns.names)
    if names.count(column) != 1:
        known = [*names, *columns.others]
        near = difflib.get_close_matches(column, known, n=1)
        hint = f"did you mean {near[0]!r}" if near else f"it has {', '.join(known) or 'no names'}"
        why = "several columns" if column in names else "no column"
        raise _lacks(path, f"{why} {column!r}; {hint}"[:250])
    return names.index(column)


def _lacks(path: Path, what: str) -> MediaFaultError:
    return MediaFaultError(Reason.NO_CHANNEL, f"{path}: {what}")


def _text(path: Path, _: Sensor) -> _Columns:
    """Open a CSV, or a text whose cells stand apart; a first line of words names the columns."""
    lines = path.read_text(encoding="utf-8-sig").splitlines()
    first = next((i for i, line in enumerate(lines) if line.strip() and line[0] != "#"), None)
    if first is None:
        raise MediaFaultError(Reason.TOO_SHORT, f"{path}: no samples")
    separator = next((s for s in _SEPARATORS if s in lines[first]), None)
    cells = (
        next(csv.reader([lines[first]], delimiter=separator)) if separator else lines[first].split()
    )
    cells = [cell.strip() for cell in cells]
    names = cells if any(_is_word(cell) for cell in cells) else []
    rows = [line for line in lines[first + bool(names) :] if line.strip()]

    def take(wanted: Sequence[int]) -> Values:
        if not rows:
            raise MediaFaultError(Reason.TOO_SHORT, f"{path}: no samples")
        options: dict[str, Any] = {"delimiter": separator, "usecols": wanted, "ndmin": 2}
        try:
            return np.loadtxt(rows, quotechar='"', **options)
        except ValueError:  # much slower, but empty cells and NA are no faults
            return np.loadtxt(rows, quotechar='"', converters=_number, **options)

    return _Columns(len(cells), names, take, {})


def _is_word(cell: str) -> bool:
    try:
        _number(cell)
    except ValueError:
        return True
    return False


def _number(cell: str) -> float:
    return float("nan") if cell.strip() in NOT_KNOWN else float(cell)


def _npy(path: Path, sensor: Sensor) -> _Columns:
    return _of_array(path, np.load(path, mmap_mode="r", allow_pickle=False), sensor, {})


def _npz(path: Path, sensor: Sensor) -> _Columns:
    with np.load(path, allow_pickle=False) as file:
        return _among(path, {name: file[name] for name in _wanted(file.files, sensor)}, sensor)


def _mat(path: Path, sensor: Sensor) -> _Columns:
    if h5py.is_hdf5(path):
        return _hdf5(path, sensor)
    from scipy import io  # half a second, for those who need it

    # Nothing else can be a series. A damaged header may still end this process: crashed.
    numeric = [name for name, _, kind in io.whosmat(path) if kind in _NUMERIC]
    names = _wanted(numeric, sensor)
    arrays = io.loadmat(path, variable_names=names)
    return _among(path, {name: arrays[name] for name in names}, sensor)


def _wanted(names: Sequence[str], sensor: Sensor) -> list[str]:
    """Return which of a file's arrays are read: those that the sensor names, or all."""
    named = {sensor.variable, sensor.time}
    return [name for name in names if sensor.variable is None or name in named]


def _hdf5(path: Path, sensor: Sensor) -> _Columns:
    with h5py.File(path, "r", locking=False) as file:
        names = [name for name in (sensor.variable, sensor.time) if isinstance(name, str)]
        if sensor.variable is None:
            names += [name for name in file if _is_dataset(file, name)]
        arrays = {name: _loaded(file, path, name) for name in dict.fromkeys(names)}
    return _among(path, arrays, sensor)


def _is_dataset(file: h5py.File, name: str) -> bool:
    hard = isinstance(file.get(name, getlink=True), h5py.HardLink)
    return hard and isinstance(file[name], h5py.Dataset)


def _loaded(file: h5py.File, path: Path, name: str) -> Array:
    dataset = plain_dataset(file, path, name, Reason.NO_CHANNEL)
    if dataset.size * dataset.dtype.itemsize > _MOST_BYTES:
        detail = f"{path}: {name!r}: has an implausible number of values, {dataset.size:,}"
        raise MediaFaultError(Reason.UNSAFE_FILE, detail)
    # MATLAB's axes run the other way round.
    return dataset[()].T if "MATLAB_class" in dataset.attrs else dataset[()]


def plain_dataset(
    file: h5py.File, path: Path, key: str, missing: Reason = Reason.NO_STREAM
) -> h5py.Dataset:
    """Return a dataset that lies in this very file.

    Raises:
        MediaFaultError: there is none, for which ``missing`` is the reason, or it would be read
            from another file.
    """
    # Step by step, as each may be a link into another file, which h5py would follow silently.
    where, at = f"{path}: {key!r}", file
    for part in key.strip("/").split("/"):
        link = at.get(part, getlink=True) if isinstance(at, h5py.Group) else None
        if link is None:
            raise MediaFaultError(missing, f"{where}: not in the file")
        if not isinstance(link, h5py.HardLink):
            raise MediaFaultError(Reason.UNSAFE_FILE, f"{where}: a link")
        at = at[part]
    if not isinstance(at, h5py.Dataset):
        raise MediaFaultError(missing, f"{where}: a group")
    if at.external or at.is_virtual:
        raise MediaFaultError(Reason.UNSAFE_FILE, f"{where}: stored in another file")
    return at


def _among(path: Path, arrays: Mapping[str, Array], sensor: Sensor) -> _Columns:
    """Choose the array that holds the samples."""
    others = {name: array for name, array in arrays.items() if name == sensor.time}
    if sensor.variable is not None:
        if sensor.variable not in arrays:
            raise _lacks(path, f"no array {sensor.variable!r}")
        return _of_array(path, arrays[sensor.variable], sensor, others)
    usable = {n: a for n, a in arrays.items() if n not in others and _is_table(a)}
    if len(usable) != 1:
        named = ", ".join(usable) or "none"
        raise _lacks(path, f"set variable to one of its arrays: {named}"[:250])
    return _of_array(path, next(iter(usable.values())), sensor, others)


def _is_table(array: Array) -> bool:
    return array.ndim > 0 and array.dtype.kind in "iuf"


def _of_array(path: Path, array: Array, sensor: Sensor, others: Mapping[str, Array]) -> _Columns:
    names = array.dtype.names or ()
    if names and array.ndim == 1:
        fields = [np.asarray(array[name], np.float64) for name in names]
        return _Columns(len(names), names, lambda i: np.stack([fields[k] for k in i], 1), others)
    if not _is_table(array) or not -array.ndim <= sensor.axis < array.ndim:
        raise _lacks(path, f"{array.shape} {array.dtype} is not a numeric array over time")
    rows = np.moveaxis(array, sensor.axis, 0)
    table = np.asarray(rows, np.float64).reshape(len(rows), -1)
    return _Columns(table.shape[1], (), lambda i: table[:, list(i)], others)


def _parquet(path: Path, _: Sensor) -> _Columns:
    from pyarrow import parquet  # an optional dependency

    file = parquet.ParquetFile(path)
    names = file.schema_arrow.names

    def take(wanted: Sequence[int]) -> Values:
        table = file.read(columns=[names[i] for i in wanted])
        return np.stack([_floats(table.column(names[i])) for i in wanted], axis=1)

    return _Columns(len(names), names, take, {})


def _floats(column: Any) -> Values:
    unit = getattr(column.type, "unit", None)  # of moments, which become seconds
    whole = column.cast("int64") if unit else column
    numbers = whole.cast("float64", safe=False).to_numpy(zero_copy_only=False)
    return numbers / _PER_SECOND[unit] if unit else numbers


_OPENERS: dict[str, Callable[[Path, Sensor], _Columns]] = {
    **dict.fromkeys((".csv", ".tsv", ".txt"), _text),
    ".npy": _npy,
    ".npz": _npz,
    ".mat": _mat,
    **dict.fromkeys((".h5", ".hdf5"), _hdf5),
    ".parquet": _parquet,
}
