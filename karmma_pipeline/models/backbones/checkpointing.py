"""Gradient checkpointing: the backward pass computes anew what lies inside of a module."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

_NORM = nn.modules.batchnorm._BatchNorm


def compute_again(module: nn.Module) -> None:
    """Let a module keep what it is given for the backward pass, and no more.

    Whoever calls it, with whatever: stages in a row as well as blocks by the code of their library.
    """
    if getattr(module, "inplace", False):  # it overwrites what it is given, and keeps no more
        return
    module.forward = partial(_forward, module, module.forward)


def _forward(module: nn.Module, forward: Callable[..., Any], *given: Any, **named: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*given, **named)
    contexts = partial(_contexts, module)
    return checkpoint(forward, *given, use_reentrant=False, context_fn=contexts, **named)


def _contexts(
    module: nn.Module,
) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    return nullcontext(), _statistics_kept(module)


@contextmanager
def _statistics_kept(module: nn.Module) -> Iterator[None]:
    """Let batch norms use the statistics of the batch without learning from it a second time."""
    norms = [m for m in module.modules() if isinstance(m, _NORM) and m.training]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count
