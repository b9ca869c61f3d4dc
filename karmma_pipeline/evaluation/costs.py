"""What one clip costs on every subset of modalities: FLOPs and parameters.

FLOPs count 2 per multiply-add (`torch.utils.flop_counter`), one clip, backbones of the present
modalities included. The fusion block is counted twice over: with absent modalities left out of
the sequence, the convention of the paper's figures, and as the model treats them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from types import MappingProxyType
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from karmma_pipeline import own_code
from karmma_pipeline.errors import KarmmaError
from karmma_pipeline.evaluation.peak_memory import peak_memory_mib
from karmma_pipeline.evaluation.results import Cost
from karmma_pipeline.jobs import StopFlag
from karmma_pipeline.modalities import canonical, evaluated_subsets
from karmma_pipeline.models.absence import find_rule
from karmma_pipeline.models.architectures import build_model
from karmma_pipeline.models.backbones import ARCHITECTURES, BackboneChoice
from karmma_pipeline.models.backbones.backbone import recorded
from karmma_pipeline.models.backbones.describe import describe
from karmma_pipeline.models.backbones.registry import LIBRARIES, find
from karmma_pipeline.models.fusion import FusionSize, TokenModel
from karmma_pipeline.models.saved import ModelCard

# The one module of package.module:factory that is no code of a stranger: the demo's networks.
_OURS = "karmma_pipeline.demo.networks"


@dataclass(frozen=True)
class SubsetCost:
    """Cost of one clip with some modalities.

    gflops: absent modalities left out. gflops_as_run: as the model treats absence.
    """

    modalities: tuple[str, ...]
    gflops: float
    gflops_as_run: float
    parameters: int


def subset_costs(
    backbones: Mapping[str, BackboneChoice],
    size: FusionSize,
    heads: Mapping[str, int],
    model: str = "",
    model_args: Mapping[str, Any] = MappingProxyType({}),
) -> list[SubsetCost]:
    """Count FLOPs and parameters for every subset that is evaluated.

    On the meta device, where it takes no memory. Parameters are those of the networks that run for
    the subset. A model of one's own is asked with all its modalities, the others masked, on the
    CPU: nobody else knows what it leaves out.
    """
    facts = {m: _describe(choice) for m, choice in backbones.items()}
    shapes = {m: choice.output_shape for m, choice in backbones.items()}
    whole = partial(build_model, model, model_args, size, shapes, heads)
    rows = []
    for subset in evaluated_subsets(backbones):
        mine = {m: shapes[m] for m in subset}
        if own_code.is_own(model):
            gflops, parameters = _count(whole, shapes, subset, "cpu")
            as_run = gflops
        else:
            build = partial(build_model, model, model_args, size, mine, heads)
            gflops, parameters = _count(build, mine, subset)
            left_out = model == "late_fusion" or not find_rule(size.absent).in_sequence
            as_run = gflops if left_out else _count(whole, shapes, tuple(shapes))[0]
        extractors = sum(facts[m][0] for m in subset)
        parameters += sum(facts[m][1] for m in subset)
        rows.append(SubsetCost(subset, extractors + gflops, extractors + as_run, parameters))
    return rows


@cache
def _describe(choice: BackboneChoice) -> tuple[float, int]:
    facts = describe(choice)
    return facts["gflops"], facts["parameters"]


def _count(
    build: Callable[[], TokenModel],
    shapes: Mapping[str, tuple[int, int]],
    seen: Sequence[str],
    device: str = "meta",
) -> tuple[float, int]:
    """Return GFLOPs of one clip with some modalities, and parameters, of a model."""
    mask = torch.tensor([[m in seen for m in canonical(shapes)]])
    with torch.random.fork_rng(devices=[]), torch.device(device), torch.inference_mode():
        model = build().eval()
        tokens = {m: torch.zeros(1, *shape) for m, shape in shapes.items()}
        with FlopCounterMode(display=False) as counter:
            model(tokens, mask)
    return counter.get_total_flops() / 1e9, sum(p.numel() for p in model.parameters())


def model_costs(card: ModelCard, device: torch.device, memory: bool, stop: StopFlag) -> list[Cost]:
    """Return the costs of a saved model per subset; a store whose backbones are not ours has none.

    Args:
        card: of the model.
        device: where peak memory is measured.
        memory: whether it is.
        stop: ends the measurement of memory.
    """
    if not all(_is_known(facts.get("backbone")) for facts in card.provenance.values()):
        return []
    choices = {modality: _choice(facts) for modality, facts in card.provenance.items()}
    left_out = card.size.model_copy(update={"absent": "drop"})
    model = (card.model, card.model_args)
    peaks = (
        peak_memory_mib(choices, left_out, card.classes, str(device), stop, *model)
        if memory
        else {}
    )
    return [
        Cost(**asdict(cost), memory_mib=peaks.get(cost.modalities))
        for cost in subset_costs(choices, card.size, card.classes, *model)
    ]


def _is_known(name: object) -> bool:
    """Tell whether a network is one of ours, or of a library that is here and has it."""
    if not isinstance(name, str) or name.partition(":")[0] not in {*LIBRARIES, _OURS}:
        return name in ARCHITECTURES
    try:
        return bool(find(name).build)
    except KarmmaError:  # the package is not installed, or the configuration was not fetched
        return False


def _choice(facts: Mapping[str, Any]) -> BackboneChoice:
    """Return the backbone that a store's provenance names, with weights that cost nothing.

    All of it, wherever it is cut.
    """
    weights = "DEFAULT" if facts["backbone"] in {"boxes", "windows"} else "random:0"
    return BackboneChoice.model_validate({**recorded(facts), "weights": weights}).cut_at(None)
