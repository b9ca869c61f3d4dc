"""What a store holds and where it came from, plain enough to print."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from karmma_pipeline import config
from karmma_pipeline.errors import counted
from karmma_pipeline.jobs import StopFlag
from karmma_pipeline.modalities import Reason
from karmma_pipeline.store.reader import FeatureStore
from karmma_pipeline.store.spec import ClipNumbers
from karmma_pipeline.store.tools.rewrite import read_encoded


def info(root: Path) -> dict[str, Any]:
    """Return what a store holds."""
    store = FeatureStore.open(root)
    reasons = np.asarray(store.reasons)
    modalities = {}
    for column, m in enumerate(store.modalities):
        one = store.spec.modalities[m]
        counts = Counter(reasons[:, column].tolist())
        modalities[m] = {
            "tokens": one.tokens,
            "width": one.width,
            "dtype": one.dtype,
            "present": counts.pop(int(Reason.PRESENT), 0),
            "absent": {Reason(code).label: n for code, n in sorted(counts.items())},
            "provenance": one.provenance,
            "computed": one.computed,
        }
    size = sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
    return {
        "store": str(root),
        "clips": len(store),
        "splits": dict(Counter(store.split.tolist())),
        "heads": {head: len(names) for head, names in store.heads.items()},
        "megabytes": round(size / 1e6, 1),
        "digest": store.digest,
        "modalities": modalities,
    }


_CLIPS = 64
_SHOWN = 5


def diff(one: Path, other: Path, stop: StopFlag | None = None) -> Iterator[str]:
    """Yield the differences of two stores, one line each; nothing if they hold the same.

    Clips meet by id; their order does not count, their bytes do. Where types or shapes of a
    modality differ, its tokens are compared as numbers if the shapes allow.
    """
    a, b = FeatureStore.open(one), FeatureStore.open(other)
    left_spec, right_spec = (store.spec.model_dump(mode="json") for store in (a, b))
    for difference in sorted(config.differences(left_spec, right_spec, "spec"), key=str):
        yield difference.said(f"in {one}", f"in {other}")
    places = [{i: n for n, i in enumerate(s.clip_ids.tolist())} for s in (a, b)]
    for mine, theirs, name in ((places[0], places[1], one), (places[1], places[0], other)):
        only = [i.decode() for i in mine if i not in theirs]
        if only:
            yield f"clips: {len(only)} only in {name}: {_some(only)}"
    shared = [i for i in places[0] if i in places[1]]
    left = np.array([places[0][i] for i in shared], np.int64)
    right = np.array([places[1][i] for i in shared], np.int64)
    yield from _columns(a, b, left, right)
    for m in a.modalities:
        if m in b.modalities:
            yield from _tokens(a, b, m, left, right, stop or StopFlag(resumes=False))


def _columns(
    a: FeatureStore, b: FeatureStore, left: ClipNumbers, right: ClipNumbers
) -> Iterator[str]:
    def column(name: str, mine: npt.NDArray[Any], theirs: npt.NDArray[Any]) -> Iterator[str]:
        mine, theirs = mine[left], theirs[right]
        same = mine == theirs
        if mine.dtype.kind == "f":
            same |= np.isnan(mine) & np.isnan(theirs)
        if not same.all():
            first = int(np.flatnonzero(~same)[0])
            yield (
                f"{name}: different in {counted(int((~same).sum()), 'clip')}, first "
                f"{a.clip_ids[left[first]].decode()}: {mine[first]} and {theirs[first]}"
            )

    for head in a.heads:
        if head in b.heads:
            names = [np.array([*s.heads[head], "?"], np.str_)[s.labels[head]] for s in (a, b)]
            yield from column(f"label {head}", *names)
    yield from column("split", a.split, b.split)
    yield from column("group", a.group, b.group)
    for seconds in ("start_s", "stop_s"):
        yield from column(seconds, a.seconds(seconds), b.seconds(seconds))
    for m in a.modalities:
        if m in b.modalities:
            mine, theirs = (np.asarray(s.reasons)[:, s.modalities.index(m)] for s in (a, b))
            yield from column(f"{m}: reason", mine, theirs)


def _tokens(
    a: FeatureStore, b: FeatureStore, m: str, left: ClipNumbers, right: ClipNumbers, stop: StopFlag
) -> Iterator[str]:
    if a.shape(m) != b.shape(m):
        return
    count, first, largest = 0, "", 0.0
    specs = [s.specs[m] for s in (a, b)]
    exact = specs[0].dtype == specs[1].dtype
    for start in range(0, len(left), _CLIPS):
        stop.check("nothing was changed")
        piece = slice(start, start + _CLIPS)
        read = (read_encoded(a, m, left[piece]), read_encoded(b, m, right[piece]))
        for place, (mine, theirs) in enumerate(zip(*read, strict=True)):
            if exact and all(np.array_equal(x, y) for x, y in zip(mine, theirs, strict=True)):
                continue
            values = [spec.decode(of) for spec, of in zip(specs, (mine, theirs), strict=True)]
            distance = float(np.abs(values[0] - values[1]).max())
            if exact or distance:
                count, largest = count + 1, max(largest, distance)
                first = first or a.clip_ids[left[start + place]].decode()
    if count:
        clips = counted(count, "clip")
        yield f"{m}: tokens of {clips} differ by up to {largest:.3g}, first {first}"


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
