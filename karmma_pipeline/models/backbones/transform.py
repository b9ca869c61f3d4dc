"""Video pre-processing in two halves that equal torchvision's ``transforms()``.

Resize and crop act on uint8 where frames are decoded, the rest where the network runs. Bilinear
resizing is OpenCV's, four times as fast on one thread; where torchvision lands on the middle
between two grey levels, to a rounding error of float32, the two may choose differently.

T frames, H and W the file's height and width, h and w the network's, B clips in a batch.
"""

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as vision

from karmma_pipeline.config import Recipe

ANTIALIAS = False
"""torchvision's video weights were made without antialiasing (its ``_presets.py``)."""


class FrameTransform(Recipe):
    """Resize, centre crop, scale to [0, 1], normalise; frozen, picklable, JSON-plain."""

    resize: tuple[int, ...] = Field(description="Short side, or (height, width), in px.")
    crop: tuple[int, int] = Field(description="Centre crop (height, width) in px.")
    mean: tuple[float, ...] = Field(description="Per channel, after scaling to [0, 1].")
    std: tuple[float, ...] = Field(description="Per channel, after scaling to [0, 1].")
    interpolation: str = Field(InterpolationMode.BILINEAR.value, description="Of the resize.")

    def scaled(self, crop: int) -> "FrameTransform":
        """Return the same view of the picture at another crop size (square, px).

        The resize keeps its ratio to the crop: 256 before a crop of 224 becomes 73 before 64.
        """
        if (crop, crop) == self.crop:
            return self
        resize = tuple(round(side * crop / self.crop[0]) for side in self.resize)
        return self.model_copy(update={"resize": resize, "crop": (crop, crop)})

    def apply(self, frames: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Resize and crop uint8 frames [T, H, W, 3] to uint8 [T, 3, h, w]."""
        if self.interpolation == InterpolationMode.BILINEAR.value:
            size = self._resized(*frames.shape[1:3])
            resized = np.stack([_bilinear(frame, size) for frame in frames])
            video = torch.from_numpy(resized).permute(0, 3, 1, 2)
        else:
            video = torch.from_numpy(frames).permute(0, 3, 1, 2)
            mode = InterpolationMode(self.interpolation)
            video = vision.resize(video, list(self.resize), interpolation=mode, antialias=ANTIALIAS)
        video = vision.center_crop(video, list(self.crop))
        return np.ascontiguousarray(video.numpy())

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        """Return (height, width) in px after the resize, rounded as torchvision does."""
        if len(self.resize) == 2:
            return self.resize[0], self.resize[1]
        short = self.resize[0]
        long = int(short * max(height, width) / min(height, width))
        return (long, short) if width <= height else (short, long)

    def normalise(self, video: Tensor) -> Tensor:
        """Turn uint8 [B, T, 3, h, w] into the network's float32 [B, 3, T, h, w]."""
        B, T = video.shape[:2]
        pictures = vision.convert_image_dtype(video.flatten(0, 1), torch.float)
        pictures = vision.normalize(pictures, list(self.mean), list(self.std))
        return torch.unflatten(pictures, 0, (B, T)).transpose(1, 2)

    def facts(self) -> dict[str, Any]:
        """Return what a store records of it."""
        return {**self.model_dump(mode="json"), "antialias": ANTIALIAS}


def _bilinear(frame: npt.NDArray[np.uint8], size: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """Resize a frame [H, W, 3] to a size (height, width).

    OpenCV interpolates uint16 in float32, as torchvision does, but uint8 in fixed point.
    """
    return cv2.resize(frame.astype(np.uint16), size[::-1]).astype(np.uint8)


def of_weights(transforms: Any) -> FrameTransform:
    """Read the transform of a torchvision video weight (``weights.transforms()``)."""
    crop: Sequence[int] = transforms.crop_size
    return FrameTransform(
        resize=tuple(transforms.resize_size),
        crop=(crop[0], crop[-1]),
        mean=tuple(transforms.mean),
        std=tuple(transforms.std),
        interpolation=transforms.interpolation.value,
    )
