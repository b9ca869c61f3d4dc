"""`karmma demo` and `karmma sample`."""

from __future__ import annotations

import shlex
import time
from pathlib import Path

import click

_seed_option = click.option(
    "--seed",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Seed of the generated data.",
)


@click.command()
@click.argument("out", type=click.Path(path_type=Path), default=Path("karmma-demo"))
@click.option("--quick", is_flag=True, help="Smoke test on a few clips and epochs.")
@_seed_option
@click.option(
    "--end-to-end", is_flag=True, help="Also train a student end to end, backbones included."
)
@click.pass_context
def demo(ctx: click.Context, out: Path, quick: bool, seed: int, end_to_end: bool) -> None:
    """Run all stages on generated clips and write a report.

    Takes a few minutes on a CPU. Each stage is printed as a command that can also be run by
    itself; finished stages are skipped when the demo is run again. Models are trained with three
    seeds and evaluated on a held-out test split.
    """
    from karmma_pipeline.demo import commands, write_recipes

    root = ctx.find_root().command
    assert isinstance(root, click.Group)  # noqa: S101  (main is one)
    started = time.monotonic()
    click.echo("Each stage below is a command that you can also run yourself:\n")
    write_recipes(out, quick=quick, end_to_end=end_to_end)
    for arguments in commands(out, quick=quick, seed=seed):
        click.secho(f"$ karmma {shlex.join(arguments)}", bold=True)
        root.main(arguments, prog_name="karmma", standalone_mode=False)
        click.echo()
    click.echo(f"{time.monotonic() - started:.0f} s in total. Open {out / 'report' / 'index.html'}")


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--clips", default=1000, show_default=True, help="Number of train and val clips.")
@click.option(
    "--test",
    default=0,
    show_default=True,
    help="Number of test clips, with digits by unseen writers.",
)
@_seed_option
def sample(out: Path, clips: int, test: int, seed: int) -> None:
    """Generate a labelled data set of videos with audio.

    The clips show handwritten digits that move across the frame.
    """
    from karmma_pipeline.data.sample import write_sample
    from karmma_pipeline.jobs import StopFlag

    with StopFlag() as stop:
        click.echo(f"manifest: {write_sample(out, clips, seed, stop, test)}")
