"""`karmma submit` and `karmma status`: the pipeline, end to end, as batch jobs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from karmma_pipeline.batch.recipe import Site

chain_argument = click.argument("chain", type=click.Path(path_type=Path))
site_option = click.option(
    "--site",
    type=click.Path(path_type=Path),
    help="Cluster settings (account, partition, modules) as YAML.",
)


@click.command()
@chain_argument
@site_option
@click.option("--dry-run", is_flag=True, help="Print the batch scripts and submit nothing.")
@click.option(
    "--launcher",
    type=click.Choice(["slurm", "local"]),
    default="slurm",
    show_default=True,
    help="local: run the chain on this machine, parts of an array side by side.",
)
def submit(chain: Path, site: Path | None, dry_run: bool, launcher: str) -> None:
    """Send a chain of stages to Slurm, or run it locally.

    Running it again skips finished stages.
    """
    from karmma_pipeline.batch import launch

    settings = _read_site(site)
    if dry_run:
        click.echo(launch.scripts(chain, settings), nl=False)
    elif launcher == "local":
        from karmma_pipeline.jobs import StopFlag

        with StopFlag() as stop:
            launch.run_locally(chain, settings, stop, click.echo)
    else:
        launch.submit(chain, settings, click.echo)


@click.command()
@chain_argument
def status(chain: Path) -> None:
    """Show how far each stage of a chain is.

    Jobs in the queue are shown beside what lies on disk.
    """
    from karmma_pipeline.batch import launch

    click.echo(launch.status(chain))


def _read_site(path: Path | None) -> Site:
    import os

    from karmma_pipeline import config
    from karmma_pipeline.batch.recipe import Site

    site = Site() if path is None else config.load(Site, path)
    os.environ.update(site.env)  # such as TORCH_HOME: the checks look where the nodes will
    return site
