"""Assignment of shards to array tasks, and the remaining work."""

import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from karmma_pipeline import config, files
from karmma_pipeline.errors import StoreError, TooManyFailuresError, counted
from karmma_pipeline.extraction.recipe import ExtractRecipe
from karmma_pipeline.extraction.tables import FAILURES, write_tables
from karmma_pipeline.jobs import Part
from karmma_pipeline.store import Catalog, finalize
from karmma_pipeline.store.format import layout

#: In the folder of an extraction: the resolved recipe that made it.
RECIPE = "recipe.yaml"


def shard_seconds(catalog: Catalog) -> list[float]:
    """Return how many seconds of video each shard decodes: what its work is measured by.

    A clip that is its whole file counts as one of median length, for its length is only known once
    the file is opened.
    """
    start_s, stop_s = catalog.column("start_s", np.float64), catalog.column("stop_s", np.float64)
    seconds = np.asarray(stop_s - start_s)
    known = seconds[np.isfinite(seconds)]
    median = float(np.median(known)) if len(known) else 1.0
    seconds = np.where(np.isfinite(seconds), seconds, median)
    return [float(seconds[catalog.shard_range(s)].sum()) for s in range(catalog.shards)]


def missing_shards(stores: Iterable[Path]) -> set[int]:
    """Return the shards that some of the stores of one extraction lack.

    Raises:
        StoreError: a store was not even begun.
    """
    catalogs = [Catalog(path) for path in stores]
    return {s for c in catalogs for s in set(range(c.shards)) - c.committed()}


def missing_parts(stores: Sequence[Path], count: int) -> list[Part]:
    """Return the parts of ``count`` that have something to do.

    Raises:
        StoreError: a store was not even begun.
    """
    missing = missing_shards(stores)
    costs = shard_seconds(Catalog(stores[0]))
    parts = [Part(index, count) for index in range(count)]
    return [part for part in parts if missing.intersection(part.shards(costs))]


def finish(recipe: ExtractRecipe, count: int = 1) -> int:
    """Join what all parts have made; run again, it changes nothing.

    Args:
        recipe: of the extraction.
        count: the number of parts it was shared out to, to name what is missing.

    Returns:
        How many clips lost a modality to an error.

    Raises:
        StoreError: shards are missing; the message has the command that makes them.
        TooManyFailuresError: complete, but more clips failed than the recipe allows.
    """
    stores = {name: recipe.out / name for name in recipe.sets}
    missing = missing_shards(stores.values())
    if missing:
        parts = missing_parts(list(stores.values()), count)
        shards = ", ".join(map(str, sorted(missing)[:20])) + (", ..." if len(missing) > 20 else "")
        raise StoreError(
            f"{recipe.out}: {counted(len(missing), 'shard')} missing ({shards}); run "
            f"`{commands(recipe.out / RECIPE, parts)}`, which extracts only these."
        )
    failed = join(recipe, stores)
    check_failures(recipe, failed, Catalog(next(iter(stores.values()))).count)
    return failed


def join(recipe: ExtractRecipe, stores: Mapping[str, Path]) -> int:
    """Complete whole stores and write their tables; return how many clips failed."""
    for path in stores.values():
        finalize(path)
    failed = write_tables(recipe.out, [Catalog(path) for path in stores.values()])
    files.sweep([recipe.out])
    return failed


def is_joined(store: Path) -> bool:
    """Tell whether a store was completed; see `finalize`."""
    return (store / layout.MANIFEST).is_file()


def check_failures(recipe: ExtractRecipe, failed: int, clips: int) -> None:
    """See that not more clips failed than the recipe allows.

    Raises:
        TooManyFailuresError: they did.
    """
    if not recipe.allows(failed, clips):
        raise TooManyFailuresError(
            f"{recipe.out / FAILURES}: {failed} of {counted(clips, 'clip')} lost a modality to an "
            f"error, max_failures={recipe.max_failures} allows {recipe.max_failures:.0%}; the "
            "stores are complete. See the hints in the table."
        )


def commands(recipe: Path, parts: Sequence[Part]) -> str:
    """Return the shortest command that makes what some parts lack."""
    name = shlex.quote(str(recipe))
    if len(parts) == 1 and parts[0].count > 1:
        return f"karmma extract {name} --part {parts[0]}"
    if parts and parts[0].count > 1:
        numbers = ",".join(str(part.index + 1) for part in parts)
        exported = f"--export=ALL,KARMMA_PARTS={parts[0].count}"
        return f"sbatch --array={numbers} {exported} extract/slurm.sbatch {name}"
    return f"karmma extract {name}"


def recipe_of(store: Path) -> ExtractRecipe | None:
    """Return the recipe of the extraction that a store belongs to, if it lies beside it."""
    path = store.parent / RECIPE
    if not path.is_file():
        return None
    recipe = config.load(ExtractRecipe, path).model_copy(update={"out": store.parent})
    return recipe if store.name in recipe.sets else None
