"""Object boxes as tokens: one token per sampled frame, for which no network is needed.

A frame's token is its slots side by side, each with (x centre, y centre, width, height, is a
hand, is an object, is there), all in 0..1; the fusion model's linear embedding learns from it.
The layout follows Something-Else's own loader and Radevski et al. (14 boxes per frame at most).
"""

from typing import Any

from torch import Tensor, nn

SLOTS = 14
"""Boxes of a frame."""

NUMBERS = 7
"""Numbers of a slot."""

FRAMES = 16
"""Sampled frames T where a recipe gives none."""


def build(weights: None = None) -> nn.Module:
    """Return the network without parameters."""
    return nn.Identity()


def feature_map(net: Any, x: Tensor) -> Tensor:
    """Turn boxes [B, SLOTS * NUMBERS, T] into a map [B, D, T, 1, 1]."""
    return net(x)[..., None, None]


def prepare(boxes: Tensor) -> Tensor:
    """Turn what the decoder gives, float [B, T, SLOTS, NUMBERS], into the network's input."""
    return boxes.float().flatten(2).transpose(1, 2)
