"""Random views of decoded clips, on the device, for networks that are trained from their input.

All pictures of a clip, and those of its RGB and its flow, are seen in one view.

B clips in a batch, T frames, h and w the network's input.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from karmma_pipeline.models.backbones.frame_transform import FrameTransform


@dataclass(frozen=True)
class Augmentation:
    """What may be done to pictures, see `karmma_pipeline.training.recipe.SuffixSettings`."""

    crop: float = 1.0
    colour: float = 0.0
    flip: bool = False


@dataclass(frozen=True)
class RandomViews:
    """How each clip is seen; all on the CPU.

    Attributes:
        side: of the part of the picture that is seen, float [B], 1 is all of it.
        place: where its middle lies, right and down, float [B, 2]; 0 is the picture's, 1 its edge.
        mirrored: bool [B].
        contrast, brightness: factor and summand of normalised RGB, float [B].
    """

    side: Tensor
    place: Tensor
    mirrored: Tensor
    contrast: Tensor
    brightness: Tensor

    @classmethod
    def draw(cls, clips: int, how: Augmentation) -> "RandomViews":
        """Draw views from torch's generator, the same numbers whatever is asked for."""
        side = 1 - (1 - how.crop) * torch.rand(clips)
        place = (1 - side)[:, None] * (2 * torch.rand(clips, 2) - 1)
        mirrored = (torch.rand(clips) < 0.5) & torch.tensor(how.flip)
        contrast, brightness = how.colour * (2 * torch.rand(2, clips) - 1)
        return cls(side, place, mirrored, 1 + contrast, brightness)

    def rows(self, rows: Tensor) -> "RandomViews":
        """Return the views of some clips."""
        some = rows.cpu()
        return RandomViews(*(of[some] for of in vars(self).values()))

    def apply(self, x: Tensor, transform: FrameTransform, is_flow: bool) -> Tensor:
        """Return prepared pictures [B, 3, T, h, w] in these views.

        Motion grows as the picture does, and turns where it is mirrored; colours of flow say
        something else and stay.
        """
        x = self._moved(x)
        shape = (-1, 1, 1, 1, 1)
        if not is_flow:
            contrast, brightness = (of.to(x.device) for of in (self.contrast, self.brightness))
            return x * contrast.view(shape) + brightness.view(shape)
        mean, std = (torch.tensor(of)[:2] for of in (transform.mean, transform.std))
        rest = ((128 / 255 - mean) / std).to(x.device).view(1, 2, 1, 1, 1)
        turned = torch.where(self.mirrored, -1.0, 1.0)
        factor = torch.stack([turned, torch.ones_like(turned)], dim=1) / self.side[:, None]
        flow = rest + (x[:, :2] - rest) * factor.to(x.device)[..., None, None, None]
        return torch.cat([flow, x[:, 2:]], dim=1)

    def _moved(self, x: Tensor) -> Tensor:
        if bool((self.side == 1).all()) and not bool(self.mirrored.any()):
            return x
        theta = torch.zeros(len(x), 2, 3)
        theta[:, 0, 0] = torch.where(self.mirrored, -self.side, self.side)
        theta[:, 1, 1] = self.side
        theta[:, :, 2] = self.place
        frames = x.flatten(1, 2)  # one view for all channels of all frames
        grid = F.affine_grid(theta.to(x.device), list(frames.shape), align_corners=False)
        moved = F.grid_sample(frames, grid, padding_mode="border", align_corners=False)
        return moved.view_as(x)
