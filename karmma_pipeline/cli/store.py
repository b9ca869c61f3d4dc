"""`karmma store`: looks at feature stores and works on them."""

from __future__ import annotations

from pathlib import Path

import click

from karmma_pipeline.cli.options import Commands


@click.group(cls=Commands)
def store() -> None:
    """Look at feature stores."""


@store.command("info")
@click.argument("path", type=click.Path(path_type=Path))
def store_info(path: Path) -> None:
    """Print what a store holds and where it came from."""
    import yaml

    from karmma_pipeline.data.store import info

    click.echo(yaml.safe_dump(info(path), sort_keys=False).rstrip())


@store.command("verify")
@click.argument("path", type=click.Path(path_type=Path))
def store_verify(path: Path) -> None:
    """Check every byte of a store against its checksums."""
    from karmma_pipeline.data.store import verify
    from karmma_pipeline.errors import StoreError

    damages = verify(path)
    for damage in damages:
        click.echo(str(damage))
    if damages:
        raise StoreError(f"{path}: {len(damages)} damaged places; they are listed above.")
    click.echo(f"{path}: whole")


@store.command("finalize")
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--parts", default=1, help="Number of tasks of the array, to name what is missing.")
def store_finalize(paths: tuple[Path, ...], parts: int) -> None:
    """Join the shards of all parts; extraction's last part does this itself.

    Refuses while a shard is missing, and prints the command that makes it.
    """
    from karmma_pipeline.data.store import finalize
    from karmma_pipeline.extract.parts import finish, recipe_of

    for path in paths:
        recipe = recipe_of(path)
        if recipe is None:
            finalize(path)
        else:
            finish(recipe, parts)
        click.echo(f"{path}: complete")
