"""Results as tables: Markdown for people, LaTeX for papers, CSV for everything else.

A method of several seeds has a mean and, after ±, the standard deviation over its seeds.
"""

import csv
import io
import unicodedata
from collections.abc import Iterable, Sequence
from statistics import fmean, stdev

from karmma_pipeline.evaluation import paper
from karmma_pipeline.evaluation.results import OverSeeds, Protocol, Results
from karmma_pipeline.modalities import label

Cells = Sequence[str]
Table = tuple[Cells, list[Cells]]


def subset_table(results: Results, protocol: Protocol) -> Table:
    """Return accuracy per subset and run: top-1 with its interval, top-5."""
    header = ["model", "modalities", "N"]
    header += [f"{m} top-{k}" for m in results.metrics for k in (1, 5)]
    rows: list[Cells] = []
    for method in results.methods:
        for subset in results.subsets:
            clips = results.runs[method.runs[0]].subset(subset, protocol).clips
            cells = [method.name, label(subset, results.modalities), str(clips)]
            for metric in results.metrics:
                top1, top5 = (
                    results.score(method, subset, protocol, f"{metric}_top{k}") for k in (1, 5)
                )
                cells += ["", ""] if top1.mean is None else [with_interval(top1), spread(top5)]
            rows.append(cells)
    return header, rows


def drop_table(results: Results, protocol: Protocol) -> Table:
    """Return the expected top-1 of the headline metric per drop rate and run."""
    header = ["drop rate", *(method.name for method in results.methods)]
    curves = [results.curve(method, results.main, protocol) for method in results.methods]
    rows: list[Cells] = [
        [f"{rate:.0%}", *(spread(curve.points[i]) if curve else "" for curve in curves)]
        for i, rate in enumerate(results.rates)
    ]
    if any(curves):
        rows.append(["mean", *(spread(curve.mean) if curve else "" for curve in curves)])
    return header, rows


def mean_of(values: Sequence[float]) -> str:
    """Return the mean of what seeds have, and their standard deviation if there are several."""
    sd = stdev(values) if len(values) > 1 else None
    mean = fmean(values) if values else None
    return spread(OverSeeds(mean=mean, sd=sd, by_seed=tuple(values)))


def spread(value: OverSeeds) -> str:
    """Return a mean, and the standard deviation over seeds if there are several."""
    if value.mean is None:
        return ""
    return f"{value.mean:.1f}" + (f" ± {value.sd:.1f}" if value.sd is not None else "")


def with_interval(value: OverSeeds) -> str:
    """Return the same with its interval."""
    ends = "" if value.low is None else f" [{value.low:.1f}, {value.high:.1f}]"
    return spread(value) + ends


def cost_table(results: Results) -> Table:
    """Return FLOPs, parameters and memory per subset, beside the paper's where sizes agree."""
    header = [
        "model",
        "modalities",
        "GFLOPs",
        "GFLOPs as evaluated",
        "parameters (M)",
        "peak memory (MiB)",
        "paper GFLOPs",
    ]
    rows: list[Cells] = []
    for run in (results.runs[method.runs[0]] for method in results.methods):
        for cost in run.costs:
            kind = "teacher" if run.kind == "teacher" else "student"
            bar = paper.GFLOPS[kind].get(cost.modalities) if run.paper_size else None
            rows.append(
                [
                    run.name,
                    label(cost.modalities, results.modalities),
                    _number(cost.gflops, 3),
                    _number(cost.gflops_as_run, 3),
                    _number(None if cost.parameters is None else cost.parameters / 1e6, 2),
                    _number(cost.memory_mib, 0),
                    _number(bar, 3),
                ]
            )
    return header, rows


def probe_table(results: Results) -> Table:
    """Return what a linear classifier of the tokens themselves answers rightly."""
    header = ["modalities", "head", "top-1", "training clips", "features", "lambda / features"]
    stores = list(dict.fromkeys(probe.store_digest for probe in results.probes))
    rows: list[Cells] = []
    for probe in results.probes:
        top1 = probe.score
        which = f" (features {stores.index(probe.store_digest) + 1})" if len(stores) > 1 else ""
        interval = (
            "" if top1.value is None else f"{top1.value:.1f} [{top1.low:.1f}, {top1.high:.1f}]"
        )
        penalty = "" if probe.penalty is None else f"{probe.penalty:g}"
        subset = label(probe.modalities, results.modalities) + which
        rows.append([subset, probe.head, interval, str(probe.clips), str(probe.features), penalty])
    return header, rows


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def to_markdown(table: Table) -> str:
    """Return a Markdown table; bars and line breaks in cells are escaped."""
    header, rows = table
    lines = [_line(header), "|" + "---|" * len(header), *(_line(row) for row in rows)]
    return "\n".join(lines) + "\n"


def _line(cells: Iterable[str]) -> str:
    safe = (" ".join(c.split()).replace("\\", "\\\\").replace("|", "\\|") for c in cells)
    return "| " + " | ".join(safe) + " |"


def to_csv(table: Table) -> str:
    """Return a CSV table."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(table[0])
    writer.writerows(table[1])
    return buffer.getvalue()


def to_latex(table: Table) -> str:
    r"""Return a LaTeX table in the style of booktabs; names are escaped.

    It compiles with pdflatex and ``\usepackage{booktabs}``; letters that are neither Latin nor
    Greek need lualatex or xelatex and a font that has them.
    """
    header, rows = table
    lines = [
        "% \\usepackage{booktabs}",
        "\\begin{tabular}{l" + "r" * (len(header) - 1) + "}",
        "\\toprule",
        _latex_line(header),
        "\\midrule",
        *map(_latex_line, rows),
        "\\bottomrule",
        "\\end{tabular}",
    ]
    return "\n".join(lines) + "\n"


def _latex_line(cells: Iterable[str]) -> str:
    # A line that begins with a bracket would be read as the option of the \\ before it.
    return " & ".join(escape_latex(c) for c in cells).replace("[", "{[}") + r" \\"


def escape_latex(text: str) -> str:
    """Return text as LaTeX sets it, whatever is in it."""
    return "".join(_latex(c) for c in " ".join(text.split()) if c.isprintable())


_LATEX = {c: rf"\{c}" for c in "&%$#_{}"}
_LATEX |= {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
_LATEX |= {"|": r"\textbar{}", '"': "''", "<": "$<$", ">": "$>$"}
_LATEX |= {"±": r"$\pm$", "\N{MINUS SIGN}": "$-$", "\N{MULTIPLICATION SIGN}": r"$\times$"}
# Capitals that look like Latin ones have no command.
_CAPITALS = {"Gamma", "Delta", "Theta", "Lambda", "Xi", "Pi", "Sigma", "Phi", "Psi", "Omega"}


def _latex(character: str) -> str:
    size, _, name = unicodedata.name(character, "").removeprefix("GREEK ").partition(" LETTER ")
    name = name.lower().replace("lamda", "lambda")  # as Unicode spells it
    if (
        character.isascii()
        or not name.isalpha()
        or not "\N{GREEK SMALL LETTER ALPHA}" <= character.lower() <= "\N{GREEK SMALL LETTER OMEGA}"
    ):
        return _LATEX.get(character, character)
    if size == "SMALL" and name != "omicron":
        return rf"$\{name}$"
    return rf"$\{name.title()}$" if name.title() in _CAPITALS else character
