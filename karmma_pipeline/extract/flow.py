"""Optical flow as pictures that an RGB network takes."""

from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from karmma_pipeline.extract.recipe import Flow

_PRESETS = {
    "ultrafast": cv2.DISOPTICAL_FLOW_PRESET_ULTRAFAST,
    "fast": cv2.DISOPTICAL_FLOW_PRESET_FAST,
    "medium": cv2.DISOPTICAL_FLOW_PRESET_MEDIUM,
}
Pictures = npt.NDArray[np.uint8]


def dis_flow(settings: Flow, first: Pictures, second: Pictures) -> npt.NDArray[np.float32]:
    """Return the motion from ``first`` to ``second``, uint8 [T, 3, h, w] each.

    Returns:
        float32 [T, 2, h, w]: u (right) and v (down) in px of these pictures per gap.
    """
    engine: Any = cv2.DISOpticalFlow.create(_PRESETS[settings.preset])
    flows = []
    for a, b in zip(first, second, strict=True):
        pair = [cv2.cvtColor(p.transpose(1, 2, 0), cv2.COLOR_RGB2GRAY) for p in (a, b)]
        flows.append(engine.calc(pair[0], pair[1], None).transpose(2, 0, 1))
    return np.stack(flows)


def as_pictures(settings: Flow, flow: npt.NDArray[np.float32]) -> Pictures:
    """Scale flow [T, 2, h, w] to bytes (u, v, 128), uint8 [T, 3, h, w], with 128 = no motion."""
    scaled = np.clip(flow / settings.bound_px, -1, 1) * 127 + 128
    pictures = np.full((len(flow), 3, *flow.shape[2:]), 128, np.uint8)
    pictures[:, :2] = np.rint(scaled)
    return pictures
