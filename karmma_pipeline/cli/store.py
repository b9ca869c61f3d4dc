"""`karmma store`: looks at feature stores and works on them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from karmma_pipeline.cli.options import Commands
from karmma_pipeline.errors import counted

if TYPE_CHECKING:
    from karmma_pipeline.store.joined import LabelSpaces

_store = click.argument("store", type=click.Path(path_type=Path))
_out = click.argument("out", type=click.Path(path_type=Path))


@click.group(cls=Commands)
def store() -> None:
    """Inspect, verify, merge, split and convert feature stores."""


@store.command("info")
@click.argument("path", type=click.Path(path_type=Path))
def store_info(path: Path) -> None:
    """Print the contents and provenance of a store."""
    import yaml

    from karmma_pipeline.store import info

    click.echo(yaml.safe_dump(info(path), sort_keys=False).rstrip())


@store.command("verify")
@click.argument("path", type=click.Path(path_type=Path))
@click.option(
    "--repair", is_flag=True, help="Remove damaged shards; the next extract rebuilds them."
)
def store_verify(path: Path, repair: bool) -> None:
    """Verify a store against its checksums."""
    from karmma_pipeline.errors import StoreError
    from karmma_pipeline.jobs import StopFlag
    from karmma_pipeline.store import repair as take_away
    from karmma_pipeline.store import verify

    with StopFlag(resumes=False) as stop:
        damages = verify(path, stop)
    for damage in damages:
        click.echo(str(damage))
    if damages and repair:
        for line in take_away(path, damages):
            click.echo(line)
        click.echo(
            f"{path}: run `karmma extract` with the same recipe (then `karmma store finalize` "
            "if nothing is left to extract)"
        )
    elif damages:
        raise StoreError(
            f"{path}: {counted(len(damages), 'damaged part')}, listed above; --repair removes "
            "them all, and `karmma extract` with the same recipe then rebuilds what was removed."
        )
    else:
        click.echo(f"{path}: OK")


@store.command("finalize")
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--parts", default=1, help="Number of array tasks; used to name the tasks with missing shards."
)
def store_finalize(paths: tuple[Path, ...], parts: int) -> None:
    """Complete a store that was extracted in parts.

    The last part to finish does this automatically. Fails if shards are missing and prints the
    command that extracts them.
    """
    from karmma_pipeline.extraction.progress import finish, recipe_of
    from karmma_pipeline.store import finalize

    for path in paths:
        recipe = recipe_of(path)
        if recipe is None:
            finalize(path)
        else:
            finish(recipe, parts)
        click.echo(f"{path}: complete")


@store.command("stage")
@_store
@click.argument("folder", type=click.Path(path_type=Path))
def store_stage(store: Path, folder: Path) -> None:
    """Copy a store to a local disk and verify the copy.

    An existing copy is verified again.
    """
    from karmma_pipeline.jobs import StopFlag
    from karmma_pipeline.store import stage

    with StopFlag() as stop:
        click.echo(f"store: {stage(store, folder, stop, check_again=True)}")


@store.command("merge")
@click.argument("stores", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="New store.")
@click.option(
    "--label-spaces",
    type=click.Choice(["same", "join"]),
    default="same",
    help="same: class lists must be equal; join: match classes by name.",
)
def store_merge(stores: tuple[Path, ...], out: Path, label_spaces: LabelSpaces) -> None:
    """Merge the clips and modalities of several stores."""
    from karmma_pipeline.jobs import StopFlag
    from karmma_pipeline.store.tools.rewrite import merge

    with StopFlag() as stop:
        merge(stores, out, label_spaces, stop)
    click.echo(f"store: {out}")


@store.command("split")
@_store
@_out
@click.option(
    "--by",
    type=click.Choice(["split", "group"]),
    help="Write one store per split or group into OUT.",
)
@click.option(
    "--ids",
    type=click.File(),
    help="Text file with one clip id per line; OUT contains these clips.",
)
def store_split(store: Path, out: Path, by: Any, ids: Any) -> None:
    """Split a store by split, group or a list of clips."""
    from karmma_pipeline.jobs import StopFlag
    from karmma_pipeline.store.tools.rewrite import select, split

    if (by is None) == (ids is None):
        raise click.UsageError("Give either --by or --ids.")
    with StopFlag() as stop:
        if ids is not None:
            select(store, out, [line.strip() for line in ids if line.strip()], stop)
            made = [out]
        else:
            made = split(store, out, by, stop)
    for path in made:
        click.echo(f"store: {path}")


@store.command("convert")
@_store
@_out
@click.option("--dtype", type=click.Choice(["float16", "bfloat16", "float32", "int8"]))
@click.option(
    "--pool",
    multiple=True,
    metavar="MODALITY=GRID",
    help="Average-pool to a smaller token grid, such as rgb=12,1,1.",
)
def store_convert(store: Path, out: Path, dtype: Any, pool: tuple[str, ...]) -> None:
    """Convert a store to another dtype or pool its tokens.

    Also unpacks archives that an earlier version compressed. To compress a store, use `tar --zstd`.
    """
    from karmma_pipeline.jobs import StopFlag
    from karmma_pipeline.store.tools.rewrite import convert
    from karmma_pipeline.store.tools.stage import decompress, is_archive

    with StopFlag() as stop:
        if is_archive(store):
            decompress(store, out, stop)
        else:
            convert(store, out, dtype, dict(_grid(text) for text in pool), stop)
    click.echo(f"store: {out}")


def _grid(text: str) -> tuple[str, list[int]]:
    modality, _, sides = text.partition("=")
    try:
        return modality, [int(side) for side in sides.split(",")]
    except ValueError:
        raise click.UsageError(f"--pool {text!r}: write MODALITY=12,1,1.") from None


@store.command("export")
@_store
@_out
@click.option(
    "--layout",
    type=click.Choice(["npy", "pt", "actionformer", "tim"]),
    default="npy",
    show_default=True,
    help="Plain files, or the named trainer's layout.",
)
def store_export(store: Path, out: Path, layout: Any) -> None:
    """Export tokens as one file per clip, for other trainers."""
    from karmma_pipeline.jobs import StopFlag
    from karmma_pipeline.store.tools.export import export

    with StopFlag() as stop:
        click.echo(f"{counted(export(store, out, layout, stop), 'file')}: {out}")


@store.command("import")
@click.argument("folder", type=click.Path(path_type=Path))
@_out
@click.option(
    "--csv",
    "clips",
    type=click.Path(path_type=Path),
    help="CSV with clip_id, split and labels; default: FOLDER/clips.csv.",
)
@click.option(
    "--source",
    required=True,
    help="Backbone, weights and preprocessing of the features; recorded as provenance.",
)
@click.option(
    "--dtype",
    type=click.Choice(["float16", "bfloat16", "float32", "int8"]),
    default="float16",
    show_default=True,
)
def store_import(folder: Path, out: Path, clips: Path | None, source: str, dtype: Any) -> None:
    """Import .npy or .npz features into a store.

    FOLDER contains one folder per modality with one file per clip, CLIP_ID.npy, of shape [N, D].
    `karmma store export` writes this layout.
    """
    from karmma_pipeline.jobs import StopFlag
    from karmma_pipeline.store.tools.imports import import_features

    with StopFlag() as stop:
        counts = import_features(folder, clips or folder / "clips.csv", out, source, dtype, stop)
    for modality, count in counts.items():
        click.echo(f"{modality}: {counted(count, 'clip')}")
    click.echo(f"store: {out}")


@store.command("diff")
@_store
@click.argument("other", type=click.Path(path_type=Path))
def store_diff(store: Path, other: Path) -> None:
    """Compare two stores; exit code 1 if they differ."""
    from karmma_pipeline.jobs import StopFlag
    from karmma_pipeline.store.tools.info import diff

    differ = False
    with StopFlag(resumes=False) as stop:
        for line in diff(store, other, stop):
            click.echo(line)
            differ = True
    if differ:
        raise click.exceptions.Exit(1)
    click.echo("the stores are identical")


@store.command("gc")
@_store
@click.option("--delete", is_flag=True, help="Delete the leftovers; default: only list them.")
def store_gc(store: Path, delete: bool) -> None:
    """List or delete leftovers of interrupted runs.

    Files that do not belong to the store are listed too.
    """
    from karmma_pipeline.store.integrity import collect, garbage

    removable = list(garbage(store))
    for one in removable:
        click.echo(str(one))
    if delete:
        collect(removable)
    told = "removed" if delete else "found (--delete removes them)"
    click.echo(f"{len(removable)} {told}" if removable else "no leftovers")
