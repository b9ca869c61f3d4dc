"""Image networks of timm on frames, each by itself: ``timm:NAME``; an extra.

Size, crop, interpolation and normalisation are timm's own data configuration of the name. Nothing
is downloaded: weights are read from the hub's cache, where `karmma backbones fetch` puts them.

B clips in a batch, T frames, h and w the network's input, p class and register tokens of a frame.
"""

import difflib
import math
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from karmma_pipeline.errors import ConfigError
from karmma_pipeline.models.backbones import hub
from karmma_pipeline.models.backbones.layers import Parts, maps, with_grid
from karmma_pipeline.models.backbones.registry import Architecture, Blocks, FrameTransform

#: Frames where a recipe gives none; any number will do.
FRAMES = 8


def architecture(name: str) -> Architecture:
    """Return a network of timm by its name, with or without the tag of its weights.

    Raises:
        ConfigError: timm is not installed, has no such network, or prepares pictures for it as
            videos cannot be.
    """
    timm = _library()
    if not timm.is_model(name):
        raise ConfigError(f"name='timm:{name}': not a timm model; {_near(timm, name)}.")
    try:
        published = timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        raise ConfigError(f"name='timm:{name}': {error}; {_near(timm, name)}.") from None
    settings = published.to_dict() if published is not None else {}
    return Architecture(
        kind="video",
        build=partial(_build, name),
        weights=None,
        feature_map=Blocks(_features, _arrange),
        heads=(),
        frames=FRAMES,
        transform=_view(timm, name, settings),
        arrange=_arrange,
        pretrained=partial(_pretrained, name),
        facts={"timm": timm.__version__, "licence": settings.get("license") or hub.NOT_STATED},
        per_frame=True,
    )


def repository(name: str) -> str:
    """Return the hub's repository of a name's weights.

    Raises:
        ConfigError: there are no weights of it on the hub.
    """
    published = _library().get_pretrained_cfg(name)
    if published is None or not published.hf_hub_id:
        raise ConfigError(f"weights='DEFAULT': timm publishes no weights of {name} on the hub.")
    repo: str = published.hf_hub_id
    return repo


def _library() -> ModuleType:
    return hub.library("timm")


def _near(timm: ModuleType, name: str) -> str:
    arch, _, tag = name.partition(".")
    known = timm.list_models(pretrained=True) if tag else timm.list_models()
    near = difflib.get_close_matches(name if tag else arch, known, n=3, cutoff=0.5)
    return f"did you mean {', '.join(near)}" if near else "timm.list_models() lists all"


def _build(name: str, weights: None) -> nn.Module:
    net: nn.Module = _library().create_model(name, pretrained=False, num_classes=0)
    return net


def _pretrained(name: str) -> nn.Module:
    file = hub.cached(repository(name), "model.safetensors", f"timm:{name}")
    return _from_file(name, file)


def _from_file(name: str, file: Path) -> nn.Module:
    net: nn.Module = _library().create_model(
        name, pretrained=True, num_classes=0, pretrained_cfg_overlay={"file": str(file)}
    )
    return net


def _view(timm: ModuleType, name: str, settings: dict[str, Any]) -> FrameTransform:
    data = timm.data.resolve_data_config({}, pretrained_cfg=settings)
    channels, height, width = data["input_size"]
    if channels != 3 or data["crop_mode"] not in {"center", "squash"}:
        raise ConfigError(
            f"name='timm:{name}': takes {channels} channels and crops by {data['crop_mode']!r}; "
            "only networks with three channels and centre crops are supported."
        )
    # As timm.data.create_transform computes it for evaluation.
    sides = [math.floor(side / data["crop_pct"]) for side in (height, width)]
    short = height == width and data["crop_mode"] == "center"
    return FrameTransform(
        resize=tuple(sides[:1] if short else sides),
        crop=(height, width),
        mean=data["mean"],
        std=data["std"],
        interpolation=data["interpolation"],
        antialias=True,
    )


def _features(net: Any, x: Tensor) -> Any:
    return net.forward_features(x.transpose(1, 2).flatten(0, 1))


def _arrange(net: Any, output: Any, x: Tensor) -> Parts:
    """Turn tokens [B T, p + h w, D] or maps [B T, D, h, w] or [B T, h, w, D] into maps."""
    frames = x.shape[0], x.shape[2]
    y = output[0] if isinstance(output, tuple) else output
    if not isinstance(y, Tensor):
        raise ConfigError(
            f"{type(net).__name__}: returned a {type(y).__name__}, several maps at once."
        )
    if y.dim() == 4:
        last = str(getattr(net, "output_fmt", "NCHW")) == "NHWC"
        return Parts(maps(y.movedim(-1, 1) if last else y, frames))
    return with_grid(y, frames, _grid(net, y, x))


def _grid(net: Any, y: Tensor, x: Tensor) -> tuple[int, int]:
    """Return the grid (h, w) of tokens [B T, p + h w, D]."""
    patches: Any = getattr(net, "patch_embed", None)
    if y.dim() == 3 and hasattr(patches, "dynamic_feat_size"):
        grid: tuple[int, int] = patches.dynamic_feat_size(tuple(x.shape[-2:]))
        return grid
    # Networks that do not say it, such as XCiT: of a square picture, and at most a class token.
    side = math.isqrt(y.shape[1]) if y.dim() == 3 else 0
    if side < 2 or y.shape[1] - side**2 > 1 or x.shape[-2] != x.shape[-1]:
        raise ConfigError(f"{type(net).__name__}: returned {list(y.shape)}, tokens without a grid.")
    return side, side
