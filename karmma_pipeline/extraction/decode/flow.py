"""Optical flow as pictures that an RGB network takes, from three sources with one scale.

The scale is px of the network's own input per ``gap_s``: motion of a file's frames (DIS, RAFT) is
measured there and scaled from the pair's real gap to ``gap_s``; a data set's own flow pictures are
resized to it with their values, and scaled from their pair's gap. T pairs, h and w the network's
input size, H and W the pictures' own.
"""

from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from karmma_pipeline.extraction.recipe import Flow
from karmma_pipeline.extraction.types import Pictures
from karmma_pipeline.models.backbones.frame_transform import FrameTransform
from karmma_pipeline.views import Side

_PRESETS = {
    "ultrafast": cv2.DISOPTICAL_FLOW_PRESET_ULTRAFAST,
    "fast": cv2.DISOPTICAL_FLOW_PRESET_FAST,
    "medium": cv2.DISOPTICAL_FLOW_PRESET_MEDIUM,
}
Motion = npt.NDArray[np.float32]


def dis_flow(settings: Flow, first: Pictures, second: Pictures) -> Motion:
    """Return the motion from ``first`` to ``second``, uint8 [T, 3, h, w] each.

    Returns:
        float32 [T, 2, h, w]: u (right) and v (down) in px of these pictures.
    """
    engine: Any = cv2.DISOpticalFlow.create(_PRESETS[settings.preset])
    flows = []
    for a, b in zip(first, second, strict=True):
        pair = [cv2.cvtColor(p.transpose(1, 2, 0), cv2.COLOR_RGB2GRAY) for p in (a, b)]
        flows.append(engine.calc(pair[0], pair[1], None).transpose(2, 0, 1))
    return np.stack(flows)


def resized(flow: Motion, transform: FrameTransform, side: Side = None) -> Motion:
    """Resize and crop flow [T, 2, H, W] as frames are, its values in px of the new size."""
    before = flow.shape[-2:]
    field = transform.resized(flow)
    # The resized side may be rounded: motion is scaled by what it has become, not by what was
    # asked for.
    after = field.shape[-2:]
    ratio = np.array([after[1] / before[1], after[0] / before[0]], np.float32)
    return np.ascontiguousarray(transform.cropped(field * ratio[:, None, None], side))


def as_pictures(settings: Flow, flow: Motion) -> Pictures:
    """Scale flow [T, 2, h, w] to bytes (u, v, 128), uint8 [T, 3, h, w], with 128 = no motion."""
    scaled = np.clip(flow / settings.bound_px, -1, 1) * 127 + 128
    pictures = np.full((len(flow), 3, *flow.shape[2:]), 128, np.uint8)
    # Rounded to nearest, for truncation would turn the noise around rest into a drift.
    pictures[:, :2] = np.rint(scaled)
    return pictures
