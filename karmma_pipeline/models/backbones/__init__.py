"""Frozen feature extractors: networks of torchvision, timm and transformers, or one's own."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from karmma_pipeline.models.backbones.backbone import Backbone as Backbone
    from karmma_pipeline.models.backbones.choice import BackboneChoice as BackboneChoice
    from karmma_pipeline.models.backbones.frame_transform import FrameTransform as FrameTransform
    from karmma_pipeline.models.backbones.layers import frame_by_frame as frame_by_frame
    from karmma_pipeline.models.backbones.registry import ARCHITECTURES as ARCHITECTURES
    from karmma_pipeline.models.backbones.registry import ENTRY_POINTS as ENTRY_POINTS
    from karmma_pipeline.models.backbones.registry import Architecture as Architecture
    from karmma_pipeline.models.backbones.registry import Stages as Stages
    from karmma_pipeline.models.backbones.state_dicts import fetch as fetch
else:
    # A recipe names a network by `BackboneChoice`; that must not import torch.
    _MODULES = {
        "Backbone": "backbone",
        "BackboneChoice": "choice",
        **dict.fromkeys(("ARCHITECTURES", "ENTRY_POINTS", "Architecture", "Stages"), "registry"),
        "FrameTransform": "frame_transform",
        "fetch": "state_dicts",
        "frame_by_frame": "layers",
    }

    def __getattr__(name: str) -> Any:
        from importlib import import_module

        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
