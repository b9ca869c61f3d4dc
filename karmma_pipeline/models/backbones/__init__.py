"""Frozen feature extractors: torchvision's video and image networks, or one's own."""

from karmma_pipeline.models.backbones.backbone import Backbone
from karmma_pipeline.models.backbones.choice import BackboneChoice
from karmma_pipeline.models.backbones.describe import describe, list_backbones, top_classes
from karmma_pipeline.models.backbones.registry import (
    ARCHITECTURES,
    ENTRY_POINTS,
    Architecture,
    FrameTransform,
)
from karmma_pipeline.models.backbones.state_dicts import fetch

__all__ = [
    "ARCHITECTURES",
    "ENTRY_POINTS",
    "Architecture",
    "Backbone",
    "BackboneChoice",
    "FrameTransform",
    "describe",
    "fetch",
    "list_backbones",
    "top_classes",
]
