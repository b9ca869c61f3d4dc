"""The clips of an extraction: read from its data set, checked against the networks it asks for."""

import difflib
from pathlib import Path

from karmma_pipeline import files
from karmma_pipeline.data.datasets import read_dataset
from karmma_pipeline.data.manifest import SIDECAR, Manifest, read_manifest
from karmma_pipeline.errors import ConfigError
from karmma_pipeline.extraction.recipe import ExtractRecipe
from karmma_pipeline.modalities import KNOWN


def read_clips(recipe: ExtractRecipe) -> Manifest:
    """Read the clips of a recipe's ``manifest`` or ``dataset``.

    Raises:
        ManifestError: an annotation file is missing or faulty.
        ConfigError: a set asks for a modality of its own naming that no clip has.
    """
    if recipe.manifest is not None:
        manifest = read_manifest(recipe.manifest)
    else:
        assert recipe.dataset is not None  # noqa: S101  (the recipe has one of the two)
        manifest = read_dataset(recipe.dataset)
    there = {modality for clip in manifest.clips for modality in clip.media}
    for name, choices in recipe.sets.items():
        for modality in choices:
            if modality not in there and modality not in KNOWN:
                near = difflib.get_close_matches(modality, [*there, *KNOWN], n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"they have: {', '.join(there)}"
                raise ConfigError(f"sets.{name}.{modality}: no clip has this modality; {hint}")
    return manifest


def write_groups(folder: Path, manifest: Manifest) -> None:
    """Write the sidecar that `karmma evaluate` reads, if the data set publishes groups."""
    groups = manifest.groups
    if groups.unseen or groups.tail:
        tail = {head: list(ids) for head, ids in groups.tail.items()}
        files.write_json(folder / SIDECAR, {"unseen": list(groups.unseen), "tail": tail})
