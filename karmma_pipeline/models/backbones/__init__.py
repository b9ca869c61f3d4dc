"""Frozen feature extractors: torchvision's video and image networks, or one's own."""

from karmma_pipeline.models.backbones.backbone import Backbone as Backbone
from karmma_pipeline.models.backbones.choice import BackboneChoice as BackboneChoice
from karmma_pipeline.models.backbones.describe import describe as describe
from karmma_pipeline.models.backbones.describe import list_backbones as list_backbones
from karmma_pipeline.models.backbones.describe import top_classes as top_classes
from karmma_pipeline.models.backbones.registry import ARCHITECTURES as ARCHITECTURES
from karmma_pipeline.models.backbones.registry import ENTRY_POINTS as ENTRY_POINTS
from karmma_pipeline.models.backbones.registry import Architecture as Architecture
from karmma_pipeline.models.backbones.registry import FrameTransform as FrameTransform
from karmma_pipeline.models.backbones.state_dicts import fetch as fetch
