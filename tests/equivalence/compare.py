"""Compares what two programs wrote, file by file, and says in a line what differs."""

import json
from collections.abc import Iterator, Set
from fnmatch import fnmatch
from hashlib import sha256
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import yaml
from equivalence.rules import LEFT, name_of, normalised
from safetensors.numpy import load

_SHOWN = 4
"""Differences inside a file that are named."""


def compare(old: Path, new: Path, where: str, killed: bool = False) -> list[str]:
    """Return how a folder that the new program wrote differs from the old one's.

    Args:
        old: folder in which the old program worked.
        new: the same of the new one.
        where: the folder inside both.
        killed: the old program was killed in ``new``, and the new one went on.
    """
    was, now = _files(old, where), _files(new, where)
    lines = [f"{name}: missing" for name in _tops(was.keys() - now)]
    lines += [f"{name}: was not there before" for name in _tops(now.keys() - was)]
    for name in sorted(was.keys() & now):
        if was[name].is_dir() or now[name].is_dir():
            if was[name].is_dir() != now[name].is_dir():
                lines.append(f"{name}: folder and file")
            continue
        before, after = was[name].read_bytes(), now[name].read_bytes()
        if _digest(before) != _digest(after):
            before, after = (normalised(name, data, killed) for data in (before, after))
            if _digest(before) != _digest(after):
                lines.append(f"{name}: {'; '.join(_said(name, before, after))}")
    return lines


def count(folder: Path, where: str) -> int:
    """Return how many files lie in a folder."""
    return sum(path.is_file() for path in _files(folder, where).values())


def _files(folder: Path, where: str) -> dict[str, Path]:
    names = {str(path.relative_to(folder)): path for path in (folder / where).rglob("*")}
    kept = {n: p for n, p in names.items() if not any(fnmatch(n, left) for left in LEFT)}
    return {name_of(name): path for name, path in kept.items()}


def _tops(names: Set[str]) -> list[str]:
    """Return names in order; of a whole folder its own name, with the number of what is in it."""
    tops = [n for n in sorted(names) if not any(str(p) in names for p in PurePath(n).parents)]
    inside = {top: sum(name.startswith(f"{top}/") for name in names) for top in tops}
    return [f"{top} and {n} in it" if n else top for top, n in inside.items()]


def _digest(data: bytes) -> bytes:
    return sha256(data).digest()


def _said(name: str, before: bytes, after: bytes) -> list[str]:
    """Say what differs, as well as the kind of file allows."""
    try:
        return (list(_of_tree(name, before, after)) or ["order or spelling"])[:_SHOWN]
    except (ValueError, KeyError, TypeError, yaml.YAMLError):
        at = next(
            (i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b),
            min(len(before), len(after)),
        )
        here = slice(at, at + 12)
        return [
            f"{len(before)} and {len(after)} bytes, from byte {at}",
            f"{before[here]!r} and {after[here]!r}",
        ]


def _of_tree(name: str, before: bytes, after: bytes) -> Iterator[str]:
    if name.endswith(".safetensors"):
        yield from _of_tensors(load(before), load(after))
    elif name.endswith((".json", ".yaml")):
        yield from _of_values(yaml.safe_load(before), yaml.safe_load(after), "")
    elif name.endswith(".jsonl"):
        was, now = ([json.loads(line) for line in d.splitlines() if line] for d in (before, after))
        yield from _of_values(was, now, "")
    else:
        raise ValueError(name)


def _of_values(before: Any, after: Any, path: str) -> Iterator[str]:
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        before, after = dict(enumerate(before)), dict(enumerate(after))
    if isinstance(before, dict) and isinstance(after, dict):
        for key in dict.fromkeys([*before, *after]):
            missing = "nothing"
            yield from _of_values(
                before.get(key, missing), after.get(key, missing), f"{path}.{key}"
            )
    elif before != after:
        yield f"{path.lstrip('.')} was {_short(before)} and is {_short(after)}"


def _of_tensors(before: dict[str, Any], after: dict[str, Any]) -> Iterator[str]:
    for key in dict.fromkeys([*before, *after]):
        was, now = before.get(key), after.get(key)
        if was is None or now is None or was.shape != now.shape or was.dtype != now.dtype:
            yield f"tensor {key} is another one"
        elif was.tobytes() != now.tobytes():
            largest = np.abs(was.astype(np.float64) - now.astype(np.float64)).max()
            yield f"tensor {key} differs by up to {largest:.3g}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 80 else f"{text[:77]}..."
