"""Facts about backbones without building their weights: rows of a list, cost of a choice."""

from importlib.metadata import entry_points
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from karmma_pipeline.models.backbones.choice import BackboneChoice
from karmma_pipeline.models.backbones.registry import ARCHITECTURES, ENTRY_POINTS, Architecture


def list_backbones() -> list[dict[str, Any]]:
    """Return a row per network: name, input, frames, parameters, published weights.

    Networks of other packages are listed by name and factory; their code is not imported.
    """
    rows = [_row(name, architecture) for name, architecture in ARCHITECTURES.items()]
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
        "weights": [member.name for member in architecture.weights or ()],
    }


def describe(choice: BackboneChoice) -> dict[str, Any]:
    """Return shapes and cost of a choice, computed without weights.

    GFLOPs count 2 per multiply-add, for one clip, as the paper's figures do.
    """
    tokens, width = choice.output_shape
    with torch.device("meta"), torch.inference_mode():
        net = choice.architecture.headless().eval()
        with FlopCounterMode(display=False) as counter:
            choice.architecture.feature_map(net, torch.empty(1, *choice.input_shape))
    return {
        "backbone": choice.name,
        "input": list(choice.input_shape),
        "raw_grid": list(choice.raw_grid),
        "grid": list(choice.grid),
        "tokens": tokens,
        "width": width,
        "gflops": counter.get_total_flops() / 1e9,
        "parameters": sum(p.numel() for p in net.parameters()),
    }
