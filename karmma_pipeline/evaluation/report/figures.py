"""The pictures: drop curves as in the paper, accuracy and cost per subset. PNG, SVG and PDF."""

import io
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_pdf import FigureCanvasPdf
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from karmma_pipeline.evaluation.results import Method, Results, RunResult
from karmma_pipeline.modalities import label

# Okabe and Ito's palette, told apart by colour-blind readers.
_COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "osD^vP*"
_ENDS = ("low", "high")
_TALL = 5
# Subsets whose names have room below upright bars.
_MOST_UPRIGHT = 8
# Letters of a subset's name that have room there.
_MOST_LETTERS = 12
_STYLE: Any = {
    "svg.hashsalt": "karmma",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#DDDDDD",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}


def draw(results: Results) -> dict[str, Figure]:
    """Return the figures by name."""
    plots: dict[str, Callable[[Results], Figure]] = {}
    if any(s.n for run in results.runs for of in run.subsets for s in of.scores.values()):
        plots["subsets"] = subset_bars
    if any(run.curve(results.main, "all") for run in results.runs):
        plots = {"drop_curve": drop_curve, **plots}
    if any(run.costs for run in results.runs):
        plots["costs"] = cost_bars
    with style():
        return {name: plot(results) for name, plot in plots.items()}


def style() -> AbstractContextManager[None]:
    """Return a context in which figures are made and rendered."""
    return mpl.rc_context(_STYLE)


# Without these entries matplotlib would write the time, and its own version.
_METADATA: dict[str, dict[str, None]] = {
    "png": {"Software": None},
    "svg": {"Date": None},
    "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
}
_CANVASES = {"png": FigureCanvasAgg, "svg": FigureCanvasSVG, "pdf": FigureCanvasPdf}
KINDS = tuple(_CANVASES)
_DPI = 150


def to_bytes(figure: Figure, kind: str) -> bytes:
    """Render a figure as one of `KINDS`; equal figures are equal bytes."""
    buffer = io.BytesIO()
    with style():
        if isinstance(figure.get_layout_engine(), ConstrainedLayoutEngine):
            # Once for all kinds: laying out takes as long as drawing.
            figure.draw_without_rendering()
            figure.set_layout_engine("none")
        figure.set_dpi(_DPI)
        # Not savefig: it draws everything once more beforehand, for a layout that is there.
        canvas: Any = _CANVASES[kind](figure)
        getattr(canvas, f"print_{kind}")(buffer, metadata=_METADATA[kind])
    return buffer.getvalue()


def caption(results: Results) -> str:
    """Return what every figure must say of the features it stands on."""
    random = "; backbones NOT PRETRAINED" if results.weights else ""
    split = f", {results.data.split}" if results.data.split else ""
    return f"{plain(results.data.name)}{split}, N = {results.data.clips}{random}"


def drop_curve(results: Results) -> Figure:
    """Return the headline top-1 over the drop rate, expected, with its interval."""
    figure, axes = new_figure(7, 4.4)
    for number, method in enumerate(results.methods):
        curve = results.curve(method, results.main, "all")
        if curve is None:
            continue
        rates = [100 * rate for rate in results.rates]
        hue = colour(number)
        axes.plot(
            rates,
            np.array([p.mean for p in curve.points], float),
            color=hue,
            marker=_MARKERS[number % len(_MARKERS)],
            markersize=4.5,
            linestyle="--" if method.kind == "teacher" else "-",
            label=_named(method),
        )
        low, high = (np.array([getattr(p, end) for p in curve.points], float) for end in _ENDS)
        axes.fill_between(rates, low, high, color=hue, alpha=0.12, linewidth=0)
    constant = results.data.constant[results.main]
    axes.axhline(constant or 0.0, color="#777777", linewidth=1, linestyle=":")
    axes.annotate(
        "Majority class",
        (1, constant or 0.0),
        (-4, 3),
        xycoords=axes.get_yaxis_transform(),
        textcoords="offset points",
        horizontalalignment="right",  # on the left the legend lies over it
        color="#777777",
        fontsize=8,
    )
    axes.set_xlabel("Modality drop rate (%)")
    axes.set_ylabel(f"{plain(results.main)} top-1 (%)")
    axes.set_ylim(bottom=0)
    axes.legend()
    title_of(figure, axes, "Accuracy under missing modalities", results)
    return figure


def subset_bars(results: Results) -> Figure:
    """Return the headline top-1 on every subset of modalities that was evaluated."""
    title = "All subsets of modalities" if results.every_subset else "Subsets of modalities"
    bars = _SubsetBars(results, len(results.methods), 4)
    for number, method in enumerate(results.methods):
        score = f"{results.main}_top1"
        scores = [results.score(method, s, "all", score) for s in results.subsets]
        value, low, high = (
            np.array([getattr(s, end) for s in scores], float) for end in ("mean", *_ENDS)
        )
        whiskers = [value - low, high - value]
        bars.draw(value.tolist(), number, _named(method), whiskers)
    return bars.finish(f"{plain(results.main)} top-1 (%)", title)


def cost_bars(results: Results) -> Figure:
    """Return GFLOPs of one clip on every subset, one bar per architecture."""
    runs = _architectures(results)
    bars = _SubsetBars(results, len(runs), 3.6)
    for number, (names, run) in enumerate(runs):
        by_subset = {c.modalities: c.gflops or 0.0 for c in run.costs}
        drawn = bars.draw([by_subset.get(s, 0.0) for s in results.subsets], number, plain(names))
        bars.axes.bar_label(drawn, fmt="%.3g", fontsize=7, padding=1)
    return bars.finish(
        "GFLOPs per clip, backbones included", "Cost per clip (2 FLOPs per multiply-add)"
    )


class _SubsetBars:
    """Bars of some models on each subset: upright, or lying where names have no room.

    Args:
        results: which subsets.
        count: models.
        height: of the figure if bars are upright.
    """

    def __init__(self, results: Results, count: int, height: float) -> None:
        self.results, self.count = results, count
        letters = max(len(label(s, results.modalities)) for s in results.subsets)
        self.lying = len(results.subsets) > _MOST_UPRIGHT or letters > _MOST_LETTERS
        rows = len(results.subsets) * (0.1 + 0.12 * count)
        self.figure, self.axes = new_figure(7.5, 1.5 + rows if self.lying else height)

    def draw(
        self, lengths: Sequence[float], number: int, name: str, whiskers: Any = None
    ) -> BarContainer:
        """Draw a model's bars, beside those of the others on each subset."""
        width = 0.8 / self.count
        places = [i + (number - (self.count - 1) / 2) * width for i in range(len(lengths))]
        style: dict[str, Any] = {"color": colour(number), "label": name}
        if whiskers is not None:
            style |= {"error_kw": {"linewidth": 0.7, "ecolor": "#555555"}}
            style |= {"xerr" if self.lying else "yerr": whiskers}
        bar = self.axes.barh if self.lying else self.axes.bar
        return bar(places, lengths, width * 0.92, **style)

    def finish(self, length: str, title: str) -> Figure:
        """Name subsets, axes and models."""
        axes, results = self.axes, self.results
        names = [plain(label(s, results.modalities)) for s in results.subsets]
        if self.lying:
            axes.set_yticks(range(len(names)), names)
            axes.invert_yaxis()
            axes.margins(y=0.01)
            axes.set_ylabel("available modalities")
            axes.set_xlabel(length)
        else:
            axes.set_xticks(range(len(names)), names)
            axes.set_xlabel("available modalities")
            axes.set_ylabel(length)
        axes.legend(fontsize=8.5)
        title_of(self.figure, axes, title, results)
        return self.figure


def _architectures(results: Results) -> list[tuple[str, RunResult]]:
    """Return one run per distinct cost, with the names of all that share it."""
    groups: dict[tuple[float | None, ...], list[RunResult]] = {}
    for run in results.runs:
        if run.costs:
            groups.setdefault(tuple(c.gflops for c in run.costs), []).append(run)
    # Runs of one method share a name.
    return [(", ".join({r.name: None for r in runs}), runs[0]) for runs in groups.values()]


def new_figure(width: float, height: float) -> tuple[Figure, Axes]:
    """Return an empty figure of a size in inches, which no window shows."""
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def title_of(figure: Figure, axes: Axes, title: str, results: Results) -> None:
    """Write a title above the axes, and below it what every figure must say."""
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold", pad=22)
    height = figure.get_figheight()
    above = 1.03 if height < _TALL else 1 + 0.15 / height
    axes.text(0, above, caption(results), transform=axes.transAxes, fontsize=8.5, color="#555555")


def colour(number: int) -> str:
    """Return the colour of a method by its place in the legend."""
    return _COLOURS[number % len(_COLOURS)]


def _named(method: Method) -> str:
    """Return a method's name, and over how many seeds it is."""
    seeds = len(method.runs)
    return plain(method.name) + (f" ({seeds} seeds)" if seeds > 1 else "")


def plain(text: str) -> str:
    """Keep matplotlib from reading a name as mathematics."""
    return text.replace("$", r"\$")
