"""Tables and figures of classes: accuracy of each, what is mistaken for what, how sure answers are.

All with every modality that a clip has. Clips of several seeds are counted together.
"""

from collections import Counter
from statistics import fmean

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

from karmma_pipeline.evaluation.report.figures import (
    colour,
    new_figure,
    plain,
    style,
    title_of,
)
from karmma_pipeline.evaluation.report.tables import Cells, Table, mean_of
from karmma_pipeline.evaluation.results import Calibration, Method, Results
from karmma_pipeline.modalities import NOTHING

# With more classes their names would overlap.
_MOST_NAMES = 40
_MOST_PAIRS = 20


def class_table(results: Results) -> Table:
    """Return the accuracy of every class that occurs, of all heads."""
    header = ["class", "head", "clips", *(method.name for method in results.methods)]
    rows: list[Cells] = []
    for head, names in results.data.heads.items():
        for number, (name, clips) in enumerate(
            zip(names, results.data.class_clips[head], strict=True)
        ):
            if clips:
                shares = (_accuracies(results, m, head, number, clips) for m in results.methods)
                rows.append([name, head, str(clips), *map(mean_of, shares)])
    return header, rows


def _accuracies(
    results: Results, method: Method, head: str, number: int, clips: int
) -> list[float]:
    runs = (results.runs[n] for n in method.runs)
    return [100 * run.class_correct[head][number] / clips for run in runs]


def confusions(results: Results, method: Method, head: str) -> Counter[tuple[int, int]]:
    """Return how many clips there are of each class and answer; -1 is nothing to see."""
    found: Counter[tuple[int, int]] = Counter()
    for number in method.runs:
        for true, answer, clips in results.runs[number].confusion.get(head, ()):
            found[true, answer] += clips
    return found


def confusion_table(results: Results, method: Method, head: str) -> Table:
    """Return class, answer and clips of all pairs that occur, the most frequent mistakes first."""
    names = results.data.heads[head]
    counts = confusions(results, method, head)
    order = sorted(counts.items(), key=lambda one: (one[0][0] == one[0][1], -one[1], one[0]))
    rows: list[Cells] = [
        [names[true], NOTHING if answer < 0 else names[answer], str(clips)]
        for (true, answer), clips in order
    ]
    return ["class", "predicted", "clips"], rows


def mistake_table(results: Results, method: Method, head: str) -> Table:
    """Return the mistakes that are made most often."""
    header, rows = confusion_table(results, method, head)
    return header, [row for row in rows if row[0] != row[1]][:_MOST_PAIRS]


def calibration_table(results: Results) -> Table:
    """Return the expected calibration error of every method, in percent."""
    metrics = [m for m in results.metrics if any(m in run.calibration for run in results.runs)]
    rows: list[Cells] = []
    for method in results.methods:
        cells = []
        for metric in metrics:
            of_runs = [results.runs[n].calibration.get(metric) for n in method.runs]
            errors = [100 * one.ece for one in of_runs if one is not None]
            cells.append(mean_of(errors))
        rows.append([method.name, *cells])
    return ["model", *(f"{metric} ECE (%)" for metric in metrics)], rows if metrics else []


def draw(results: Results) -> dict[str, Figure]:
    """Return the figures by name: how sure answers are, and each method's confusions."""
    figures = {}
    with style():
        if any(results.main in run.calibration for run in results.runs):
            figures["calibration"] = _reliability(results)
        for number, method in enumerate(results.methods):
            for head in results.data.heads:
                if confusions(results, method, head):
                    figures[f"confusion_{head}_{number}"] = _matrix(results, method, head)
    return figures


def _reliability(results: Results) -> Figure:
    figure, axes = new_figure(5.2, 4.6)
    axes.plot([0, 100], [0, 100], color="#777777", linewidth=1, linestyle=":")
    for number, method in enumerate(results.methods):
        found = [results.runs[n].calibration.get(results.main) for n in method.runs]
        known = [one for one in found if one is not None]
        if known:
            confidence, accuracy = _pooled(known)
            error = 100 * fmean(one.ece for one in known)
            name = f"{plain(method.name)}: ECE {error:.1f} %"
            axes.plot(confidence, accuracy, color=colour(number), marker="o", ms=4, label=name)
    axes.set_xlim(0, 100)
    axes.set_ylim(0, 100)
    axes.set_xlabel("confidence (%)")
    axes.set_ylabel(f"{plain(results.main)} top-1 (%)")
    axes.legend(fontsize=8.5)
    title_of(figure, axes, "Calibration", results)
    return figure


def _pooled(of: list[Calibration]) -> tuple[list[float], list[float]]:
    """Return confidence and accuracy in percent of the bins that hold clips of any seed."""
    clips, confidence, accuracy = (
        np.array(
            [
                [(b.clips, b.clips * b.confidence, b.clips * b.accuracy) for b in one.bins]
                for one in of
            ]
        )
        .sum(axis=0)
        .T
    )
    some = clips > 0
    x, y = (100 * sums[some] / clips[some] for sums in (confidence, accuracy))
    return x.tolist(), y.tolist()


def _matrix(results: Results, method: Method, head: str) -> Figure:
    """Return the share of each class's clips (a row) that are given each answer (a column)."""
    counts = confusions(results, method, head)
    classes = sorted({true for true, _ in counts} | {max(answer, 0) for _, answer in counts})
    place = {number: i for i, number in enumerate(classes)}
    table = np.zeros((len(classes), len(classes)))
    for (true, answer), clips in counts.items():
        if answer >= 0:
            table[place[true], place[answer]] = clips
    totals: Counter[int] = Counter()
    for (true, _), clips in counts.items():
        totals[true] += clips
    size = max(3.4, min(7.0, 1.6 + 0.2 * len(classes)))
    figure, axes = new_figure(size + 1.2, size + 0.4)
    shares = 100 * table / np.array([max(1, totals[c]) for c in classes])[:, None]
    image = axes.imshow(shares, cmap="Blues", norm=PowerNorm(0.5, 0, 100))
    image.set_interpolation("nearest")
    axes.grid(visible=False)
    axes.tick_params(labelsize=7)
    axes.set_xlabel(f"predicted {plain(head)}")
    axes.set_ylabel(f"true {plain(head)}")
    if len(classes) <= _MOST_NAMES:
        _name_classes(axes, [results.data.heads[head][c] for c in classes], shares)
    else:
        step = range(0, len(classes), 10 * (1 + len(classes) // 100))
        axes.set_xticks(step, [str(classes[i]) for i in step])
        axes.set_yticks(step, [str(classes[i]) for i in step])
        axes.set_xlabel(f"predicted {plain(head)} (class id)")
    figure.colorbar(image, ax=axes, shrink=0.7, label="% of the clips of the true class")
    axes.set_title(plain(method.name), loc="left", fontsize=11, fontweight="bold")
    return figure


def _name_classes(axes: Axes, names: list[str], shares: npt.NDArray[np.float64]) -> None:
    short = [plain(name if len(name) <= 24 else f"{name[:23]}…") for name in names]
    axes.set_xticks(range(len(names)), short, rotation=90)
    axes.set_yticks(range(len(names)), short)
    size = max(5.0, min(9.0, 90 / len(names)))
    for row, column in np.argwhere(shares >= 0.5):
        share = shares[row, column]
        ink = "white" if share > 40 else "#333333"
        axes.text(column, row, f"{share:.0f}", ha="center", va="center", fontsize=size, color=ink)
