"""`karmma plan`."""

from __future__ import annotations

from pathlib import Path

import click

from karmma_pipeline.cli.options import load_recipe, recipe_argument, set_option


@click.command()
@recipe_argument
@set_option
@click.option("--json", "target", type=click.Path(path_type=Path), help="Write it as JSON too.")
@click.option(
    "--no-probe", is_flag=True, help="Do not open the files, only see whether they exist."
)
@click.option("--no-calibrate", is_flag=True, help="Do not measure the time on a few clips.")
def plan(
    recipe: Path,
    overrides: tuple[str, ...],
    target: Path | None,
    no_probe: bool,
    no_calibrate: bool,
) -> None:
    """Say what an extraction will meet and cost: files, clips, splits, disk, time.

    Writes nothing. Ends with code 3 if more clips will fail than the recipe allows.
    """
    from karmma_pipeline.extract.recipe import ExtractRecipe

    resolved = load_recipe(ExtractRecipe, recipe, overrides, check=False)
    from karmma_pipeline import files
    from karmma_pipeline.errors import TooManyFailuresError
    from karmma_pipeline.extract.planning import make_plan

    made = make_plan(resolved, probe=not no_probe, calibrate=not no_calibrate)
    click.echo(made.text(recipe))
    if target is not None:
        files.write_json(target, made.facts())
        click.echo(f"plan: {target}")
    if made.too_many_lost:
        raise TooManyFailuresError(
            f"{recipe}: {made.survey.lost:,} of {made.survey.clips:,} clips will lose a modality "
            "to the faults above; mend them, or raise max_failures."
        )
