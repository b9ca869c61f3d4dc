"""Random frozen weights, ``random:SEED``: features without any download.

They are the same whatever the global random state, and useful: a random network keeps
inputs apart if its activations neither vanish nor explode on the way.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from math import prod

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from karmma_pipeline.errors import ConfigError
from karmma_pipeline.models.backbones.registry import Architecture

CALIBRATION = 2
"""Version of the calibrating pass below; part of the digest, since it decides the features."""

_POSITIONS = 2**21
"""Pixels (over all frames) of noise to calibrate with: small inputs give few positions in the
last maps, and need more clips for sound statistics."""


def parse_seed(weights: str) -> int | None:
    """Return the seed of ``random:SEED``, None for any other source.

    Raises:
        ConfigError: what follows the colon is no whole number.
    """
    if not weights.startswith("random:"):
        return None
    try:
        return int(weights.removeprefix("random:"))
    except ValueError:
        raise ConfigError(f"weights={weights!r}: write random:SEED with a whole number.") from None


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw CPU random numbers from a seed inside, and leave the global state as it was."""
    state = torch.get_rng_state()
    # Not torch.manual_seed, which would reset the generators of all GPUs too.
    torch.default_generator.manual_seed(seed)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_rng_state(state)


def random_net(architecture: Architecture, seed: int, shape: tuple[int, ...]) -> nn.Module:
    """Build a network with seeded random weights that works as a random feature extractor.

    Batch normalisation gets its running statistics from one pass of seeded noise of the input's
    shape, layer by layer, since each layer normalises with what it has just seen; with
    torchvision's own start (mean 0, variance 1) activations vanish or explode.
    """
    with seeded(seed):
        net = architecture.headless().eval()
        layers = [m for m in net.modules() if isinstance(m, _BatchNorm)]
        if layers:
            _calibrate(net, layers, architecture, shape)
    return net.eval()


def _calibrate(
    net: nn.Module, layers: list[_BatchNorm], architecture: Architecture, shape: tuple[int, ...]
) -> None:
    noise = _noise(shape, clips=min(32, max(2, _POSITIONS // prod(shape[1:]))))
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.momentum = None  # one plain average
        layer.train()
    with torch.inference_mode():
        architecture.feature_map(net, noise)
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
        if layer.running_var is not None:  # channels that noise hardly moves must not explode
            layer.running_var.clamp_(min=float(layer.running_var.mean()) / 10)


def _noise(shape: tuple[int, ...], clips: int) -> torch.Tensor:
    """Draw noise [clips, *shape] whose colour, contrast and coarseness vary as those of scenes do.

    Statistics of noise that is all alike fit no picture: features of real clips then come out
    hundreds of times too large.
    """
    one = [1] * (len(shape) - 1)
    mode = "trilinear" if len(shape) == 4 else "bilinear"
    noise = torch.zeros(clips, *shape)
    for coarseness in (16, 8, 4, 1):
        drawn = torch.randn(clips, 3, *(-(-side // coarseness) for side in shape[1:]))
        drawn = nn.functional.interpolate(drawn, shape[1:], mode=mode)
        noise += torch.rand(clips, 1, *one) * drawn
    return noise * torch.rand(clips, 1, *one) + torch.randn(clips, 3, *one)
