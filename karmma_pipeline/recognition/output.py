"""Predictions on disk: predictions.csv, predictions.jsonl, and a page with a timeline.

One row per clip or window, written as soon as it is known: what was recognised until a stop is
there to read.
"""

import csv
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from importlib.resources import files as package_files
from itertools import groupby, pairwise, product
from math import prod
from pathlib import Path
from typing import Any, Self, TextIO

from jinja2 import Environment, StrictUndefined

from karmma_pipeline import files
from karmma_pipeline.errors import KarmmaError, MediaError
from karmma_pipeline.metrics import ACTION
from karmma_pipeline.modalities import NOTHING, Reason, label
from karmma_pipeline.recognition.prediction import DROPPED, Prediction


@dataclass(frozen=True, slots=True)
class Guess:
    """A class and its probability; of the composite, one class per head."""

    name: str
    probability: float


@dataclass(frozen=True, slots=True)
class Row:
    """A prediction in words.

    top: head to its best classes, best first; ``action`` beside several heads; empty if there
        was nothing to see.
    truth: head to the class that the CSV names, where it does.
    """

    clip_id: str
    source: Path
    start_s: float
    stop_s: float | None
    seen: tuple[str, ...]
    reasons: Mapping[str, str]
    top: Mapping[str, tuple[Guess, ...]]
    truth: Mapping[str, str] = field(default_factory=dict)

    def best(self, head: str) -> str:
        """Return the best class of a head, or that there was nothing to see."""
        return self.top[head][0].name if head in self.top else NOTHING

    def shortened(self) -> Self:
        """Return the row with the best class of each head alone, which is what pages draw."""
        return replace(self, top={head: of[:1] for head, of in self.top.items()})

    def sentence(self) -> str:
        """Return the row as a line for people."""
        stop = "" if self.stop_s is None else f"-{self.stop_s:.2f}"
        best = {head: of[0] for head, of in self.top.items()}
        said = ", ".join(f"{head} {of.name} {of.probability:.2f}" for head, of in best.items())
        missing = "".join(f"; no {m}: {why}" for m, why in self.reasons.items())
        return f"{self.source.name} {self.start_s:.2f}{stop} s: {said or NOTHING}{missing}"


def row_of(
    prediction: Prediction,
    count: int,
    truth: Mapping[str, str],
    ends: Mapping[Path, float] | None = None,
) -> Row:
    """Put a prediction into words.

    Args:
        prediction: of a clip.
        count: how many of the best classes are kept.
        truth: head to the class that the clip has.
        ends: of files in seconds, for clips that have none of their own.
    """
    clip = prediction.clip
    top = {
        head: tuple(Guess(*best) for best in prediction.top(head, count))
        for head in prediction.logits
    }
    if len(top) > 1 and ACTION not in top:
        top = {ACTION: _composite([top[head] for head in _spoken(top)], count), **top}
    source = next(iter(clip.media.values())).path
    stop_s = (ends or {}).get(source) if clip.stop_s is None else clip.stop_s
    seen = tuple(m for m, there in prediction.mask.items() if there)
    return Row(clip.clip_id, source, clip.start_s, stop_s, seen, prediction.reasons, top, truth)


def _spoken(heads: Iterable[str]) -> list[str]:
    """Return the heads as people say an action, "take cup": the verb first."""
    return sorted(heads, key=lambda head: head != "verb")


def _composite(heads: Sequence[tuple[Guess, ...]], count: int) -> tuple[Guess, ...]:
    """Return the best combinations, as if heads were independent.

    The best ``count`` of all combinations hold no class that is not among the best ``count`` of
    its own head.
    """
    every = [
        Guess(" ".join(g.name for g in some), prod(g.probability for g in some))
        for some in product(*heads)
    ]
    return tuple(sorted(every, key=lambda guess: -guess.probability)[:count])


class PredictionWriter:
    """Writes rows to ``predictions.csv`` and ``predictions.jsonl``; a context manager.

    Args:
        folder: made if it is not there; earlier predictions in it are replaced.
        heads: columns of the CSV, in this order.
        truth: write the class that the CSV named beside each.
    """

    def __init__(self, folder: Path, heads: Sequence[str], *, truth: bool) -> None:
        self.folder, self._truth = folder, truth
        self._heads = [ACTION, *heads] if len(heads) > 1 and ACTION not in heads else [*heads]
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._csv, self._lines = self._opened("predictions.csv"), self._opened("predictions.jsonl")
        self._table = csv.writer(self._csv, lineterminator="\n")
        names = ["clip_id", "source", "start_s", "stop_s", "seen", "absent"]
        for head in self._heads:
            names += [head, f"{head}_probability", *([f"{head}_true"] if self._truth else [])]
        self._table.writerow(names)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _opened(self, name: str) -> TextIO:
        path = self.folder / name
        return self._stack.enter_context(path.open("w", encoding="utf-8", newline=""))

    def write(self, row: Row) -> None:
        """Append a row to both files; whoever reads them now finds it there."""
        absent = "; ".join(f"{m}: {why}" for m, why in row.reasons.items())
        cells: list[Any] = [
            row.clip_id,
            row.source,
            row.start_s,
            row.stop_s,
            label(row.seen),
            absent,
        ]
        for head in self._heads:
            best = f"{row.top[head][0].probability:.4f}" if row.top else ""
            truth = [_true_class(row, head, self._heads)] if self._truth else []
            cells += [row.best(head), best, *truth]
        self._table.writerow(cells)
        json.dump(_plain(row), self._lines, ensure_ascii=False)
        self._lines.write("\n")
        self._csv.flush()
        self._lines.flush()


def _true_class(row: Row, head: str, heads: Sequence[str]) -> str:
    if head == ACTION and head not in row.truth:
        parts = [row.truth.get(h, "") for h in _spoken(heads) if h != ACTION]
        return " ".join(parts) if all(parts) else ""
    return row.truth.get(head, "")


def plain_top(row: Row) -> dict[str, list[dict[str, Any]]]:
    """Return the best classes of each head, JSON-plain."""
    return {h: [{"class": g.name, "probability": g.probability} for g in of]
            for h, of in row.top.items()}  # fmt: skip


def _plain(row: Row) -> dict[str, Any]:
    return {
        "clip_id": row.clip_id,
        "source": str(row.source),
        "start_s": row.start_s,
        "stop_s": row.stop_s,
        "seen": row.seen,
        "absent": dict(row.reasons),
        "top": plain_top(row),
        "true": dict(row.truth),
    }


_WIDTH, _MARGIN, _ROW = 1000, 130, 26
_COLOURS = ("#4e79a7", "#f28e2b", "#59a14f", "#e15759", "#76b7b2", "#b07aa1", "#9c755f", "#edc948")


@dataclass(frozen=True, slots=True)
class _Block:
    """A stretch of a timeline with one class, in units of the drawing."""

    x: float
    width: float
    text: str
    tip: str
    colour: str
    opacity: float


def write_timeline(path: Path, rows: Sequence[Row], model: str) -> None:
    """Write a self-contained page: over time, what was recognised and which modalities were seen.

    Windows that overlap are drawn around their centres, as long as the hop.
    """
    template = package_files("karmma_pipeline.recognition").joinpath("timeline.html")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.from_string(template.read_text("utf-8"))
    order = list(dict.fromkeys(row.source for row in rows))
    rows = sorted(rows, key=lambda row: (order.index(row.source), row.start_s))
    videos = [_video(source, list(some)) for source, some in groupby(rows, lambda row: row.source)]
    files.write_text(
        path, page.render(videos=videos, model=model, width=_WIDTH, margin=_MARGIN, row=_ROW)
    )


def _video(source: Path, rows: list[Row]) -> dict[str, Any]:
    spans = shown_spans(rows)
    start, stop = min(a for a, _ in spans), max(b for _, b in spans)
    scale = _WIDTH / max(stop - start, 1e-6)
    places = [((a - start) * scale, (b - a) * scale) for a, b in spans]
    heads = dict.fromkeys(head for row in rows for head in row.top) or {"": None}
    tracks = [(head, _blocks(rows, places, head)) for head in heads]
    known = dict.fromkeys(head for row in rows for head in row.truth)
    tracks += [(f"{head} (true)", _truths(rows, places, head)) for head in known]
    modalities = dict.fromkeys(m for row in rows for m in (*row.seen, *row.reasons))
    lights = [(m, _lights(rows, places, m)) for m in modalities]
    ticks = [(i * _WIDTH / 8, start + i * (stop - start) / 8) for i in range(9)]
    return {"name": source.name, "tracks": tracks, "lights": lights, "ticks": ticks}


def _lights(
    rows: Sequence[Row], places: Sequence[tuple[float, float]], modality: str
) -> list[tuple[float, float, bool, str]]:
    def state(i: int) -> tuple[bool, str]:
        return modality in rows[i].seen, rows[i].reasons.get(modality, "")

    return [
        (*_stretch(places, list(some)), *how) for how, some in groupby(range(len(rows)), key=state)
    ]


def shown_spans(rows: Sequence[Row]) -> list[tuple[float, float]]:
    """Return when each row's answer is shown: windows that overlap share the time evenly."""
    spans = [(row.start_s, row.start_s + 1 if row.stop_s is None else row.stop_s) for row in rows]
    edges = [spans[0][0]]
    for (_, stop), (start, _) in pairwise(spans):
        edges.append((start + stop) / 2 if start < stop else start)
    edges.append(spans[-1][1])
    return [(max(edges[i], spans[i][0]), min(edges[i + 1], spans[i][1])) for i in range(len(spans))]


def _blocks(rows: Sequence[Row], places: Sequence[tuple[float, float]], head: str) -> list[_Block]:
    blocks = []
    for name, some in groupby(range(len(rows)), key=lambda i: rows[i].best(head)):
        numbers = list(some)
        x, width = _stretch(places, numbers)
        of = [rows[i].top[head][0].probability for i in numbers if head in rows[i].top]
        mean = sum(of) / len(of) if of else 0.0
        tip = f"{name} {mean:.2f}" if of else name
        colour = _colour(name) if of else "#bbbbbb"
        blocks.append(_Block(x, width, _fitting(name, width), tip, colour, 0.35 + 0.65 * mean))
    return blocks


def _truths(rows: Sequence[Row], places: Sequence[tuple[float, float]], head: str) -> list[_Block]:
    blocks = []
    for name, some in groupby(range(len(rows)), key=lambda i: rows[i].truth.get(head, "")):
        x, width = _stretch(places, list(some))
        if name:
            blocks.append(_Block(x, width, _fitting(name, width), name, _colour(name), 1.0))
    return blocks


def _stretch(places: Sequence[tuple[float, float]], numbers: Sequence[int]) -> tuple[float, float]:
    x = places[numbers[0]][0]
    return x, sum(places[numbers[-1]]) - x


def _fitting(text: str, width: float) -> str:
    """Return as much of a text as fits, at about 7 units a letter."""
    letters = int((width - 6) / 7)
    if letters >= len(text):
        return text
    return f"{text[: letters - 1]}…" if letters > 2 else ""


def _colour(name: str) -> str:
    """Return a class's colour: the same in every row, video and run."""
    return _COLOURS[hashlib.sha256(name.encode()).digest()[0] % len(_COLOURS)]


def unseen(rows: Sequence[Row]) -> dict[Path, KarmmaError]:
    """Return the files of which nothing was seen since they could not be read, and the error."""
    seen = {row.source for row in rows if row.seen}
    faults: dict[Path, KarmmaError] = {}
    for row in rows:
        known = (Reason[why.upper()] for why in row.reasons.values() if why != DROPPED)
        fault = next((why for why in known if why.is_passing), None)
        if fault is not None and row.source not in seen | faults.keys():
            faults[row.source] = MediaError(f"{row.source}: {fault.label}: {fault.hint}")
    return faults


def summary(rows: Iterable[Row]) -> str:
    """Return how many clips lacked which modality, and why, as a sentence; empty if none did."""
    counts = Counter(absence for row in rows for absence in row.reasons.items())
    return "; ".join(f"{n} without {modality} ({why})" for (modality, why), n in counts.items())
