"""Preprocessing of frames: resize, crop, scale, normalise.

It equals torchvision's ``transforms()``, in two halves: resize and crop act on uint8 where frames
are decoded, the rest where the network runs. Bilinear resizing is OpenCV's, four times as fast on
one thread; where torchvision lands on the middle between two grey levels, to a rounding error of
float32, the two may choose differently. Resizing that smooths is Pillow's, bit for bit, as timm's
own is.

Every decode process imports this module. torch and torchvision take seconds and 600 MB to import,
so it does without torchvision, and imports torch where a resize needs it: most do not.

T frames, H and W the file's height and width, h and w the network's, B clips in a batch.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image
from pydantic import Field

from karmma_pipeline.config import Recipe
from karmma_pipeline.views import Side

if TYPE_CHECKING:
    from torch import Tensor

_Number = TypeVar("_Number", np.uint8, np.float32)

#: torchvision's video weights were made without antialiasing (its ``_presets.py``).
ANTIALIAS = False

#: What smooths, as stores record it. Where they do not, torch did in float32: colours differ by 3
#: grey levels at most.
SMOOTHED_BY = "Pillow"

Interpolation = Literal[
    "nearest", "nearest-exact", "bilinear", "bicubic", "lanczos", "box", "hamming"
]
_OF_TORCH = {"nearest", "nearest-exact", "bilinear", "bicubic"}


class FrameTransform(Recipe):
    """Resize, centre crop, scale to [0, 1], normalise; frozen, picklable, JSON-plain."""

    resize: tuple[int, ...] = Field(description="Resize: short side, or (height, width), in px.")
    crop: tuple[int, int] = Field(description="Centre crop (height, width) in px.")
    mean: tuple[float, ...] = Field(description="Per channel, after scaling to [0, 1].")
    std: tuple[float, ...] = Field(description="Per channel, after scaling to [0, 1].")
    interpolation: Interpolation = Field("bilinear", description="Interpolation of the resize.")
    floor: bool = Field(
        False,
        description="If frame and crop differ by an odd number of px, round the offset down, "
        "as transformers does; else round to even.",
    )
    antialias: bool = Field(
        ANTIALIAS,
        description="Whether the resize is antialiased, as in PIL, timm and transformers.",
    )

    def scaled(self, crop: int) -> "FrameTransform":
        """Return the same view of the picture at another crop size (square, px).

        The resize keeps its ratio to the crop: 256 before a crop of 224 becomes 73 before 64.
        """
        if (crop, crop) == self.crop:
            return self
        resize = tuple(round(side * crop / self.crop[0]) for side in self.resize)
        return self.model_copy(update={"resize": resize, "crop": (crop, crop)})

    def apply(self, frames: npt.NDArray[np.uint8], side: Side = None) -> npt.NDArray[np.uint8]:
        """Resize and crop uint8 frames [T, H, W, 3] to uint8 [T, 3, h, w].

        Args:
            frames: of one size.
            side: the end of their longer side at which they are cropped: 0 left or above, 1 right
                or below; None: the middle.
        """
        size = self._size(*frames.shape[1:3])
        if size == frames.shape[1:3] or (self.interpolation != "bilinear" and not self.antialias):
            resized = self.resized(frames.transpose(0, 3, 1, 2))
        else:
            resize = self._smoothed if self.antialias else _bilinear
            resized = np.stack([resize(frame, size) for frame in frames]).transpose(0, 3, 1, 2)
        return np.ascontiguousarray(self.cropped(resized, side))

    def _smoothed(
        self, frame: npt.NDArray[np.uint8], size: tuple[int, int]
    ) -> npt.NDArray[np.uint8]:
        """Resize a frame [H, W, 3] to a size (height, width)."""
        mode = Image.Resampling[self.interpolation.removesuffix("-exact").upper()]
        return np.asarray(Image.fromarray(frame).resize(size[::-1], mode))

    def resized(self, pictures: npt.NDArray[_Number]) -> npt.NDArray[_Number]:
        """Resize pictures [T, C, H, W], uint8 (rounded) or float32, without smoothing.

        As torchvision's ``resize`` does; of what that does not have, cubic instead.
        """
        size = self._size(*pictures.shape[-2:])
        if size == pictures.shape[-2:]:
            return pictures
        import torch

        mode = self.interpolation if self.interpolation in _OF_TORCH else "bicubic"
        scaled = torch.nn.functional.interpolate(
            torch.from_numpy(pictures).float(),
            size,
            mode=mode,
            align_corners=None if "nearest" in mode else False,
        ).numpy()
        if pictures.dtype == np.uint8:  # cubic ones overshoot
            scaled = scaled.clip(0, 255).round()
        return scaled.astype(pictures.dtype)

    def cropped(self, pictures: npt.NDArray[_Number], side: Side = None) -> npt.NDArray[_Number]:
        """Take the middle of pictures [T, C, H, W], or an end; smaller ones are padded."""
        above, beside = (
            length - crop for length, crop in zip(pictures.shape[-2:], self.crop, strict=True)
        )
        if side is not None and above >= 0 and beside >= 0:
            if pictures.shape[-1] >= pictures.shape[-2]:
                pictures = pictures[..., beside * side :][..., : self.crop[1]]
            else:
                pictures = pictures[..., above * side :, :][..., : self.crop[0], :]
            return self.cropped(pictures)  # the shorter side, in the middle
        down = self.floor and above >= 0 and beside >= 0
        if above < 0 or beside < 0:
            missing = [max(0, -above), max(0, -beside)]
            around: list[tuple[int, int]] = [(n // 2, (n + 1) // 2) for n in missing]
            pictures = np.pad(pictures, [(0, 0), (0, 0), *around])
        top, left = (n // 2 if down else round(n / 2) for n in (max(0, above), max(0, beside)))
        return pictures[..., top : top + self.crop[0], left : left + self.crop[1]]

    def _size(self, height: int, width: int) -> tuple[int, int]:
        """Return (height, width) in px after the resize, rounded as torchvision does."""
        if len(self.resize) == 2:
            return self.resize[0], self.resize[1]
        short = self.resize[0]
        long = int(short * max(height, width) / min(height, width))
        return (long, short) if width <= height else (short, long)

    def normalise(self, video: "Tensor") -> "Tensor":
        """Turn uint8 [B, T, 3, h, w] into the network's float32 [B, 3, T, h, w]."""
        import torch

        B, T = video.shape[:2]
        mean, std = (
            torch.tensor(values, dtype=torch.float, device=video.device).view(-1, 1, 1)
            for values in (self.mean, self.std)
        )
        pictures = (video.flatten(0, 1).float() / 255).sub_(mean).div_(std)
        return torch.unflatten(pictures, 0, (B, T)).transpose(1, 2)

    def facts(self) -> dict[str, Any]:
        """Return what a store records of it."""
        facts = self.model_dump(mode="json")
        if not self.floor:  # earlier stores have no such key
            del facts["floor"]
        if self.antialias:
            facts["smoothed_by"] = SMOOTHED_BY
        return facts


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
