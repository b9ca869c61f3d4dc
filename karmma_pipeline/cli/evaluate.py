"""`karmma evaluate` and `karmma costs`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from karmma_pipeline.cli.options import check_option, finish, load_recipe, set_option


@click.command()
@click.argument("runs", nargs=-1, type=click.Path(path_type=Path))
@click.option(
    "--store",
    "stores",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Feature store; repeatable. Default: the stores that each run was trained on.",
)
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the report.")
@click.option(
    "--recipe", type=click.Path(path_type=Path), help="Recipe (YAML) with further settings."
)
@click.option(
    "--gallery",
    type=click.IntRange(1, 50),
    metavar="N",
    help="Add videos to the report: N clips that the last run classifies correctly, N that it gets "
    "wrong, and N that it gets wrong with its best single modality but right with all.",
)
@set_option
@check_option
def evaluate(
    runs: tuple[Path, ...],
    stores: tuple[Path, ...],
    out: Path | None,
    recipe: Path | None,
    gallery: int | None,
    overrides: tuple[str, ...],
    check: bool,
) -> None:
    """Report accuracy and cost of trained models.

    Accuracy is measured on every subset of modalities and at a range of drop rates. RUNS
    are run folders; each is evaluated on the store that it was trained on, unless --store names
    others.
    """
    given = {"runs": [str(r) for r in runs], "stores": [str(s) for s in stores]}
    # JSON is YAML in which no character of a path means anything else.
    switches = [f"{key}={json.dumps(value)}" for key, value in given.items() if value]
    if out is not None:
        switches.append(f"out={json.dumps(str(out))}")
    resolved = load_recipe("evaluate", recipe, (*switches, *overrides), check)
    from karmma_pipeline.evaluation.evaluate import evaluate as run
    from karmma_pipeline.jobs import StopFlag

    with StopFlag(resumes=False) as stop:
        report = run(resolved, stop)
        lines = [report.summary()]
        if gallery is not None:
            from karmma_pipeline.cli.gallery import write_gallery

            lines.append(f"gallery: {write_gallery(resolved, report, gallery, stop)}")
        finish(*lines)


@click.command()
def costs() -> None:
    """Compare the models' GFLOPs with the paper's."""
    from karmma_pipeline.evaluation.paper import paper_costs, paper_table

    click.echo(paper_table(paper_costs()))
