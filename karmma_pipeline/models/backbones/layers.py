"""Layers of a network: tokens of any of them, or a cut between two of its named stages.

Layers behind the one whose tokens are wanted are not computed. What lies before a cut is frozen and
computed once, what lies behind it is trained. Both parts run the very modules of the whole network
in their order: prefix and suffix give its numbers.

B clips in a batch, N places of an activation, D its channels.
"""

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from karmma_pipeline.errors import ConfigError

# Where networks keep their blocks: torchvision and timm, then transformers.
_BLOCKS = (
    *("blocks", "features", "stages", "layers"),
    *("encoder.layer", "encoder.layers", "layer", "model.layer", "audio_encoder.layers"),
)
_TRACED = "_karmma_traced"
_NUMBERED = ("layer1", "layer2", "layer3", "layer4")


class Parts(NamedTuple):
    """What a network makes of an input.

    Attributes:
        map: its feature map [B, D, t, h, w].
        extra: class and register tokens [B, E, D], of all frames in their order; None: it has none.
    """

    map: Tensor
    extra: Tensor | None = None


class Reached(Exception):  # noqa: N818  (no error: the pass ends here)
    """Ends a pass; ``output`` is what the layer gave."""

    def __init__(self, output: Any) -> None:
        super().__init__("the requested layer")
        self.output = output


def end_behind(net: nn.Module, layer: int | str) -> None:
    """Let passes through a network end with `Reached` behind a layer.

    Args:
        net: the network, in which a hook is left.
        layer: number of a block, from the end if negative, or the name of a module.

    Raises:
        ConfigError: it has no such layer.
    """

    # The exception carries the output, since several threads may run one network. The tracer of
    # torch.export cannot be left by one: it goes on, and drops what nothing is made of.
    def reached(module: nn.Module, inputs: Any, output: Any) -> None:
        if not torch.compiler.is_exporting():
            raise Reached(output)
        traced.append(tree_map_only(Tensor, Tensor.clone, output))  # what follows may write into it

    traced: list[Any] = []
    net.__dict__[_TRACED] = traced
    found = _find(net, layer)
    while type(found) is nn.Sequential and len(found):  # which may be called piece by piece
        found = found[-1]
    found.register_forward_hook(reached)


def traced_output(net: nn.Module) -> Any:
    """Return what the layer gave in the pass that torch.export has just traced, and forget it."""
    traced = net.__dict__[_TRACED]
    output = traced[0]
    traced.clear()
    return output


def _find(net: nn.Module, layer: int | str) -> nn.Module:
    names = dict(net.named_modules())
    if isinstance(layer, str):
        if layer in names and layer:
            return names[layer]
        near = difflib.get_close_matches(layer, names, n=3) or list(names)[1:9]
        raise ConfigError(
            f"layer={layer!r}: {type(net).__name__} has no module of this name; "
            f"it has {', '.join(near)}."
        )
    blocks = [net.get_submodule(path) for path in block_paths(net)]
    if not -len(blocks) <= layer < len(blocks):
        count = f"{len(blocks)} blocks" if blocks else "no list of blocks"
        raise ConfigError(
            f"layer={layer}: {type(net).__name__} has {count}; use another index or the name of a "
            "module."
        )
    return blocks[layer]


def block_paths(net: nn.Module) -> list[str]:
    """Return the paths of a network's blocks in their order; none if they are not in a list."""
    names = dict(net.named_modules())
    for name in _BLOCKS:
        if isinstance(one := names.get(name), nn.ModuleList | nn.Sequential):
            return [f"{name}.{child}" for child, _ in one.named_children()]
    return [name for name in _NUMBERED if name in names]


def as_map(net: nn.Module, output: Any, x: Tensor) -> Tensor:
    """Return a module's output as a map [B, D, t, h, w].

    Raises:
        ConfigError: it has another number of dimensions.
    """
    if isinstance(output, Tensor) and output.dim() == 5:
        return output
    if isinstance(output, Tensor) and output.dim() == 4:
        return output.unsqueeze(2)
    shape = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
    raise ConfigError(
        f"layer: a module of {type(net).__name__} returned {shape}, which is not a feature map; "
        "choose another module, or set `arrange` of the Architecture."
    )


def maps(y: Tensor, frames: tuple[int, int]) -> Tensor:
    """Turn maps of frames [B T, D, h, w] into [B, D, T, h, w]; ``frames`` is (B, T)."""
    return torch.unflatten(y, 0, frames).transpose(1, 2)


@dataclass(frozen=True, eq=False)
class FrameByFrame:
    """Lets an image network see each frame of a video by itself.

    Serves as the `feature_map` of an Architecture: (network, video [B, 3, T, h, w]) to maps
    [B, D, T, h', w'].

    Attributes:
        feature_map: (network, pictures [B, 3, h, w]) to maps [B, D, h', w'].
    """

    feature_map: Callable[[Any, Tensor], Tensor]

    def __call__(self, net: Any, x: Tensor) -> Tensor:
        """Return the maps of a video."""
        frames = x.transpose(1, 2).flatten(0, 1)
        return maps(self.feature_map(net, frames), (x.shape[0], x.shape[2]))


frame_by_frame = FrameByFrame


def with_grid(y: Tensor, frames: tuple[int, int], grid: tuple[int, int]) -> Parts:
    """Turn tokens of frames [B T, p + h w, D] into a map and the p tokens before it.

    Raises:
        ConfigError: there are fewer tokens than places in the grid (h, w).
    """
    extra = y.shape[1] - grid[0] * grid[1]
    if extra < 0:
        raise ConfigError(f"{list(y.shape)} has fewer tokens than the grid {list(grid)}.")
    whole = maps(torch.unflatten(y[:, extra:].transpose(1, 2), 2, grid), frames)
    return Parts(whole, torch.unflatten(y[:, :extra], 0, frames).flatten(1, 2) if extra else None)


class Activations:
    """The activations at a cut as tokens, and back.

    Attributes:
        channels_last: whether their last axis has the channels, else the one of `channel_axis`.
        channel_axis: 1 in [B, D, ...].
    """

    channels_last: bool
    channel_axis: ClassVar[int] = 1

    def as_tokens(self, x: Tensor) -> Tensor:
        """Turn an activation into tokens [B, N, D]."""
        return (x if self.channels_last else x.movedim(self.channel_axis, -1)).flatten(1, -2)

    def of_tokens(self, tokens: Tensor, grid: Sequence[int]) -> Tensor:
        """Turn tokens [B, N, D] back into the activation of a grid."""
        x = torch.unflatten(tokens, 1, tuple(grid))
        return x if self.channels_last else x.movedim(-1, self.channel_axis).contiguous()

    def grid(self, x: Tensor) -> tuple[int, ...]:
        """Return the sides of an activation: its shape without batch and channels."""
        sides = list(x.shape)
        del sides[-1 if self.channels_last else self.channel_axis]
        return tuple(sides[1:])


@dataclass(frozen=True, eq=False)
class Stages(Activations):
    """Modules that are called one after another; serves as the `feature_map` of an Architecture.

    Attributes:
        modules: name of a stage to the paths of its modules, in the order of the computation.
        channels_last: whether activations are [B, ..., D], else [B, D, ...].
    """

    modules: Mapping[str, tuple[str, ...]]
    channels_last: bool = False

    def __call__(self, net: nn.Module, x: Tensor) -> Tensor:
        """Return the map [B, D, t, h, w] of an input."""
        return self.after(net, next(iter(self.modules)), x)

    def before(self, net: nn.Module, cut: str, x: Tensor) -> Tensor:
        """Return what goes into a stage for an input, [B, D, ...] or [B, ..., D]."""
        frozen, _ = self.split(cut)
        return _run(_modules(net, frozen), x)

    def after(self, net: nn.Module, cut: str, x: Tensor) -> Tensor:
        """Return the map [B, D, t, h, w] of what goes into a stage.

        Args:
            net: the network; its stages before the cut are not looked at.
            cut: name of the stage.
            x: as `before` gives it.
        """
        _, rest = self.split(cut)
        y = _run(_modules(net, rest), x)
        return as_map(net, y.movedim(-1, 1) if self.channels_last else y, x)

    def split(self, cut: str) -> tuple[list[str], list[str]]:
        """Return the paths of the modules before and behind a cut.

        Raises:
            ConfigError: there is no such stage.
        """
        names = list(self.modules)
        if cut not in names:
            raise ConfigError(f"cut={cut!r}: allowed: {', '.join(['input', *names[1:]])}.")
        paths = [[*self.modules[name]] for name in names]
        at = names.index(cut)
        return [*chain(*paths[:at])], [*chain(*paths[at:])]

    def end_before(self, net: nn.Module, cut: str) -> None:
        """Get a network ready for `before`: nothing is to do."""

    def drop_before(self, net: nn.Module, cut: str) -> None:
        """Put the identity before a cut, so that a network no longer holds the weights there."""
        for path in self.split(cut)[0]:
            parent, _, name = path.rpartition(".")
            net.get_submodule(parent)._modules[name] = nn.Identity()


def _modules(net: nn.Module, paths: Iterable[str]) -> Iterator[nn.Module]:
    return (net.get_submodule(path) for path in paths)


def _run(modules: Iterable[nn.Module], x: Tensor) -> Tensor:
    for module in modules:
        x = module(x)
    return x
