"""`karmma extract` and `karmma backbones`."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from karmma_pipeline.cli.completion import backbone_names
from karmma_pipeline.cli.options import (
    Commands,
    check_option,
    finish,
    load_recipe,
    next_command,
    recipe_argument,
    set_option,
)
from karmma_pipeline.errors import ConfigError, counted

if TYPE_CHECKING:
    from karmma_pipeline.extraction.recipe import ExtractRecipe


class _Extract(click.Command):
    """A command whose `--retry` takes any number of names, and none."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Join the names that follow it, for click's options take a fixed number of values."""
        if "--retry" not in args:
            return super().parse_args(ctx, args)
        from karmma_pipeline.extraction.again import CHANGED
        from karmma_pipeline.modalities import Reason

        known = {CHANGED, *(reason.label for reason in Reason)}
        joined: list[str] = []
        names: list[str] | None = None
        for arg in args:
            if names is not None and set(arg.split(",")) <= known:
                names.append(arg)
                joined[-1] = f"--retry={','.join(names)}"
                continue
            names = [] if arg == "--retry" else None
            joined.append("--retry=" if arg == "--retry" else arg)
        return super().parse_args(ctx, joined)


@click.command(cls=_Extract)
@recipe_argument
@set_option
@check_option
@click.option(
    "--retry",
    metavar="[REASON...]",
    help="Retry clips that lack a modality for these reasons (as in failures.csv; none given: all "
    "transient ones). changed: clips whose files have changed since they were extracted.",
)
@click.option(
    "--part", metavar="I/N", help="Extract only part I of N; default: from the Slurm array task."
)
@click.option(
    "--devices",
    metavar="A,B",
    help="Split the extraction across these devices, such as cuda:0,cuda:1; all: every GPU.",
)
@click.option(
    "--max-failures",
    metavar="SHARE",
    help="Exit with code 3 if more than this share of clips loses a modality to an error; "
    "overrides max_failures.",
)
def extract(
    recipe: Path,
    overrides: tuple[str, ...],
    check: bool,
    retry: str | None,
    part: str | None,
    devices: str | None,
    max_failures: str | None,
) -> None:
    """Extract feature stores from the clips of a manifest."""
    if max_failures is not None:
        overrides = (*overrides, f"max_failures={max_failures}")
    resolved = load_recipe("extract", recipe, overrides, check)
    if devices is not None:
        if part or retry is not None:
            raise ConfigError(
                "--devices: runs all parts of an extraction; omit --part and --retry."
            )
        _extract_on(devices, recipe, resolved, overrides)
        return
    click.echo("reading the manifest and loading the backbones ...", err=True)
    from karmma_pipeline.extraction.again import Retry
    from karmma_pipeline.extraction.pipeline import extract as run
    from karmma_pipeline.jobs import Part, StopFlag

    with StopFlag() as stop:
        share = Part.parse(part) if part else Part.from_environment()
        if share.count > 1:
            click.echo(f"part {share} (from {share.why})", err=True)
        again = None if retry is None else Retry.parse(retry.split(","))
        report = run(resolved, share, stop, retry=again)
    if report.complete:
        then = next_command(recipe, "teacher", "train-teacher")
        finish(report.summary(), *_absences(report.stores), then=then)
    else:
        finish(report.summary())


def _extract_on(
    devices: str, recipe: Path, resolved: ExtractRecipe, overrides: tuple[str, ...]
) -> None:
    """Extract with a process on each of some devices."""
    from karmma_pipeline.batch.devices import extract_on
    from karmma_pipeline.jobs import StopFlag

    words = ["extract", str(recipe), *(word for one in overrides for word in ("--set", one))]
    with StopFlag() as stop:
        extract_on(devices, resolved, words, stop, lambda line: click.echo(line, err=True))
    stores = {name: resolved.out / name for name in resolved.sets}
    said = [f"{name}: {path}" for name, path in stores.items()]
    finish(*said, *_absences(stores), then=next_command(recipe, "teacher", "train-teacher"))


def _absences(stores: dict[str, Path]) -> Iterator[str]:
    """Yield how many clips lack each modality, whatever the reason."""
    from karmma_pipeline.store import Catalog

    said = set()
    for path in stores.values():
        store = Catalog(path)
        lacking = store.column("reason", "u1", len(store.spec.order)).astype(bool)
        for m, missing in zip(store.spec.order, lacking.sum(axis=0).tolist(), strict=True):
            if missing and m not in said:
                said.add(m)
                clips = counted(store.count, "clip")
                yield f"{m} is missing in {missing} of {clips}: {path.parent / 'failures.csv'}"


@click.group(cls=Commands)
def backbones() -> None:
    """List, describe and download backbones."""


@backbones.command("list")
def backbones_list() -> None:
    """List backbones and their published weights.

    Columns: name, input, parameters, weights with the first digits of their sha256, and licence.
    """
    from karmma_pipeline.models.backbones.describe import list_backbones

    rows = list_backbones()
    width = max(len(row["name"]) for row in rows)
    for row in rows:
        size = f"{row['parameters'] / 1e6:.1f} M" if row["parameters"] else ""
        line = f"{row['name']:{width}} {row['input']:7}{size:>7}  {', '.join(row['weights'])}"
        click.echo(line.rstrip())


@backbones.command("show")
@click.argument("name", shell_complete=backbone_names)
@click.option(
    "--clip",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Run the backbone on this video and print statistics of its tokens.",
)
@set_option
def backbones_show(name: str, clip: Path | None, overrides: tuple[str, ...]) -> None:
    """Print input, tokens and cost of a backbone.

    --set overrides settings of the backbone, such as --set frames=32.

    --clip needs weights (--set weights=...). If they include a classification head, the top-5
    classes are printed too.
    """
    import yaml

    from karmma_pipeline import config
    from karmma_pipeline.models.backbones import BackboneChoice
    from karmma_pipeline.models.backbones.choice import WITHOUT_WEIGHTS
    from karmma_pipeline.models.backbones.describe import describe, digest

    drawn = clip is None and name not in WITHOUT_WEIGHTS
    weights = "random:0" if drawn else "DEFAULT"
    choice = config.build(BackboneChoice, {"name": name, "weights": weights}, name, overrides)
    if clip is None:
        facts = {**describe(choice), **digest(choice)}
    else:
        from karmma_pipeline.extraction.preview import show_clip

        facts = show_clip(choice, clip)
    click.echo(
        yaml.safe_dump(facts, sort_keys=False, default_flow_style=None, allow_unicode=True).rstrip()
    )


@backbones.command("fetch")
@click.argument("name", shell_complete=backbone_names)
@click.argument("weights", default="DEFAULT")
@click.option(
    "--to",
    type=click.Path(path_type=Path),
    help="Output folder; default: the cache of torch or of the Hugging Face hub.",
)
def backbones_fetch(name: str, weights: str, to: Path | None) -> None:
    """Download published weights, for nodes without internet.

    timm:NAME and hf:OWNER/NAME are downloaded from the Hugging Face hub (or HF_ENDPOINT) to its
    cache (HF_HOME), safetensors only. Interrupted downloads resume.
    """
    from karmma_pipeline.models.backbones import fetch

    click.echo(f"weights: {fetch(name, weights, to)}")


@click.command()
@recipe_argument
@set_option
@click.option(
    "--json", "target", type=click.Path(path_type=Path), help="Also write the results as JSON."
)
@click.option("--no-probe", is_flag=True, help="Only check that files exist; do not open them.")
@click.option(
    "--no-calibrate",
    is_flag=True,
    help="Skip the time estimate, which decodes and runs a few clips.",
)
def plan(
    recipe: Path,
    overrides: tuple[str, ...],
    target: Path | None,
    no_probe: bool,
    no_calibrate: bool,
) -> None:
    """Check the inputs and estimate time and disk.

    Checks files, clips and splits, and writes nothing. Exits with code 3 if more clips will fail
    than the recipe allows, and with code 1 if extraction would refuse to start, for example
    if the disk is too small.
    """
    resolved = load_recipe("extract", recipe, overrides, writes=False)
    click.echo("reading the manifest and checking the files ...", err=True)
    from karmma_pipeline import files
    from karmma_pipeline.errors import KarmmaError, TooManyFailuresError, counted
    from karmma_pipeline.extraction.estimate.report import estimate, text

    made = estimate(resolved, probe=not no_probe, calibrate=not no_calibrate)
    click.echo(text(made, resolved, recipe))
    if target is not None:
        files.write_json(target, made)
        click.echo(f"plan: {target}")
    good = not (made["too_many_lost"] or made["problem"])
    finish(then=f"karmma extract {shlex.quote(str(recipe))}" if good else None)
    if made["too_many_lost"]:
        raise TooManyFailuresError(
            f"{recipe}: {made['clips_lost_to_faults']:,} of {counted(made['clips'], 'clip')} will "
            "lose a modality to the errors above, more than "
            f"max_failures={resolved.max_failures:g} allows; fix them, or raise it."
        )
    if made["problem"]:
        raise KarmmaError(made["problem"])
