"""Models beside the fusion block: late fusion, and those of one's own; and how a name becomes one.

B clips in a batch, M modalities, N tokens of a modality, D width of its features, C classes.
"""

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from karmma_pipeline import own_code
from karmma_pipeline.errors import CheckpointError, ConfigError, named_line
from karmma_pipeline.modalities import canonical
from karmma_pipeline.models.fusion import FusionModel, FusionSize, TokenModel

Shapes = Mapping[str, tuple[int, int]]


class LateFusion(TokenModel):
    """A fusion block for each modality by itself; what they answer is averaged over present ones.

    Trained jointly: the loss is that of the average.

    Args:
        size: of each block; what it says of absence has no meaning here.
        modalities: name to (tokens N, backbone width).
        heads: name to number of classes C.
        average: of ``logits``, or of ``probabilities`` (then logits are their logarithm).
    """

    def __init__(
        self,
        size: FusionSize,
        modalities: Shapes,
        heads: Mapping[str, int],
        average: Literal["logits", "probabilities"] = "logits",
    ) -> None:
        super().__init__(modalities, heads)
        if average not in {"logits", "probabilities"}:
            raise ConfigError(
                f"model_args.average={average!r}: must be 'logits' or 'probabilities'."
            )
        self.average = average
        alone = size.model_copy(update={"absent": "drop"})
        self.alone = nn.ModuleDict(
            {m: FusionModel(alone, {m: modalities[m]}, heads) for m in self.modalities}
        )

    def forward(self, tokens: Mapping[str, Tensor], mask: Tensor) -> dict[str, Tensor]:
        """Classify a batch; see `FusionModel.forward`. With nothing present all logits are 0."""
        whole = torch.onnx.is_in_onnx_export()  # a graph that must serve every mask
        columns = enumerate(self.modalities)
        seen = [(column, m) for column, m in columns if whole or mask[:, column].any()]
        every = torch.ones_like(mask[:, :1])
        device = self.get_buffer(f"mean_{self.modalities[0]}").device
        mask = mask.to(device)
        B = mask.shape[0]
        total = {head: torch.zeros(B, C, device=device) for head, C in self.heads.items()}
        if self.average == "probabilities":
            total = {head: of - math.inf for head, of in total.items()}
        for column, m in seen:
            here = mask[:, column, None]
            features = self._standardised(m, tokens[m], here[..., None])
            for head, of in self.alone[m]({m: features}, every).items():
                total[head] = torch.where(here, self._add(total[head], of.float()), total[head])
        count = mask.sum(dim=1, keepdim=True)
        return {head: self._mean(of, count) for head, of in total.items()}

    def _add(self, total: Tensor, logits: Tensor) -> Tensor:
        if self.average == "logits":
            return total + logits
        return torch.logaddexp(total, F.log_softmax(logits, dim=1))

    def _mean(self, total: Tensor, count: Tensor) -> Tensor:
        if self.average == "logits":
            return total / count.clamp(min=1)
        return torch.where(
            count > 0, total - count.clamp(min=1).float().log(), torch.zeros_like(total)
        )


class OwnModel(TokenModel):
    """A model of one's own behind the same door: it gets numbers, and answers are checked.

    Args:
        name: ``package.module:factory``.
        network: takes tokens, modality to float32 [B, N, D], standardised and zeros where absent,
            and a mask, bool [B, M] on their device; gives logits, head to [B, C].
        modalities: name to (tokens N, backbone width).
        heads: name to number of classes C.
    """

    def __init__(
        self, name: str, network: nn.Module, modalities: Shapes, heads: Mapping[str, int]
    ) -> None:
        super().__init__(modalities, heads)
        self.name, self.network = name, network

    def forward(self, tokens: Mapping[str, Tensor], mask: Tensor) -> dict[str, Tensor]:
        """Classify a batch; see `FusionModel.forward`.

        Raises:
            CheckpointError: the network gives something else than logits of every head.
        """
        mask = mask.to(self.get_buffer(f"mean_{self.modalities[0]}").device)
        features = {
            m: self._standardised(m, tokens[m], mask[:, column, None, None])
            for column, m in enumerate(self.modalities)
        }
        logits = self.network(features, mask)
        wanted = {head: (len(mask), C) for head, C in self.heads.items()}
        given = (
            {head: tuple(getattr(of, "shape", ())) for head, of in logits.items()}
            if isinstance(logits, Mapping)
            else type(logits).__name__
        )
        if given != wanted:
            raise CheckpointError(f"model={self.name!r}: returned {given}; expected {wanted}.")
        return {head: logits[head] for head in self.heads}


def build_model(
    name: str,
    arguments: Mapping[str, Any],
    size: FusionSize,
    modalities: Shapes,
    heads: Mapping[str, int],
) -> TokenModel:
    """Build a model with fresh weights.

    Args:
        name: empty: the fusion block; ``late_fusion``, or ``package.module:factory``.
        arguments: keywords of the factory.
        size: of a fusion block; a factory gets it if it has an argument ``size``.
        modalities: name to (tokens N, backbone width).
        heads: name to number of classes C.

    Raises:
        ConfigError: the factory cannot be imported or fails, or gives no module of float32
            parameters.
    """
    if not name:
        return FusionModel(size, modalities, heads)
    try:
        if name == "late_fusion":
            return LateFusion(size, modalities, heads, **arguments)
        make = own_code.find(name, "model")
        modalities = {m: modalities[m] for m in canonical(modalities)}  # as the mask's columns
        takes_size = "size" in inspect.signature(make).parameters
        given = {"size": size, **arguments} if takes_size else dict(arguments)
        network = make(dict(modalities), dict(heads), **given)
    except ConfigError:
        raise
    except Exception as error:  # whatever code of one's own raises
        reason = named_line(error)
        raise ConfigError(f"model={name!r}: could not be built ({reason}).") from error
    if not isinstance(network, nn.Module):
        raise ConfigError(
            f"model={name!r}: returned a {type(network).__name__}; a factory must return a "
            "torch.nn.Module."
        )
    _check_parameters(name, list(network.parameters()))
    return OwnModel(name, network, modalities, heads)


def _check_parameters(name: str, parameters: Sequence[nn.Parameter]) -> None:
    kinds = sorted({str(p.dtype) for p in parameters} - {"torch.float32"})
    if kinds or not any(p.requires_grad for p in parameters):
        what = f"parameters of {', '.join(kinds)}" if kinds else "no trainable parameters"
        raise ConfigError(f"model={name!r}: has {what}; it needs float32 parameters.")


def needs_whole_batches(model: nn.Module) -> list[str]:
    """Return the parts of a model whose numbers depend on which clips share a pass (BatchNorm)."""
    kind = nn.modules.batchnorm._BatchNorm
    return [name for name, part in model.named_modules() if isinstance(part, kind)]
