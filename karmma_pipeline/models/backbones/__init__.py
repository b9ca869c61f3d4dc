"""Frozen feature extractors: torchvision's video and image networks, or one's own."""

from karmma_pipeline.models.backbones.backbone import (
    Backbone,
    BackboneChoice,
    describe,
    list_backbones,
)
from karmma_pipeline.models.backbones.registry import ARCHITECTURES, Architecture
from karmma_pipeline.models.backbones.transform import FrameTransform
from karmma_pipeline.models.backbones.weights import fetch

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "Backbone",
    "BackboneChoice",
    "FrameTransform",
    "describe",
    "fetch",
    "list_backbones",
]
