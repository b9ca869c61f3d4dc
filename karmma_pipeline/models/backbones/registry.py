"""The built-in backbones, without their heads, and their inputs.

A cut network gives its last feature map [B, D, t, h, w]; parameter names stay torchvision's,
so that published weights load as they are.

Object boxes need no network, one token per sampled frame: its slots side by side, each with
(x centre, y centre, width, height, is a hand, is an object, is there), all in 0..1; the fusion
model's linear embedding learns from it. The layout follows Something-Else's own loader and
Radevski et al. (14 boxes per frame at most).

Windows of a sensor need none either: ``windows`` lays the samples of each side by side, a token per
window. Networks of one's own turn windows [B, W, C] into tokens.

T frames, h and w the network's height and width, B clips in a batch.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models import video

from karmma_pipeline import own_code
from karmma_pipeline.errors import ConfigError, one_line
from karmma_pipeline.models.backbones import layers, names
from karmma_pipeline.models.backbones.frame_transform import FrameTransform as FrameTransform
from karmma_pipeline.models.backbones.frame_transform import of_weights as of_weights
from karmma_pipeline.models.backbones.layers import Parts as Parts
from karmma_pipeline.models.backbones.layers import Stages as Stages
from karmma_pipeline.models.backbones.names import ENTRY_POINTS as ENTRY_POINTS
from karmma_pipeline.models.backbones.names import Kind as Kind
from karmma_pipeline.models.backbones.watched import Blocks as Blocks
from karmma_pipeline.models.backbones.watched import Chain, in_passes, of_passes

#: Sampled frames T where a recipe gives none.
BOX_FRAMES = 16


def _box_map(net: Any, x: Tensor) -> Tensor:
    """Turn boxes [B, BOX_SLOTS * BOX_NUMBERS, T] into a map [B, D, T, 1, 1]."""
    return net(x)[..., None, None]


def prepare_boxes(boxes: Tensor) -> Tensor:
    """Turn decoded boxes, float [B, T, BOX_SLOTS, BOX_NUMBERS], into the network's input."""
    return boxes.float().flatten(2).transpose(1, 2)


def _flat(net: Any, x: Tensor) -> Tensor:
    """Turn windows [B, W, C] into a token each [B, W * C]."""
    return net(x).flatten(1)


#: Prefix of a name to the module that knows the networks of that library.
LIBRARIES = {"timm": "timm_networks", "hf": "hf_networks"}

FeatureMap = Callable[[Any, Tensor], Tensor | Parts]


_TokensOfGrid = tuple[Tensor, tuple[int, int, int]]


def _mvit(net: video.MViT, x: Tensor) -> _TokensOfGrid:
    x = net.pos_encoding(net.conv_proj(x).flatten(2).transpose(1, 2))
    thw = (net.pos_encoding.temporal_size, *net.pos_encoding.spatial_size)
    for block in net.blocks:
        x, thw = block(x, thw)
    return x, thw


def _mvit_normed(net: video.MViT, output: _TokensOfGrid, x: Tensor) -> Tensor:
    return _mvit_map(net, (net.norm(output[0]), output[1]), x)


def _mvit_map(net: video.MViT, output: _TokensOfGrid, x: Tensor) -> Tensor:
    tokens, thw = output
    return torch.unflatten(tokens[:, 1:].transpose(1, 2), 2, thw)  # without the class token


def _swin3d_map(net: video.SwinTransformer3d, output: Tensor, x: Tensor) -> Tensor:
    return output.permute(0, 4, 1, 2, 3)


def _features(**stages: tuple[int, int]) -> Stages:
    """Return stages of `features`, which end before the second number."""
    return Stages({s: tuple(f"features.{i}" for i in range(*ends)) for s, ends in stages.items()})


_SWIN3D = Stages(
    {
        "patches": ("patch_embed", "pos_drop"),
        "stage1": ("features.0",),
        **{f"stage{n + 1}": (f"features.{2 * n - 1}", f"features.{2 * n}") for n in (1, 2, 3)},
        "norm": ("norm",),
    },
    channels_last=True,
)
_LAYERS = {f"layer{n}": (f"layer{n}",) for n in (1, 2, 3, 4)}
_RESNET3D = Stages({"stem": ("stem",), **_LAYERS})
_RESNET2D = Stages({"stem": ("conv1", "bn1", "relu", "maxpool"), **_LAYERS})
_S3D = _features(stem=(0, 1), stage2=(1, 4), stage3=(4, 7), stage4=(7, 13), stage5=(13, 16))
_STAGES = {f"stage{n}": (n, n + 1) for n in range(1, 8)}
_EFFICIENTNET = _features(stem=(0, 1), **_STAGES, head=(8, 9))
_BLOCKS = {f"block{n}": (n, n + 1) for n in range(1, 16)}
_MOBILENET = _features(stem=(0, 1), **_BLOCKS, head=(16, 17))


@dataclass(frozen=True)
class Architecture:
    """A network: how to build it, how to cut it, and what it accepts.

    Bring your own by a function without arguments that returns one of these; name it in a
    recipe as ``package.module:function``, or by an entry point in `ENTRY_POINTS`::

        def tiny() -> Architecture:
            return Architecture(
                kind="video",
                build=lambda weights: TinyNet(),
                weights=None,
                feature_map=lambda net, x: net.features(x),
                heads=(),
                frames=8,
                transform=FrameTransform(resize=(128,), crop=(112, 112), mean=..., std=...),
            )

    Attributes:
        kind: "video" takes [B, 3, T, h, w], "image" takes [B, 3, h, w], "boxes" object boxes,
            "series" windows of a sensor, float32 [B, W, C] of W samples and C channels.
        build: called as ``build(weights=None)``; must also work on torch's meta device.
        weights: torchvision's enum of published weights, or None.
        feature_map: (network, input) to the last feature map [B, D, t, h, w]; t is 1 for images.
            `Stages` can be cut between any two of them, see `BackboneChoice.cut`; `Blocks`
            between those that take nothing but what the one before gives.
            Of kind "series": to the tokens of a window, [B, D] or [B, t, D].
        heads: attributes of the network that are replaced by the identity.
        frames: T where a recipe gives none.
        fixed: other frames or sizes than the network's own are refused.
        transform: of video frames, where no published weight states it.
        audio: of kind "image", the keys of its own spectrogram (see `front_end.Audio`); without
            them it is the recipe's.
        arrange: (network, output of one of its modules, input) to what ``feature_map`` gives, for
            ``layer``; None: the output is [B, D, t, h, w], or of images [B, D, h, w].
        pretrained: makes the network with the weights DEFAULT, as its library reads them.
        facts: what is recorded beside the name: library, licence.
        layer: see `BackboneChoice.layer`; ``class_tokens``, too.
        per_frame: of kind "video": each frame goes through by itself, to a map of one step in time,
            so that live streams compute it once. Of `frame_by_frame` this is known.
    """

    kind: Kind
    build: Callable[..., nn.Module]
    weights: Any
    feature_map: FeatureMap
    heads: tuple[str, ...]
    frames: int = 1
    fixed: bool = False
    transform: FrameTransform | None = None
    audio: Mapping[str, Any] | None = field(default=None, hash=False)
    arrange: Callable[[Any, Any, Tensor], Tensor | Parts] | None = None
    pretrained: Callable[[], nn.Module] | None = None
    facts: Mapping[str, str] = field(default_factory=dict, hash=False)
    layer: int | str | None = None
    class_tokens: Literal["drop", "keep"] = "drop"
    per_frame: bool = False

    @property
    def by_frame(self) -> bool:
        """Whether each frame of a video goes through by itself."""
        alone = self.per_frame or isinstance(self.feature_map, layers.FrameByFrame)
        return alone and self.kind == "video"

    def features(self, net: Any, x: Tensor) -> Tensor:
        """Return the last feature map [B, D, t, h, w] of an input, or that of its ``layer``.

        Args:
            net: the network.
            x: what `BackboneChoice.input_shape` says, with B before; [B, N, W, C] of a sensor,
                whose N windows go through the network by themselves.
        """
        return self.parts(net, x).map

    def parts(self, net: Any, x: Tensor) -> Parts:
        """Return the feature map and, if they are kept, the tokens beside it; see `features`."""
        if self.kind == "series":
            return Parts(self._series(net, x))
        T, frames = x.shape[2] if x.dim() == 5 else 1, self.pass_frames
        if frames is None or frames >= T:
            return self._once(net, x)
        return of_passes(self._once(net, in_passes(x, frames)), T // frames)

    @property
    def pass_frames(self) -> int | None:
        """Frames of one pass, if the network takes no others."""
        return self.frames if self.fixed and self.kind == "video" else None

    def kept(self, made: Tensor | Parts) -> Parts:
        """Return what counts of a network's output, see ``class_tokens``."""
        parts = made if isinstance(made, Parts) else Parts(made)
        return parts if self.class_tokens == "keep" else Parts(parts.map)

    def _once(self, net: Any, x: Tensor) -> Parts:
        arrange = self.arrange or layers.as_map
        try:
            made = self.feature_map(net, x)
            if self.layer is not None and torch.compiler.is_exporting():
                made = arrange(net, layers.traced_output(net), x)
        except layers.Reached as reached:
            made = arrange(net, reached.output, x)
        return self.kept(made)

    def _series(self, net: Any, x: Tensor) -> Tensor:
        made = self.feature_map(net, x.flatten(0, 1))
        if isinstance(made, Parts):
            made = made.map
        tokens = torch.unflatten(made, 0, x.shape[:2])
        if tokens.dim() == 3:  # a token for each window
            tokens = tokens.unsqueeze(2)
        return tokens.flatten(1, 2).transpose(1, 2)[..., None, None]

    def headless(self) -> nn.Module:
        """Build the network with fresh parameters and without its heads."""
        return self.cut(self.build(weights=None))

    def cut(self, net: nn.Module) -> nn.Module:
        """Take a network's heads off, and end it behind ``layer``.

        Raises:
            ConfigError: it has no such layer.
        """
        for name in self.heads:
            setattr(net, name, nn.Identity())
        if self.layer is not None:
            layers.end_behind(net, self.layer)
        return net


_swin = partial(
    Architecture, "video", feature_map=_SWIN3D, heads=("head",), frames=32, arrange=_swin3d_map
)
_conv3d = partial(Architecture, "video", feature_map=_RESNET3D, heads=("fc",), frames=16)
_mvits = partial(
    Architecture,
    "video",
    feature_map=Blocks(_mvit, _mvit_normed, behind=("norm",)),
    heads=("head",),
    frames=16,
    fixed=True,
    arrange=_mvit_map,
)
_image = partial(Architecture, "image", heads=("classifier",))


ARCHITECTURES: dict[str, Architecture] = {
    "swin3d_t": _swin(build=video.swin3d_t, weights=video.Swin3D_T_Weights),
    "swin3d_s": _swin(build=video.swin3d_s, weights=video.Swin3D_S_Weights),
    "swin3d_b": _swin(build=video.swin3d_b, weights=video.Swin3D_B_Weights),
    "s3d": Architecture("video", video.s3d, video.S3D_Weights, _S3D, ("classifier",), 16),
    "r2plus1d_18": _conv3d(build=video.r2plus1d_18, weights=video.R2Plus1D_18_Weights),
    "r3d_18": _conv3d(build=video.r3d_18, weights=video.R3D_18_Weights),
    "mc3_18": _conv3d(build=video.mc3_18, weights=video.MC3_18_Weights),
    "mvit_v1_b": _mvits(build=video.mvit_v1_b, weights=video.MViT_V1_B_Weights),
    "mvit_v2_s": _mvits(build=video.mvit_v2_s, weights=video.MViT_V2_S_Weights),
    "efficientnet_b0": _image(
        build=models.efficientnet_b0,
        weights=models.EfficientNet_B0_Weights,
        feature_map=_EFFICIENTNET,
    ),
    "resnet18": Architecture("image", models.resnet18, models.ResNet18_Weights, _RESNET2D, ("fc",)),
    "mobilenet_v3_large": _image(
        build=models.mobilenet_v3_large,
        weights=models.MobileNet_V3_Large_Weights,
        feature_map=_MOBILENET,
    ),
    "boxes": Architecture("boxes", nn.Identity, None, _box_map, (), BOX_FRAMES),
    "windows": Architecture("series", nn.Identity, None, _flat, ()),
}


@cache
def find(name: str) -> Architecture:
    """Return the network of a name: shipped, of an entry point, or ``package.module:factory``.

    Raises:
        ConfigError: there is none, it cannot be imported, or it is no `Architecture`.
    """
    if name in ARCHITECTURES:
        return ARCHITECTURES[name]
    library, _, rest = name.partition(":")
    if library in LIBRARIES:
        known_by = import_module(f"karmma_pipeline.models.backbones.{LIBRARIES[library]}")
        network: Architecture = known_by.architecture(rest)
        return network
    for entry in entry_points(group=ENTRY_POINTS, name=name):
        return _own(name, entry.load)
    if ":" in name:
        return _own(name, partial(own_code.load, name, "name"))
    known = [*ARCHITECTURES, *sorted(entry_points(group=ENTRY_POINTS).names)]
    raise ConfigError(
        f"name={name!r}: unknown backbone{names.near(name)}; known: {', '.join(known)}, "
        "timm:NAME, hf:ID, or a custom one as package.module:factory."
    )


def _own(name: str, load: Callable[[], Any]) -> Architecture:
    try:
        made = load()
    except ConfigError:
        raise
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"name={name!r}: cannot be imported ({error}){names.near(name)}; install its "
            "package in this environment, or put its file into the working folder or PYTHONPATH."
        ) from error
    if callable(made):
        try:
            made = made()
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            raise ConfigError(f"name={name!r}: its factory failed ({reason}).") from error
    if not isinstance(made, Architecture):
        raise ConfigError(
            f"name={name!r}: returned a {type(made).__name__}; a factory must return a "
            "karmma_pipeline.models.backbones.Architecture."
        )
    return made


@cache
def map_shape(architecture: Architecture, shape: tuple[int, ...]) -> tuple[int, int, int, int, int]:
    """Return the feature map's (D, t, h, w) for an input of that shape, computing nothing.

    The last number is that of the tokens beside it, E.

    Raises:
        ConfigError: the network cannot take this input, or gives something else than a map.
    """
    try:
        with torch.device("meta"), torch.inference_mode():
            net = architecture.headless().eval()
            features, extra = architecture.parts(net, torch.empty(1, *shape))
    except ConfigError:
        raise
    except (RuntimeError, ValueError, AssertionError) as error:
        reason = one_line(error)
        raise ConfigError(
            f"input {list(shape)}: the backbone does not accept it ({reason}); try a larger "
            "size or more frames."
        ) from error
    if features.dim() != 5:
        raise ConfigError(
            f"feature_map returned the shape {list(features.shape)}; expected [B, D, t, h, w]."
        )
    _, D, t, h, w = features.shape
    return D, t, h, w, 0 if extra is None else extra.shape[1]


@cache
def activation_shape(
    architecture: Architecture, cut: str, shape: tuple[int, ...]
) -> tuple[tuple[int, ...], int]:
    """Return the grid and the channels of what goes into a stage, computing nothing.

    Raises:
        ConfigError: the network has no such stage, or cannot take this input.
    """
    map_shape(architecture, shape)  # which says what is wrong with an input
    between = stages(architecture, shape)
    if isinstance(between, Chain):
        return between.activation(cut)
    with torch.device("meta"), torch.inference_mode():
        net = architecture.headless().eval()
        x = between.before(net, cut, torch.empty(1, *shape))
    return between.grid(x), between.as_tokens(x).shape[2]


@cache
def stages(architecture: Architecture, shape: tuple[int, ...]) -> Stages | Chain:
    """Return the stages between which a network can be cut, for an input of that shape.

    Raises:
        ConfigError: it is not made of such, or cannot take this input.
    """
    named = architecture.feature_map
    if isinstance(named, Blocks):
        map_shape(architecture, shape)  # which says what is wrong with an input
        with torch.device("meta"):
            net = architecture.headless().eval()
        if (chain := named.watch(net, shape, architecture.pass_frames)).modules:
            return chain
    if not isinstance(named, Stages) or architecture.fixed:
        raise ConfigError("cut: this network has no named stages; the only choice is input.")
    return named


def cuts(architecture: Architecture, shape: tuple[int, ...]) -> tuple[str, ...]:
    """Return the stages before which a network can be cut."""
    try:
        found = stages(architecture, shape)
    except ConfigError:
        return ()
    names = tuple(found.modules)
    return names[1:] if isinstance(found, Stages) else names  # what goes in first is the input
