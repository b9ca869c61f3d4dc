"""One self-contained HTML page made from results alone; names in it are untrusted text."""

from importlib.resources import files as package_files

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from karmma_pipeline.evaluation.report import figures, tables
from karmma_pipeline.evaluation.results import Results
from karmma_pipeline.modalities import label


def render(results: Results, pictures: dict[str, Figure]) -> str:
    """Return the page; pictures are inlined, nothing is fetched."""
    source = (
        package_files("karmma_pipeline.evaluation.report")
        .joinpath("report.html")
        .read_text("utf-8")
    )
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    shown = {name: _inline(figure) for name, figure in pictures.items()}
    return environment.from_string(source).render(
        results=results,
        caption=figures.caption(results),
        pictures=shown,
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
