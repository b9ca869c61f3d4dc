"""Annotation files: CSV tables and JSON, with precise error messages.

A fault is said with its file, its line (or entry) and its column, the first ten at once.
"""

import csv
import difflib
import io
import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from karmma_pipeline import files
from karmma_pipeline.errors import ManifestError, one_line

T = TypeVar("T")
S = TypeVar("S")

# Faults that one message names.
_SHOWN = 10

_CLOCK = re.compile(r"(?:(\d{1,6}):)?(\d{1,6}):(\d{1,2}(?:\.\d{1,9})?)", re.ASCII)
_WHOLE = re.compile(r"(\d{1,9})(?:\.0*)?", re.ASCII)  # 3.0 too, as tables with empty cells have it
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,3})?", re.ASCII)
# What other kinds of files begin with.
_OTHERS = {
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
    b"PK\x03\x04": "an Excel workbook",
    b"\xd0\xcf\x11\xe0": "an old Excel workbook",
    b"\x1f\x8b": "compressed with gzip",
    b"SQLite format": "a database",
}


def parse_number(text: str) -> float:
    """Return a number as people write it; ValueError for what only Python reads, such as 1_0."""
    value = float(text) if _NUMBER.fullmatch(text) else math.nan
    if not math.isfinite(value):
        raise ValueError(text)
    return value


def parse_time(text: str) -> float:
    """Return seconds from ``12.5`` or ``[HH:]MM:SS.ff`` with any number of decimals.

    Raises:
        ValueError: the text is no finite time from 0 on, or a clock shows 60 seconds or, beside
            hours, 60 minutes.
    """
    clock = _CLOCK.fullmatch(text.strip())
    if clock:
        hours, minutes, seconds = clock.groups()
        if float(seconds) >= 60 or (hours and int(minutes) >= 60):
            raise ValueError(text)
        return int(hours or 0) * 3600 + int(minutes) * 60 + float(seconds)
    value = parse_number(text.strip())
    if value < 0:
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
            raise ValueError(f"{column}={text!r}: does not match {pattern.pattern}")
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
                f"{column}={text!r}: must be seconds >= 0, or HH:MM:SS.ff with minutes and "
                "seconds below 60; decimals after a point"
            ) from None

    def whole(self, column: str) -> int | None:
        """Return a whole number of at most nine digits, None for an empty cell."""
        text = self.get(column)
        if not text:
            return None
        found = _WHOLE.fullmatch(text)
        if not found:
            raise ValueError(f"{column}={text!r}: must be a non-negative integer")
        return int(found[1])

    def span(self, start: str, stop: str) -> tuple[float, float | None]:
        """Return start and stop in seconds, the stop after the start or None."""
        start_s, stop_s = self.time(start) or 0.0, self.time(stop)
        if stop_s is not None and stop_s <= start_s:
            raise ValueError(f"{stop}={self[stop]!r} is not after {start}={self.get(start)!r}")
        return start_s, stop_s


def read_table(path: Path, required: Iterable[str], what: str = "manifest") -> list[Row]:
    """Read a UTF-8 CSV file whose first line names the columns; cells are stripped.

    Commas separate the cells, or semicolons or tabs if the first line is written with them. Empty
    lines are skipped, and empty cells after the last column. A column without a name is called
    ``(column 1)``, or left out if it is empty.

    Raises:
        ManifestError: it cannot be read, lacks a required column, or a line has another
            number of cells than the first.
    """
    text = _text(path, what)
    required = tuple(required)
    first = text.partition("\n")[0]
    separators = [
        s for s in ",;\t" if not set(required) - {c.strip(' "\r') for c in first.split(s)}
    ]
    lines = _lines(path, text, separators[0] if separators else ",")
    columns = next(lines, (1, []))[1]
    missing = [c for c in required if c not in columns]
    if missing:
        plain = {c.casefold(): c for c in columns}
        near = (difflib.get_close_matches(c.casefold(), plain, n=1) for c in missing)
        hint = "".join(
            f"; rename {plain[n[0]]!r} to {c}" for c, n in zip(missing, near, strict=True) if n
        )
        if len(columns) == 1:
            hint = ", separated by commas, semicolons or tabs"
        raise ManifestError(
            f"{path}: no column {' and '.join(missing)}; the first line must name the columns, "
            f"but is {','.join(columns)[:300]!r}{hint}."
        )
    named = [c for c in columns if c]
    if len(set(named)) < len(named):
        raise ManifestError(f"{path}: duplicate column name in {','.join(columns)[:300]!r}.")
    return _rows(path, columns, lines)


def _rows(path: Path, columns: list[str], lines: Iterable[tuple[int, list[str]]]) -> list[Row]:
    names = [column or f"(column {place})" for place, column in enumerate(columns, 1)]
    rows = []
    for line, cells in lines:
        if any(cells[len(names) :]) or len(cells) < len(names):
            raise ManifestError(
                f"{path}: line {line}: {len(cells)} cells, but {len(columns)} columns in the "
                "header; quote cells that contain a comma."
            )
        rows.append(Row(line, dict(zip(names, cells, strict=False))))
    unused = [n for n in set(names) - set(columns) if not any(row[n] for row in rows)]
    for row in rows:
        for name in unused:
            del row.cells[name]
    return rows


def _text(path: Path, what: str) -> str:
    try:
        data = path.read_bytes()
        kind = next((name for mark, name in _OTHERS.items() if data.startswith(mark)), "")
        # Of UTF-16 without its mark, and of some databases, every byte is UTF-8.
        if kind or b"\0" in data[:4096]:
            raise ManifestError(
                f"{path}: line 1: not a UTF-8 CSV file ({kind or 'it contains NUL bytes'}); "
                "save it as CSV UTF-8."
            )
        return data.decode("utf-8-sig")
    except OSError as error:
        raise _unreadable(path, what, error) from None
    except UnicodeDecodeError as error:
        line, start = data.count(b"\n", 0, error.start) + 1, data.rfind(b"\n", 0, error.start) + 1
        cell = data.count(b",", start, error.start) + 1
        raise ManifestError(
            f"{path}: line {line}: not a UTF-8 CSV file (cell {cell} is not UTF-8); "
            "save it as CSV UTF-8."
        ) from None


def _lines(path: Path, text: str, separator: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the number and the stripped cells of every line that is not empty."""
    table = io.StringIO(text, newline="")
    reader = csv.reader(table, delimiter=separator, strict=True, skipinitialspace=True)
    columns: list[str] = []
    while True:
        line = reader.line_num + 1
        try:
            cells = [cell.strip() for cell in next(reader)]
        except StopIteration:
            return
        except csv.Error as error:
            # A quote that nobody closes swallows all lines up to the next one: the fault lies
            # where it opens, and not where the reader gives up.
            place = _whole_cells(re.split(r"\r\n|\n|\r", text)[line - 1], separator)
            where = columns[place] if place < len(columns) else f"cell {place + 1}"
            raise ManifestError(
                f"{path}: line {line}: {where}: a quote is not closed, or is closed before the "
                f"end of the cell ({error}); quote the whole cell and double quotes inside it."
            ) from None
        columns = columns or cells
        if any(cells):
            yield line, cells


def _whole_cells(line: str, separator: str) -> int:
    """Return how many cells of a line are well-formed before the first that is not."""
    cell = re.compile(f' *(?:"(?:[^"]|"")*"|(?!")[^{separator}]*){separator}')
    count, at = 0, 0
    while found := cell.match(line, at):
        count, at = count + 1, found.end()
    return count


def _unreadable(path: Path, what: str, error: OSError) -> ManifestError:
    reason = f"{error.strerror}{files.looked_in(path)}"
    return ManifestError(f"{path}: the {what} cannot be read ({reason}).")


class _Twice(dict[str, Any]):
    """A JSON object in which a key stands twice: nobody knows which value is meant."""

    keys_twice: tuple[str, ...] = ()


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) == len(pairs):
        return table
    odd = _Twice(table)
    odd.keys_twice = tuple(key for key, n in Counter(key for key, _ in pairs).items() if n > 1)
    return odd


def read_json(path: Path, kind: type[T], what: str) -> T:
    """Read a JSON file whose outermost value is of a kind (dict or list).

    Raises:
        ManifestError: it cannot be read, is no JSON (line and column are named), or is
            another kind of value.
    """
    try:
        value = json.loads(path.read_bytes(), object_pairs_hook=_object)
    except OSError as error:
        raise _unreadable(path, what, error) from None
    except (ValueError, RecursionError) as error:
        reason = one_line(error)
        raise ManifestError(f"{path}: not a JSON file ({reason}).") from None
    if not isinstance(value, kind):
        raise ManifestError(f"{path}: the {what} must be a JSON {_called(kind)}.")
    if isinstance(value, _Twice):
        raise ManifestError(f"{path}: {value.keys_twice[0]!r:.90} appears twice in the {what}.")
    return value


def section(path: Path, table: Mapping[str, Any], key: str, kind: type[T]) -> T:
    """Return ``table[key]`` of a JSON file's outermost object, a list or an object."""
    value = table.get(key)
    if not isinstance(value, kind):
        raise ManifestError(f"{path}: has no {'list' if kind is list else 'object'} {key!r}.")
    return value


def _called(kind: type) -> str:
    names: dict[type, str] = {
        dict: "object",
        list: "array",
        str: "string",
        int: "whole number",
        bool: "true or false",
    }
    return names.get(kind, "number")


def field(entry: Any, key: str, kind: type[T], default: T | None = None) -> T:
    """Return ``entry[key]`` of a JSON object, checked; a default makes it optional.

    Whole numbers pass as float, 3.0 as a whole number, and NaN or infinity never do.

    Raises:
        ValueError: the key is missing, or its value of another kind.
    """
    if not isinstance(entry, dict):
        raise ValueError(f"is not a JSON object: {entry!r:.60}")
    if isinstance(entry, _Twice) and key in entry.keys_twice:
        raise ValueError(f"{key} appears twice")
    value = entry.get(key)
    if value is None:
        if default is None:
            raise ValueError(f"{key} is missing")
        return default
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) < 2**53 else math.inf
    if kind is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{key}={value!r:.60}: must be a JSON {_called(kind)}")
    if isinstance(value, float) and not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{key}={value!r}: must be a number >= 0")
    return value


def look_alike(names: Iterable[str]) -> list[str]:
    """Return which names differ by case, spaces, accents' codes or invisible characters alone."""
    alike: dict[str, list[str]] = {}
    for name in sorted(names):
        plain = unicodedata.normalize("NFKC", name).casefold()
        seen = "".join(c for c in plain if unicodedata.category(c) != "Cf")
        alike.setdefault(" ".join(seen.split()), []).append(name)
    return [" and ".join(map(repr, same)) for same in alike.values() if len(same) > 1]


def collect(
    path: Path,
    items: Iterable[tuple[str, S]],
    read: Callable[[S], T],
    left_out: list[str] | None = None,
) -> list[tuple[str, T]]:
    """Read every item, each with where it stands (``line 7``); all faults become one error.

    Args:
        path: the file that they are from.
        items: each with where it stands.
        read: reads one; ValueError is a fault.
        left_out: faulty items are added here instead, each with its fault: for data sets as
            published, whose users cannot mend a file of somebody else's.

    Raises:
        ManifestError: some items are faulty.
    """
    values: list[tuple[str, T]] = []
    faults: list[str] = []
    for where, item in items:
        try:
            values.append((where, read(item)))
        except ManifestError:  # of another file
            raise
        except ValueError as error:
            faults.append(f"{where}: {error}")
        except OverflowError:
            faults.append(f"{where}: number too large")
    if left_out is None:
        raise_faults(path, faults)
    else:
        left_out += [f"{path}: {fault}" for fault in faults]
    return values


def raise_faults(path: Path, faults: Sequence[str]) -> None:
    """Raise one error that names the first faults, if there are any."""
    if faults:
        more = f"; and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        raise ManifestError(f"{path}: {'; '.join(faults[:_SHOWN])}{more}.")
