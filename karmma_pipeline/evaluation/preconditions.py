"""What an evaluation checks before anything is computed: settings that do not fit what is there."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from karmma_pipeline.data.loading.clips import clips_of_split
from karmma_pipeline.errors import ConfigError
from karmma_pipeline.evaluation.recipe import EvaluateRecipe
from karmma_pipeline.evaluation.robustness import lacking
from karmma_pipeline.evaluation.score import find_groups
from karmma_pipeline.evaluation.submission import check_label_space
from karmma_pipeline.store import TokenSource


def named_files(recipe: EvaluateRecipe) -> Iterator[Path]:
    """Yield the files that a recipe names beside runs and stores."""
    patterns = recipe.robustness.patterns if recipe.robustness is not None else {}
    files = (recipe.exclude, recipe.groups.unseen, *recipe.groups.tail.values(), *patterns.values())
    yield from (path for path in files if path is not None)


def check_settings(recipe: EvaluateRecipe, store: TokenSource) -> None:
    """Check all that a recipe asks of the clips and classes of a store.

    Raises:
        ConfigError: a list of clips or of patterns cannot be used, or the classes are not those of
            the submission.
        ManifestError: the split is empty, or a list of groups cannot be used.
    """
    clips = store.view_rows(clips_of_split(store, recipe.split, recipe.exclude))
    find_groups(store, clips, recipe.groups)
    if recipe.robustness is not None:
        for path in recipe.robustness.patterns.values():
            lacking(path, store, clips)
    if recipe.submission is not None:
        check_label_space(store.heads)


def check_runs(recipe: EvaluateRecipe, stores: Mapping[Path, TokenSource]) -> None:
    """Check all that a recipe asks of its runs.

    Args:
        recipe: of the evaluation.
        stores: run to what it is run on.

    Raises:
        ConfigError: as `check_settings`, or the runs differ in their clips, classes or modalities.
        ManifestError: as `check_settings`.
    """
    first, *others = stores
    for store in stores.values():
        check_settings(recipe, store)
    asked = {run: _asked(recipe, store) for run, store in stores.items()}
    for other in others:
        if asked[other] != asked[first]:
            raise ConfigError(
                f"runs {first} and {other} differ in clips, classes or modalities; "
                "evaluate them in separate reports."
            )


def _asked(recipe: EvaluateRecipe, store: TokenSource) -> tuple[Any, ...]:
    rows = store.view_rows(clips_of_split(store, recipe.split, recipe.exclude))
    return store.modalities, store.heads, np.sort(store.names(rows)).tolist()
