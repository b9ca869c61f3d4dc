"""`karmma submit` and `karmma status`: the pipeline, end to end, as batch jobs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from karmma_pipeline.cli.options import finish, set_option

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
@click.option("--dry-run", is_flag=True, help="Print the batch scripts without submitting them.")
@click.option(
    "--launcher",
    type=click.Choice(["slurm", "local"]),
    default="slurm",
    show_default=True,
    help="local: run the chain on this machine, array tasks in parallel.",
)
def submit(chain: Path, site: Path | None, dry_run: bool, launcher: str) -> None:
    """Submit a chain of stages to Slurm, or run it locally.

    Finished stages are skipped.
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
    """Show the progress of each stage of a chain.

    Checks the outputs on disk and the Slurm queue.
    """
    from karmma_pipeline.batch import launch

    click.echo(launch.status(chain))


@click.command()
@click.argument("sweep", type=click.Path(path_type=Path))
@set_option
@click.option(
    "--jobs",
    type=click.IntRange(min=1),
    help="Parallel runs; default: as many as CPUs and GPUs allow.",
)
@click.option("--status", "shown", is_flag=True, help="Show the progress of each method.")
@click.option("--slurm", is_flag=True, help="Submit the runs to Slurm as job arrays.")
@site_option
@click.option("--dry-run", is_flag=True, help="Print the batch scripts without submitting them.")
@click.option("--run", "name", metavar="NAME", help="Run only METHOD/seedS, or only `report`.")
def sweep(
    sweep: Path,
    overrides: tuple[str, ...],
    jobs: int | None,
    shown: bool,
    slurm: bool,
    site: Path | None,
    dry_run: bool,
    name: str | None,
) -> None:
    """Train methods with several settings and seeds.

    Writes one report that compares all runs. Finished runs are skipped.
    """
    from karmma_pipeline.batch import sweep_launch
    from karmma_pipeline.batch.sweep import load_sweep, run_one
    from karmma_pipeline.jobs import StopFlag

    settings = _read_site(site)
    loaded = load_sweep(sweep, overrides)
    if name is not None:
        with StopFlag() as stop:
            finish(run_one(loaded, name, stop))
    elif shown:
        click.echo(sweep_launch.status(loaded))
    elif dry_run:
        click.echo(sweep_launch.scripts(loaded, jobs, settings), nl=False)
    elif slurm:
        sweep_launch.submit(loaded, jobs, settings, click.echo)
    else:
        with StopFlag() as stop:
            sweep_launch.run_locally(loaded, jobs, settings, stop, click.echo)
            finish()


def _read_site(path: Path | None) -> Site:
    import os

    from karmma_pipeline import config
    from karmma_pipeline.batch.recipe import Site

    site = Site() if path is None else config.load(Site, path)
    os.environ.update(site.env)  # such as TORCH_HOME: the checks look where the nodes will
    return site
