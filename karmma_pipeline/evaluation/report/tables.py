"""Results as tables: Markdown for people and papers, CSV for everything else."""

import csv
import io
from collections.abc import Iterable, Sequence

from karmma_pipeline.evaluation import paper
from karmma_pipeline.evaluation.results import Protocol, Results
from karmma_pipeline.modalities import label

Cells = Sequence[str]
Table = tuple[Cells, list[Cells]]


def subset_table(results: Results, protocol: Protocol) -> Table:
    """Return accuracy per subset and run: top-1 with its interval, top-5."""
    header = ["model", "modalities", "N"]
    header += [f"{m} top-{k}" for m in results.metrics for k in (1, 5)]
    rows: list[Cells] = []
    for run in results.runs:
        for subset in results.subsets:
            of_subset = run.subset(subset, protocol)
            cells = [run.name, label(subset, results.modalities), str(of_subset.clips)]
            for metric in results.metrics:
                top1, top5 = (of_subset.scores[f"{metric}_top{k}"] for k in (1, 5))
                if top1.value is None or top5.value is None:
                    cells += ["", ""]
                else:
                    interval = f"[{top1.low:.1f}, {top1.high:.1f}]"
                    cells += [f"{top1.value:.1f} {interval}", f"{top5.value:.1f}"]
            rows.append(cells)
    return header, rows


def drop_table(results: Results, protocol: Protocol) -> Table:
    """Return the expected top-1 of the headline metric per drop rate and run."""
    header = ["drop rate", *(run.name for run in results.runs)]
    rows: list[Cells] = []
    for rate in results.rates:
        cells = [f"{rate:.0%}"]
        for run in results.runs:
            curve = run.curve(results.main, protocol)
            point = curve.at(rate) if curve else None
            cells.append(f"{point.expected:.1f}" if point else "")
        rows.append(cells)
    return header, rows


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
    for run in results.runs:
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
