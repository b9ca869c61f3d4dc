"""Annotation files as people publish them: CSV tables and JSON, read with every fault named.

A fault is said with its file, its line (or entry) and its column, the first ten at once.
"""

import csv
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from karmma_pipeline import files
from karmma_pipeline.errors import ManifestError

T = TypeVar("T")
S = TypeVar("S")

# Faults that one message names.
_SHOWN = 10

_CLOCK = re.compile(r"(?:(\d{1,6}):)?(\d{1,6}):(\d{1,2}(?:\.\d{1,9})?)", re.ASCII)
_WHOLE = re.compile(r"\d{1,9}", re.ASCII)


def parse_time(text: str) -> float:
    """Return seconds from ``12.5`` or ``[HH:]MM:SS.ff`` with any number of decimals.

    Raises:
        ValueError: the text is no finite time from 0 on.
    """
    clock = _CLOCK.fullmatch(text.strip())
    if clock:
        hours, minutes, seconds = clock.groups()
        return int(hours or 0) * 3600 + int(minutes) * 60 + float(seconds)
    value = float(text)
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(text)
    return value


def safe_name(key: str, text: str) -> str:
    """Return the text if it is safe as a file name; ValueError with its key if not."""
    try:
        return files.check_name(text)
    except ValueError as error:
        raise ValueError(f"{key}={text!r:.60}: {error}") from None


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a table; its readers raise ValueError with the column and its value."""

    line: int
    cells: dict[str, str]

    def __contains__(self, column: str) -> bool:
        return column in self.cells

    def __getitem__(self, column: str) -> str:
        return self.cells[column]

    def get(self, column: str) -> str:
        """Return a cell, empty where the table has no such column."""
        return self.cells.get(column, "")

    def name(self, column: str, pattern: re.Pattern[str] | None = None) -> str:
        """Return a cell that is safe as a file name and, if given, fits a pattern."""
        text = self.cells[column]
        if pattern is not None and not pattern.fullmatch(text):
            raise ValueError(f"{column}={text!r}: not of the form {pattern.pattern}")
        return safe_name(column, text)

    def time(self, column: str) -> float | None:
        """Return seconds, None for an empty cell."""
        text = self.get(column)
        if not text:
            return None
        try:
            return parse_time(text)
        except ValueError:
            raise ValueError(
                f"{column}={text!r}: write seconds from 0 on, or HH:MM:SS.ff"
            ) from None

    def whole(self, column: str) -> int | None:
        """Return a whole number of at most nine digits, None for an empty cell."""
        text = self.get(column)
        if not text:
            return None
        if not _WHOLE.fullmatch(text):
            raise ValueError(f"{column}={text!r}: write a whole number from 0 on")
        return int(text)

    def span(self, start: str, stop: str) -> tuple[float, float | None]:
        """Return start and stop in seconds, the stop after the start or None."""
        start_s, stop_s = self.time(start) or 0.0, self.time(stop)
        if stop_s is not None and stop_s <= start_s:
            raise ValueError(f"{stop}={self[stop]!r} is not after {start}={self.get(start)!r}")
        return start_s, stop_s


def read_table(path: Path, required: Iterable[str], what: str = "manifest") -> list[Row]:
    """Read a UTF-8 CSV file whose first line names the columns; cells are stripped.

    Raises:
        ManifestError: it cannot be read, lacks a required column, or a line has another
            number of cells than the first.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = _rows(path, csv.reader(file, strict=True), required)
    except OSError as error:
        raise ManifestError(f"{path}: the {what} cannot be read ({error.strerror}).") from None
    except (UnicodeDecodeError, csv.Error, ValueError) as error:
        if isinstance(error, ManifestError):
            raise
        raise ManifestError(f"{path}: not a UTF-8 CSV file ({error}).") from None
    return rows


def _rows(path: Path, reader: Any, required: Iterable[str]) -> list[Row]:
    columns = [cell.strip() for cell in next(reader, [])]
    missing = [c for c in required if c not in columns]
    if missing:
        raise ManifestError(
            f"{path}: no column {' and '.join(missing)}; the first line must name "
            f"the columns, it reads {','.join(columns)[:300]!r}."
        )
    if len(set(columns)) < len(columns):
        raise ManifestError(f"{path}: duplicate column name in {','.join(columns)[:300]!r}.")
    rows = []
    for cells in reader:
        if not cells:
            continue
        if len(cells) != len(columns):
            raise ManifestError(
                f"{path}: line {reader.line_num}: has {len(cells)} cells, the first "
                f"line has {len(columns)}; quote cells that hold a comma."
            )
        rows.append(
            Row(reader.line_num, {c: x.strip() for c, x in zip(columns, cells, strict=True)})
        )
    return rows


def read_json(path: Path, kind: type[T], what: str) -> T:
    """Read a JSON file whose outermost value is of a kind (dict or list).

    Raises:
        ManifestError: it cannot be read, is no JSON (line and column are named), or is
            another kind of value.
    """
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise ManifestError(f"{path}: the {what} cannot be read ({error.strerror}).") from None
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ManifestError(f"{path}: not a JSON file ({reason}).") from None
    if not isinstance(value, kind):
        raise ManifestError(f"{path}: the {what} must be a JSON {_called(kind)}.")
    return value


def section(path: Path, table: Mapping[str, Any], key: str, kind: type[T]) -> T:
    """Return ``table[key]`` of a JSON file's outermost object, a list or an object."""
    value = table.get(key)
    if not isinstance(value, kind):
        raise ManifestError(f"{path}: has no {'list' if kind is list else 'object'} {key!r}.")
    return value


def _called(kind: type) -> str:
    names = {dict: "object", list: "array", str: "string", bool: "true or false"}
    return names.get(kind, "number")


def field(entry: Any, key: str, kind: type[T], default: T | None = None) -> T:
    """Return ``entry[key]`` of a JSON object, checked; a default makes it optional.

    Whole numbers pass as float, and NaN or infinity never do.

    Raises:
        ValueError: the key is missing, or its value of another kind.
    """
    if not isinstance(entry, dict):
        raise ValueError(f"is no JSON object but {entry!r:.60}")
    value = entry.get(key)
    if value is None:
        if default is None:
            raise ValueError(f"{key} is missing")
        return default
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) < 2**53 else math.inf
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{key}={value!r:.60}: must be a JSON {_called(kind)}")
    if isinstance(value, float) and not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{key}={value!r}: must be a number from 0 on")
    return value


def collect(
    path: Path, items: Iterable[tuple[str, S]], read: Callable[[S], T]
) -> list[tuple[str, T]]:
    """Read every item, each with where it stands (``line 7``); all faults become one error.

    Raises:
        ManifestError: some items are faulty.
    """
    values: list[tuple[str, T]] = []
    faults: list[str] = []
    for where, item in items:
        try:
            values.append((where, read(item)))
        except ValueError as error:
            faults.append(f"{where}: {error}")
        except OverflowError:
            faults.append(f"{where}: a number is too large")
    raise_faults(path, faults)
    return values


def raise_faults(path: Path, faults: Sequence[str]) -> None:
    """Raise one error that names the first faults, if there are any."""
    if faults:
        more = f"; and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        raise ManifestError(f"{path}: {'; '.join(faults[:_SHOWN])}{more}.")
