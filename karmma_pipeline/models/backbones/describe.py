"""Facts about backbones without building their weights: rows of a list, cost of a choice."""

from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from karmma_pipeline.errors import CheckpointError, ConfigError
from karmma_pipeline.models.backbones import hub, state_dicts
from karmma_pipeline.models.backbones.backbone import Backbone, read_weights
from karmma_pipeline.models.backbones.choice import BackboneChoice
from karmma_pipeline.models.backbones.names import ENTRY_POINTS, PUBLISHED, cached_sha256
from karmma_pipeline.models.backbones.registry import ARCHITECTURES, Architecture


def list_backbones() -> list[dict[str, Any]]:
    """Return a row per network: name, input, frames, parameters, published weights.

    Weights of torchvision come with the first digits of their sha256, which it publishes. Networks
    of other packages are listed by name and factory, and those of timm and transformers that are
    tested by name, licence and, once fetched, sha256; their code is not imported.
    """
    rows = [_row(name, architecture) for name, architecture in ARCHITECTURES.items()]
    for name, (kind, licence) in PUBLISHED.items():
        sha256 = cached_sha256(name)
        fetched = f"sha256 {sha256[:8]}" if sha256 else "fetched"
        facts = [licence, "not fetched" if sha256 is None else fetched]
        row = {"name": name, "input": kind, "frames": None, "parameters": None, "weights": facts}
        rows.append(row)
    return rows + [
        {"name": e.name, "input": e.value, "frames": None, "parameters": None, "weights": []}
        for e in sorted(entry_points(group=ENTRY_POINTS), key=lambda e: e.name)
    ]


def _row(name: str, architecture: Architecture) -> dict[str, Any]:
    with torch.device("meta"):
        net = architecture.headless()
    return {
        "name": name,
        "input": architecture.kind,
        "frames": architecture.frames,
        "parameters": sum(p.numel() for p in net.parameters()),
        "weights": [
            f"{member.name} (sha256 {Path(member.url).stem.rpartition('-')[2]})"
            for member in architecture.weights or ()
        ],
    }


def describe(choice: BackboneChoice) -> dict[str, Any]:
    """Return shapes and cost of a choice, computed without weights.

    GFLOPs count 2 per multiply-add, for one clip, as the paper's figures do.

    Raises:
        CheckpointError: the weights are a file that is not there.
    """
    if choice.source == "file" and not Path(choice.weights).is_file():
        raise CheckpointError(f"{choice.weights}: no such weights file.")
    tokens, width = choice.output_shape
    with torch.device("meta"), torch.inference_mode():
        net = choice.architecture.headless().eval()
        with FlopCounterMode(display=False) as counter:
            choice.architecture.features(net, torch.empty(1, *choice.input_shape))
    return {
        "backbone": choice.name,
        "input": list(choice.input_shape),
        "raw_grid": list(choice.raw_grid),
        "grid": list(choice.grid),
        "tokens": tokens,
        "width": width,
        "gflops": counter.get_total_flops() / 1e9,
        "parameters": sum(p.numel() for p in net.parameters()),
        **choice.architecture.facts,
        **_warned(choice.architecture.facts.get("licence", "")),
    }


def digest(choice: BackboneChoice) -> dict[str, str]:
    """Return the digest of the weights, as stores record it, or that they are to be fetched.

    Where a choice draws its own, it is that of `DEFAULT`; nothing, where there are no weights.
    """
    if choice.source == "none":
        return {}
    if choice.source == "random":
        choice = choice.model_copy(update={"weights": "DEFAULT"})
    try:
        return {"weights_sha256": Backbone(choice).loaded.digest}
    except CheckpointError:
        return {"weights_sha256": "not fetched"}
    except ConfigError:  # one's own network publishes none
        return {}


def _warned(licence: str) -> dict[str, Any]:
    return {"non_commercial": True} if hub.non_commercial(licence) else {}


def top_classes(choice: BackboneChoice, x: Tensor, count: int = 5) -> list[tuple[str, float]]:
    """Return the classes that the head finds most likely, and their probabilities.

    Args:
        choice: a video network with weights from a file or published ones.
        x: one input, float32 [1, 3, T, h, w].
        count: classes to return.

    Returns:
        Nothing where the weights hold no head, or one whose classes are not known.
    """
    architecture = choice.architecture
    name = choice.weights if choice.source == "published" else "DEFAULT"
    member = state_dicts.enum_member(architecture, name)
    if choice.source == "random" or architecture.kind != "video" or member is None:
        return []
    classes: list[str] = member.meta["categories"]
    whole = architecture.build(weights=None).eval()
    where, tensors = read_weights(choice)
    try:
        loaded = state_dicts.fill(whole, tensors, where)
    except CheckpointError:
        return []
    lacking = (*loaded.missing, *loaded.wrong_shape)
    if any(key.startswith(f"{head}.") for key in lacking for head in architecture.heads):
        return []
    with torch.inference_mode():
        best = whole(x).softmax(-1)[0].topk(count)
    return [
        (classes[index], probability)
        for probability, index in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]
