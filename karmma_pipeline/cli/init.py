"""`karmma init`: recipes to start from."""

from __future__ import annotations

from pathlib import Path

import click

from karmma_pipeline.errors import ConfigError
from karmma_pipeline.recipes import recipe_model

STAGES = ("extract", "train-teacher", "train-baseline", "distill", "evaluate", "chain", "site")
USES = {
    "evaluate": "karmma evaluate --recipe RECIPE",
    "chain": "karmma submit CHAIN",
    "site": "karmma submit CHAIN --site SITE",
}


@click.command()
@click.argument("stage", type=click.Choice(STAGES))
@click.option("--out", type=click.Path(path_type=Path), help="File to write; default: print.")
def init(stage: str, out: Path | None) -> None:
    """Write a commented recipe of a stage.

    It has every key with its default.
    """
    from karmma_pipeline import config, files

    use = USES.get(stage, f"karmma {stage} RECIPE")
    text = f"# Recipe for: {use}\n\n{config.template(recipe_model(stage))}"
    if out is None:
        click.echo(text.rstrip())
        return
    if out.exists():
        raise ConfigError(f"--out {out}: the file exists; choose another name or remove it.")
    files.write_text(out, text)
    click.echo(f"recipe: {out}")
