"""The files of a report: tables, figures and one self-contained HTML page.

All is made from results alone. Names in them are untrusted text.
"""

from importlib.resources import files as package_files
from itertools import product
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from karmma_pipeline import files
from karmma_pipeline.evaluation import results as schema
from karmma_pipeline.evaluation.gallery import Gallery
from karmma_pipeline.evaluation.report import classes, differences, figures, robustness, tables
from karmma_pipeline.evaluation.results import Results
from karmma_pipeline.modalities import legend

# A page of many methods would grow too large: more confusions, and longer lists, are files alone.
_MOST_INLINE = 8

FOLDERS = ("logits", "predictions", "submission", "tables", "figures", "gallery")


def write_report(folder: Path, results: Results, gallery: Gallery | None = None) -> None:
    """Write results.json, tables, figures and the page; they depend on nothing else.

    Args:
        folder: of the report.
        results: of the evaluation.
        gallery: of videos that lie in ``gallery`` already, if there are some.
    """
    schema.write(results, folder / "results.json")
    for name, table in _tables(results).items():
        if table[1]:
            files.write_text(folder / "tables" / f"{name}.md", tables.to_markdown(table))
            files.write_text(folder / "tables" / f"{name}.csv", tables.to_csv(table))
            files.write_text(folder / "tables" / f"{name}.tex", tables.to_latex(table))
    pairs = list(product(enumerate(results.methods), results.data.heads))
    for (number, method), head in pairs:
        table = classes.confusion_table(results, method, head)
        if table[1]:
            name = f"confusion_{head}_{number}.csv"
            files.write_text(folder / "tables" / name, tables.to_csv(table))
    pictures = {}
    drawn = {**figures.draw(results), **classes.draw(results), **robustness.draw(results)}
    for name, figure in drawn.items():
        kinds = {kind: figures.to_bytes(figure, kind) for kind in figures.KINDS}
        for kind, data in kinds.items():
            files.write_bytes(folder / "figures" / f"{name}.{kind}", data)
        pictures[name] = _inline(kinds["svg"])
    # Last, for whoever sees the page takes the report for finished.
    files.write_text(folder / "index.html", render(results, pictures, gallery))
    files.sweep([folder, *(folder / name for name in FOLDERS)])


def _tables(results: Results) -> dict[str, tables.Table]:
    return {
        "subsets": tables.subset_table(results, "all"),
        "subsets_complete": tables.subset_table(results, "complete"),
        "drop_curve": tables.drop_table(results, "all"),
        "costs": tables.cost_table(results),
        "seeds": differences.seed_table(results),
        "differences": differences.difference_table(results),
        "groups": differences.group_table(results),
        "classes": classes.class_table(results),
        "calibration": classes.calibration_table(results),
        "probes": tables.probe_table(results),
        "robustness": robustness.robustness_table(results),
    }


def render(results: Results, pictures: dict[str, Markup], gallery: Gallery | None = None) -> str:
    """Return the page; pictures are inlined, and nothing is fetched but the gallery's videos."""
    folder = package_files("karmma_pipeline.evaluation.report")
    source = folder.joinpath("report.html").read_text("utf-8")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    confusions = [
        (f"confusion_{head}_{number}", method, head, classes.mistake_table(results, method, head))
        for (number, method), head in product(enumerate(results.methods), results.data.heads)
        if f"confusion_{head}_{number}" in pictures
    ]
    return environment.from_string(source).render(
        results=results,
        caption=figures.caption(results),
        pictures=pictures,
        tables=_tables(results),
        sentences=list(differences.sentences(results)),
        main_differences=differences.headline_table(results),
        confusions=confusions,
        most=_MOST_INLINE,
        gallery=gallery,
        letters=legend(results.modalities),
    )


def _inline(svg: bytes) -> Markup:
    """Return an SVG element; matplotlib escapes the text in it."""
    text = svg.decode()
    return Markup(text[text.index("<svg") :])  # noqa: S704
