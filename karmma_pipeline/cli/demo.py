"""`karmma demo` and `karmma sample`."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("out", type=click.Path(path_type=Path), default=Path("karmma-demo"))
@click.option("--quick", is_flag=True, help="A few clips and epochs: shows the road, not accuracy.")
@click.option("--seed", default=0, show_default=True, help="Seed of the data and of all training.")
def demo(out: Path, quick: bool, seed: int) -> None:
    """Run every stage on generated clips and write a report, in a few minutes on a CPU."""
    from karmma_pipeline.demo import run_demo

    run_demo(out, quick=quick, seed=seed)


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--clips", default=1000, show_default=True, help="Number of labelled clips.")
@click.option("--seed", default=0, show_default=True, help="Equal seeds give equal files.")
def sample(out: Path, clips: int, seed: int) -> None:
    """Write "digits in motion": labelled videos with sound, to try everything on."""
    from karmma_pipeline.data.sample import write_sample
    from karmma_pipeline.jobs import StopFlag

    with StopFlag() as stop:
        click.echo(f"manifest: {write_sample(out, clips=clips, seed=seed, stop=stop)}")
