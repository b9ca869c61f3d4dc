"""Table and figure of the tests beyond independent drops; of several seeds the mean."""

import numpy as np
from matplotlib.figure import Figure

from karmma_pipeline.evaluation.report import figures
from karmma_pipeline.evaluation.report.tables import Cells, Table, mean_of
from karmma_pipeline.evaluation.results import Method, Results, Robustness

_TESTS = {"missing": "missing", "stale": "stale", "pattern": "missing (pattern)"}


def robustness_table(results: Results) -> Table:
    """Return the headline top-1 of every test, for each share of clips that are affected."""
    header = [
        "test",
        "modality or pattern",
        "clips affected",
        *(method.name for method in results.methods),
    ]
    rows: list[Cells] = []
    for number, test in enumerate(results.runs[0].robustness):
        for at, point in enumerate(test.points):
            runs = (_of(results, method, number) for method in results.methods)
            means = (mean_of(_values(results, tests, at)) for tests in runs)
            rows.append([_TESTS[test.kind], test.what, f"{point.share:.0%}", *means])
    return header, rows


def draw(results: Results) -> dict[str, Figure]:
    """Return a figure of the tests whose share of clips varies; none if there are none."""
    tests = [
        (number, test)
        for number, test in enumerate(results.runs[0].robustness)
        if len(test.points) > 1
    ]
    if not tests or not _values(results, [tests[0][1]], 0):
        return {}
    columns = min(3, len(tests))
    rows = -(-len(tests) // columns)
    with figures.style():
        figure, single = figures.new_figure(2.2 + 2.4 * columns, 0.6 + 2.4 * rows)
        single.remove()
        grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
        for axes in grid.flat[len(tests) :]:
            axes.remove()
        for axes, (number, test) in zip(grid.flat, tests, strict=False):
            for place, method in enumerate(results.methods):
                of_runs = _of(results, method, number)
                means = [np.mean(_values(results, of_runs, at)) for at in range(len(test.points))]
                shares = [100 * point.share for point in test.points]
                colour = figures.colour(place)
                axes.plot(shares, means, color=colour, marker="o", markersize=3.5,
                          label=figures.plain(method.name))  # fmt: skip
            axes.set_title(figures.plain(f"{test.what}: {_TESTS[test.kind]}"), fontsize=10)
            axes.set_xlabel("clips affected (%)")
            axes.set_xlim(-3, 103)
            axes.set_ylim(bottom=0)
        for axes in grid[:, 0]:
            axes.set_ylabel(f"{figures.plain(results.main)} top-1 (%)")
        handles, labels = grid[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8.5)
    return {"robustness": figure}


def _of(results: Results, method: Method, number: int) -> list[Robustness]:
    """Return one of the tests, of each of a method's runs."""
    return [results.runs[run].robustness[number] for run in method.runs]


def _values(results: Results, tests: list[Robustness], at: int) -> list[float]:
    """Return the headline top-1 at a share, of each run; none where no clip has a label."""
    scores = (test.points[at].scores[f"{results.main}_top1"].value for test in tests)
    return [value for value in scores if value is not None]
