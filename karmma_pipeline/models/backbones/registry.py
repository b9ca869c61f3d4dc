"""The torchvision networks that serve as frozen backbones, each cut before its head.

A cut network gives its last feature map [B, D, t, h, w]; parameter names stay torchvision's,
so that published weights load as they are.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models import video

Kind = Literal["video", "image"]
FeatureMap = Callable[[Any, Tensor], Tensor]


def _swin3d(net: video.SwinTransformer3d, x: Tensor) -> Tensor:
    features: Tensor = net.norm(net.features(net.pos_drop(net.patch_embed(x))))
    return features.permute(0, 4, 1, 2, 3)


def _s3d(net: video.S3D, x: Tensor) -> Tensor:
    return net.features(x)


def _resnet3d(net: video.VideoResNet, x: Tensor) -> Tensor:
    x = net.stem(x)
    return net.layer4(net.layer3(net.layer2(net.layer1(x))))


def _mvit(net: video.MViT, x: Tensor) -> Tensor:
    x = net.pos_encoding(net.conv_proj(x).flatten(2).transpose(1, 2))
    thw = (net.pos_encoding.temporal_size, *net.pos_encoding.spatial_size)
    for block in net.blocks:
        x, thw = block(x, thw)
    x = net.norm(x)[:, 1:]  # without the class token
    return torch.unflatten(x.transpose(1, 2), 2, thw)


def _features2d(net: Any, x: Tensor) -> Tensor:
    return net.features(x).unsqueeze(2)


def _resnet2d(net: models.ResNet, x: Tensor) -> Tensor:
    x = net.maxpool(net.relu(net.bn1(net.conv1(x))))
    return net.layer4(net.layer3(net.layer2(net.layer1(x)))).unsqueeze(2)


@dataclass(frozen=True)
class Architecture:
    """A network family member: how to build it, cut it, and what it accepts."""

    kind: Kind
    build: Callable[..., nn.Module]
    weights: Any
    feature_map: FeatureMap
    heads: tuple[str, ...]
    frames: int = 1
    fixed: bool = False

    def headless(self) -> nn.Module:
        """Build the network with fresh parameters and without its heads."""
        net = self.build(weights=None)
        for name in self.heads:
            setattr(net, name, nn.Identity())
        return net


_swin = partial(Architecture, "video", feature_map=_swin3d, heads=("head",), frames=32)
_conv3d = partial(Architecture, "video", feature_map=_resnet3d, heads=("fc",), frames=16)
_mvits = partial(Architecture, "video", feature_map=_mvit, heads=("head",), frames=16, fixed=True)
_image = partial(Architecture, "image", feature_map=_features2d, heads=("classifier",))


ARCHITECTURES: dict[str, Architecture] = {
    "swin3d_t": _swin(build=video.swin3d_t, weights=video.Swin3D_T_Weights),
    "swin3d_s": _swin(build=video.swin3d_s, weights=video.Swin3D_S_Weights),
    "swin3d_b": _swin(build=video.swin3d_b, weights=video.Swin3D_B_Weights),
    "s3d": Architecture("video", video.s3d, video.S3D_Weights, _s3d, ("classifier",), 16),
    "r2plus1d_18": _conv3d(build=video.r2plus1d_18, weights=video.R2Plus1D_18_Weights),
    "r3d_18": _conv3d(build=video.r3d_18, weights=video.R3D_18_Weights),
    "mc3_18": _conv3d(build=video.mc3_18, weights=video.MC3_18_Weights),
    "mvit_v1_b": _mvits(build=video.mvit_v1_b, weights=video.MViT_V1_B_Weights),
    "mvit_v2_s": _mvits(build=video.mvit_v2_s, weights=video.MViT_V2_S_Weights),
    "efficientnet_b0": _image(build=models.efficientnet_b0, weights=models.EfficientNet_B0_Weights),
    "resnet18": Architecture("image", models.resnet18, models.ResNet18_Weights, _resnet2d, ("fc",)),
    "mobilenet_v3_large": _image(
        build=models.mobilenet_v3_large, weights=models.MobileNet_V3_Large_Weights
    ),
}


def meta_map(architecture: Architecture, shape: tuple[int, ...]) -> torch.Size:
    """Return the feature map's shape [1, D, t, h, w] for an input shape, computing nothing."""
    with torch.device("meta"), torch.inference_mode():
        net = architecture.headless().eval()
        return architecture.feature_map(net, torch.empty(1, *shape)).shape
