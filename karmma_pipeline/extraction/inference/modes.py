"""Settles how each network computes, once for all jobs and restarts of an extraction.

A calibration looks at clocks, so two of them may differ. What a store records counts first, then
what another job of the extraction has found; only where there is neither is something measured.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from karmma_pipeline import config, files
from karmma_pipeline.extraction.inference.calibrate import auto, calibrate, fixed
from karmma_pipeline.extraction.inference.networks import Networks, network_key
from karmma_pipeline.extraction.inference.runner import Mode
from karmma_pipeline.extraction.recipe import ExtractRecipe
from karmma_pipeline.store import Catalog

FOLDER = "forward"
"""Folder beside the stores: one file per network, written by the job that was first."""


def decide(networks: Networks, stores: Mapping[str, Path], note: Callable[[str], None]) -> None:
    """Put each network into its mode; keys that the recipe fixes are the recipe's.

    Args:
        networks: of all sets.
        stores: by the name of the set; there or not.
        note: told in a line what matched in a weights file, and how a network computes.
    """
    recipe = networks.recipe
    recorded = dict(_recorded(recipe, stores))
    for key, network in networks.all.items():
        backbone = network.backbone
        if backbone.choice.source == "file":
            note(f"{backbone.choice.weights}: {backbone.loaded.report()}")
        mode = recorded.get(key) or _agreed(networks, key)
        network.halved = 0
        network.use(mode.model_copy(update=fixed(recipe)))
        if backbone.choice.source != "none":
            note(f"{backbone.choice.name}: {network.mode}")


def _agreed(networks: Networks, key: str) -> Mode:
    """Return what another job found, else measure and tell the others."""
    recipe, network = networks.recipe, networks.all[key]
    if network.backbone.choice.source == "none" or not auto(recipe):
        return Mode(**fixed(recipe))
    path = recipe.out / FOLDER / f"{key[:16]}.json"
    if path.is_file():
        return config.load(Mode, path)
    mode = calibrate(network, networks.inputs[key], recipe)
    return config.build(Mode, files.claim_json(path, mode.model_dump(mode="json")), str(path))


def _recorded(recipe: ExtractRecipe, stores: Mapping[str, Path]) -> Iterator[tuple[str, Mode]]:
    for name, root in stores.items():
        if not (root / "spec.json").is_file():
            continue
        there = Catalog(root).spec.modalities
        for modality, choice in recipe.sets[name].items():
            computed = there[modality].computed if modality in there else {}
            if computed:
                yield network_key(choice), config.build(Mode, computed, str(root))
