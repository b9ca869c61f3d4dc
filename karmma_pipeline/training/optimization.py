"""How the weights move: gradient in one piece, optimiser, learning rate, moving average (EMA)."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from karmma_pipeline.models.cut import suffixes_of
from karmma_pipeline.training.recipe import Optimiser


class Gradient:
    """The gradient of all parameters, and the loss with its parts, in one buffer.

    Parameters' ``grad`` are views into it, so one call zeroes, sums over ranks, measures or
    clips all of it. A parameter that a step does not touch has a gradient of zero, whatever
    the number of ranks.

    Args:
        model: whose parameters.
        terms: how many numbers go with the gradient, the loss first.
    """

    def __init__(self, model: nn.Module, terms: int = 1) -> None:
        parameters = [p for p in model.parameters() if p.requires_grad]
        total = sum(p.numel() for p in parameters)
        # The last numbers are losses: one sum over ranks, and one wait, serve both.
        self.buffer = torch.zeros(total + terms, device=parameters[0].device)
        self._all, self._terms = self.buffer[:total], self.buffer[total:]
        start = 0
        for p in parameters:
            # A view, which backward adds to in place. Nobody may set grad to None after this
            # (no `zero_grad`): backward would put a tensor of its own there, and the buffer
            # that is summed and clipped would no longer be what the optimiser reads.
            p.grad = self.buffer[start : start + p.numel()].view_as(p)
            start += p.numel()

    def zero(self) -> None:
        """Begin a step."""
        self.buffer.zero_()

    def add_loss(self, terms: Sequence[Tensor]) -> None:
        """Add a part of the loss, already sent backward, and of its parts."""
        self._terms += torch.stack([term.detach() for term in terms])

    def clip(self, largest: float) -> tuple[list[float], float]:
        """Shrink the gradient to a norm of at most ``largest``; return losses and norm before."""
        norm = self._all.norm()
        *terms, length = torch.cat(
            [self._terms, norm[None]]
        ).tolist()  # the one wait for the device
        if length > largest:
            self._all.mul_(largest / (length + 1e-6))
        return terms, length


#: In a group of the optimiser: its learning rate in units of the others'.
SCALE = "scale"


def adamw(model: nn.Module, settings: Optimiser, suffix_lr: float = 0.0) -> torch.optim.AdamW:
    """Return AdamW that decays matrices only, not biases, norms and learned tokens.

    ``suffix_lr``: of what lies behind the cuts of backbones, which gets groups of its own.
    """
    behind = [parameter for of in suffixes_of(model).values() for parameter in of.parameters()]
    numbers = {id(parameter) for parameter in behind}

    def chosen(matrix: bool, suffix: bool = False) -> Iterator[Tensor]:
        for name, parameter in model.named_parameters():
            is_matrix = parameter.dim() > 1 and "token" not in name
            if parameter.requires_grad and (id(parameter) in numbers, is_matrix) == (
                suffix,
                matrix,
            ):
                yield parameter

    groups: list[dict[str, Any]] = [
        {"params": list(chosen(matrix=True)), "weight_decay": settings.weight_decay},
        {"params": list(chosen(matrix=False)), "weight_decay": 0.0},
    ]
    if any(parameter.requires_grad for parameter in behind):
        scale = {SCALE: suffix_lr / settings.lr}
        for group, matrix in zip(groups[:2], (True, False), strict=True):
            groups.append({**group, "params": list(chosen(matrix, suffix=True)), **scale})
    return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, fused=True)


def learning_rate(settings: Optimiser, step: int, total: int) -> float:
    """Return the learning rate of a step: linear warm-up, then a cosine to zero."""
    warmup = max(1, round(settings.warmup * total))
    if step < warmup:
        return settings.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return settings.lr * 0.5 * (1 + math.cos(math.pi * progress))


def moving_average(model: nn.Module, decay: float) -> AveragedModel:
    """Return a copy of the model that follows it: ``update_parameters`` after each step.

    ema = d * ema + (1 - d) * weights, with d = min(decay, (1 + n) / (10 + n)) after n
    updates, so that the first weights, which are random, are soon forgotten.
    """

    def follow(averages: Sequence[Tensor], weights: Sequence[Tensor], updates: Any) -> None:
        # A pure function of the number of updates, which the training state keeps: a resumed
        # run weighs as one that was never stopped.
        n = float(updates)
        step = 1 - min(decay, (1 + n) / (10 + n))
        with torch.no_grad():
            torch._foreach_lerp_(list(averages), list(weights), step)

    return AveragedModel(model, multi_avg_fn=follow)
