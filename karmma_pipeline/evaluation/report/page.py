"""The files of a report: tables, figures and one self-contained HTML page.

All is made from results alone. Names in them are untrusted text.
"""

from importlib.resources import files as package_files
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from karmma_pipeline import files
from karmma_pipeline.evaluation import results as schema
from karmma_pipeline.evaluation.report import figures, tables
from karmma_pipeline.evaluation.results import Results
from karmma_pipeline.modalities import label

FOLDERS = ("logits", "predictions", "submission", "tables", "figures")


def write_report(folder: Path, results: Results) -> None:
    """Write results.json, tables, figures and the page; they depend on nothing else."""
    schema.write(results, folder / "results.json")
    contents = {
        "subsets": tables.subset_table(results, "all"),
        "subsets_complete": tables.subset_table(results, "complete"),
        "drop_curve": tables.drop_table(results, "all"),
        "costs": tables.cost_table(results),
    }
    for name, table in contents.items():
        if table[1]:
            files.write_text(folder / "tables" / f"{name}.md", tables.to_markdown(table))
            files.write_text(folder / "tables" / f"{name}.csv", tables.to_csv(table))
    pictures = figures.draw(results)
    for name, figure in pictures.items():
        for kind in ("png", "svg"):
            files.write_bytes(folder / "figures" / f"{name}.{kind}", figures.to_bytes(figure, kind))
    # Last, for whoever sees the page takes the report for finished.
    files.write_text(folder / "index.html", render(results, pictures))
    files.sweep([folder, *(folder / name for name in FOLDERS)])


def render(results: Results, pictures: dict[str, Figure]) -> str:
    """Return the page; pictures are inlined, nothing is fetched."""
    folder = package_files("karmma_pipeline.evaluation.report")
    source = folder.joinpath("report.html").read_text("utf-8")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(source).render(
        results=results,
        caption=figures.caption(results),
        pictures={name: _inline(figure) for name, figure in pictures.items()},
        subset_table=tables.subset_table(results, "all"),
        complete_table=tables.subset_table(results, "complete"),
        drop_table=tables.drop_table(results, "all"),
        cost_table=tables.cost_table(results),
        label=label,
    )


def _inline(figure: Figure) -> Markup:
    """Return an SVG element; matplotlib escapes the text in it."""
    text = figures.to_bytes(figure, "svg").decode()
    return Markup(text[text.index("<svg") :])  # noqa: S704
