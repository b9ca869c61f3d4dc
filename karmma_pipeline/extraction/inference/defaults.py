"""Default compute settings of a backbone: by a rule, or as recorded in the store.

The rule looks at the network, the recipe and the kind of the device; at no clock and at no free
memory. So parts of an extraction that start at the same time on different machines come to the
same answer without asking one another, which they must: which clips are computed together, and in
which order, decides the last bits of their tokens.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from karmma_pipeline import config
from karmma_pipeline.extraction.inference import openvino_engine
from karmma_pipeline.extraction.inference.networks import Networks, network_key
from karmma_pipeline.extraction.inference.runner import ComputeConfig, MemoryFormat, Network
from karmma_pipeline.extraction.recipe import ExtractRecipe
from karmma_pipeline.extraction.types import InputSpec
from karmma_pipeline.store import Catalog

_KEYS = ("precision", "memory_format", "batch_size")
_MAX_BATCH = {"cpu": 16, "cuda": 128}

#: What a store records of who chose, by the kind of the device.
BY_RULE = "default for {}"

# Memory of a pass that a batch may fill. On a CPU larger ones leave its caches and gain nothing; on
# a GPU it fits beside the weights into cards of 16 GB.
_BATCH_BYTES = {"cpu": 120e6, "cuda": 8e9}


def configure(networks: Networks, stores: Mapping[str, Path], note: Callable[[str], None]) -> None:
    """Settle how each network computes: the recipe counts first, then the store, then the rule.

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
        # Stores begun by earlier versions hold what was found fastest on one machine: they are
        # finished in that way, whatever the rule says.
        chosen = recorded.get(key) or by_rule(network, networks.inputs[key], recipe)
        if network.openvino is None:
            chosen = chosen.model_copy(update=_stated(recipe))
        elif key not in recorded:  # what cannot be converted is told before a store is made
            network.openvino.convert()
        network.use(chosen)
        if backbone.choice.source != "none":
            unmeasured = network.config.chosen == BY_RULE.format("cuda")
            says = "; the defaults for GPUs were not measured" if unmeasured else ""
            # A store that was begun keeps its engine.
            begins = bool(stores) and key not in recorded
            if begins and network.openvino is None and network.device.type == "cpu":
                says = openvino_engine.advice(backbone.choice.name)
            note(f"{_users(recipe, key)}: {backbone.choice.name}, {network.config}{says}")


def _users(recipe: ExtractRecipe, key: str) -> str:
    """Return the modalities whose tokens a network computes, such as ``teacher.rgb``."""
    return ", ".join(
        f"{name}.{modality}"
        for name, choices in recipe.sets.items()
        for modality, choice in choices.items()
        if network_key(choice) == key
    )


def by_rule(network: Network, spec: InputSpec, recipe: ExtractRecipe) -> ComputeConfig:
    """Return how a network computes if no store records it; `docs/extraction.md` has the rule."""
    if network.openvino is not None:  # whatever a recipe states for the others
        return ComputeConfig(chosen="by the engine")
    stated = _stated(recipe)
    if network.backbone.choice.source == "none" or all(key in stated for key in _KEYS):
        return ComputeConfig(**stated)
    chosen: dict[str, Any] = {"memory_format": memory_format(network.backbone), **stated}
    if "batch_size" not in chosen:
        chosen["batch_size"] = _batch_size(network, spec, recipe)
    return ComputeConfig(**chosen, chosen=BY_RULE.format(network.device.type))


def memory_format(net: nn.Module) -> MemoryFormat:
    """Return channels_last for a network of convolutions, contiguous for a transformer.

    Convolutions are faster with the channels together, everything else does not care or loses.
    A transformer has convolutions, too: its patch embedding and perhaps some that pool. So they
    are counted against the linear layers.
    """
    convolutions = sum(isinstance(m, nn.Conv2d | nn.Conv3d) for m in net.modules())
    linear = sum(isinstance(m, nn.Linear) for m in net.modules())
    return "channels_last" if convolutions > linear else "contiguous"


def example(spec: InputSpec, count: int) -> Tensor:
    """Return decoded clips [count, ...] of noise, as a network's input looks."""
    generator = torch.Generator().manual_seed(0)
    frames = (spec.frames,) if spec.per_frame else (1,)
    if spec.transform is None:  # log-mel, already standardised
        shape = (count, *(frames if spec.per_frame else ()), *spec.image)
        return torch.randn(shape, generator=generator)
    shape = (count, *frames, 3, *spec.image)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


def _stated(recipe: ExtractRecipe) -> dict[str, Any]:
    """Return the keys that a recipe states itself."""
    stated = {key: getattr(recipe, key) for key in _KEYS}
    return {"compile": recipe.compile, **{k: v for k, v in stated.items() if v != "auto"}}


def _batch_size(network: Network, spec: InputSpec, recipe: ExtractRecipe) -> int:
    """Return the largest power of two that fits; sizes of several networks then share factors."""
    kind = network.device.type
    room = _BATCH_BYTES[kind]
    if recipe.memory_gb:  # on a CPU it says how many passes run at once, seldom how large they are
        stated = recipe.memory_gb * 1e9
        room = min(room, stated) if kind == "cpu" else stated
    clip, size = network.clip_bytes(example(spec, 1)), 1
    while 2 * size <= _MAX_BATCH[kind] and 2 * size * clip <= room:
        size *= 2
    return size


def _recorded(
    recipe: ExtractRecipe, stores: Mapping[str, Path]
) -> Iterator[tuple[str, ComputeConfig]]:
    for name, root in stores.items():
        if not (root / "spec.json").is_file():
            continue
        there = Catalog(root).spec.modalities
        for modality, choice in recipe.sets[name].items():
            computed = there[modality].computed if modality in there else {}
            if computed:
                yield network_key(choice), config.build(ComputeConfig, computed, str(root))
