"""Networks that run their blocks by code of their own, and where those can be cut.

That is found by watching a pass: blocks that are called one after another, each with what the one
before gave and with nothing else of the input. Called so again, they give the same numbers.

B clips in a batch, P passes of a clip (its frames, or parts of as many frames as a network takes),
N places of an activation, D its channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._pytree import tree_leaves

from karmma_pipeline.errors import ConfigError
from karmma_pipeline.models.backbones.layers import Activations, Parts, Reached, block_paths


@dataclass(frozen=True, eq=False)
class Blocks:
    """A network with blocks; serves as the `feature_map` of an Architecture.

    Attributes:
        call: (network, input) to what its last block, or the norm behind that, gives.
        finish: (network, that, input) to the map [B, D, t, h, w] or its `Parts`. It looks at the
            shape of the input alone.
        behind: paths of the modules that ``finish`` runs.
        names: paths of the blocks; empty: the network's list of blocks.
    """

    call: Callable[[Any, Tensor], Any]
    finish: Callable[[Any, Any, Tensor], Tensor | Parts]
    behind: tuple[str, ...] = ()
    names: tuple[str, ...] = ()

    def __call__(self, net: nn.Module, x: Tensor) -> Tensor | Parts:
        """Return the map of an input."""
        return self.finish(net, self.call(net, x), x)

    def watch(self, net: nn.Module, shape: Sequence[int], frames: int | None = None) -> Chain:
        """Return where a network can be cut, which is nowhere if its blocks need more.

        Args:
            net: the network, on the meta device.
            shape: of an input, without the batch.
            frames: of a pass; None: as many as the input has.
        """
        x = in_passes(torch.empty(1, *shape, device="meta"), frames)
        calls, end = _watch(net, lambda: self.call(net, x))
        blocks = [path for path in self.paths(net) if path in calls]
        chain = {path: calls[path] for path in _chain(blocks, calls, end)}
        last = getattr(net, "output_fmt", "") == "NHWC"
        last |= any(call.given.dim() == 3 for call in chain.values())
        return Chain(self, chain, tuple(x.shape[1:]), frames, len(x), last)

    def paths(self, net: nn.Module) -> list[str]:
        """Return the paths of the blocks; none if they are in no list."""
        return [*self.names] or block_paths(net)


class _Call(NamedTuple):
    """One call of a module: what it was given first, the rest, and what it gave first."""

    given: Any
    rest: tuple[Any, ...]
    named: dict[str, Any]
    gave: Any

    @property
    def alone(self) -> bool:
        """Whether a tensor and plain values are all that it was given."""
        plain = (type(None), bool, int, float, str)
        others = all(isinstance(leaf, plain) for leaf in tree_leaves((self.rest, self.named)))
        return isinstance(self.given, Tensor) and others


@dataclass(frozen=True, eq=False)
class Chain(Activations):
    """The blocks between which a network can be cut, for one size of input; see `Stages`.

    Attributes:
        blocks: the network's code.
        modules: name of a stage, which is the path of its module, to how that was called.
        shape: of the input of a pass, without the batch.
        frames: see `Blocks.watch`.
        parts: passes of a clip that ``frames`` makes.
        channels_last: whether activations are [B P, ..., D], else [B P, D, ...].
    """

    blocks: Blocks
    modules: Mapping[str, _Call]
    shape: tuple[int, ...]
    frames: int | None
    parts: int
    channels_last: bool

    channel_axis = 2  # of an activation by clip, [B, P, D, ...]

    def activation(self, cut: str) -> tuple[tuple[int, ...], int]:
        """Return the grid and the channels of what goes into a stage, as the watched pass had it.

        Raises:
            ConfigError: there is no such stage.
        """
        self.split(cut)
        x = self.modules[cut].given.unsqueeze(0)
        return self.grid(x), self.as_tokens(x).shape[2]

    def end_before(self, net: nn.Module, cut: str) -> None:
        """Let passes through a network end before a stage, for `before`."""
        self.split(cut)
        net.get_submodule(cut).register_forward_pre_hook(_reached)

    def before(self, net: nn.Module, cut: str, x: Tensor) -> Tensor:
        """Return what goes into a stage, [B, P, ...], of a network that ends there."""
        try:
            self.blocks.call(net, in_passes(x, self.frames))
        except Reached as reached:
            made: Tensor = reached.output
            return torch.unflatten(made, 0, (len(x), -1))
        raise ConfigError(f"cut={cut!r}: {type(net).__name__} does not reach this module.")

    def after(self, net: nn.Module, cut: str, x: Tensor) -> Parts:
        """Return the map of what goes into a stage, [B, P, ...]; see `Stages.after`."""
        y: Any = x.flatten(0, 1)
        for path in self.split(cut)[1]:
            module, call = net.get_submodule(path), self.modules[path]
            y = module(_first(y), *call.rest, **call.named)
        seen = torch.empty(len(x) * self.parts, *self.shape, device="meta")
        made = self.blocks.finish(net, y, seen)
        return of_passes(made if isinstance(made, Parts) else Parts(made), self.parts)

    def split(self, cut: str) -> tuple[list[str], list[str]]:
        """Return the paths of the modules before and behind a cut; see `Stages.split`."""
        names = list(self.modules)
        if cut not in names:
            raise ConfigError(f"cut={cut!r}: allowed: {', '.join(['input', *names])}.")
        at = names.index(cut)
        return names[:at], names[at:]

    def drop_before(self, net: nn.Module, cut: str) -> None:
        """Take the weights of all that does not lie behind a cut out of a network."""
        done = [*self.split(cut)[1], *self.blocks.behind]
        for path, module in list(net.named_modules()):
            if any(f"{path}.".startswith(f"{one}.") for one in done):
                continue
            if path and (isinstance(module, _NormBase) or next(module.children(), None) is None):
                parent, _, name = path.rpartition(".")
                net.get_submodule(parent)._modules[name] = nn.Identity()
                done.append(path)
            else:  # which `finish` may ask for its sizes
                module._parameters = dict.fromkeys(module._parameters)
                module._buffers = dict.fromkeys(module._buffers)


def in_passes(x: Tensor, frames: int | None) -> Tensor:
    """Turn clips [B, 3, T, h, w] into passes [B P, 3, frames, h, w] one after another."""
    if frames is None:
        return x
    parts = x.shape[2] // frames
    if torch.onnx.is_in_onnx_export():  # which takes the batch of the below for constant
        return torch.stack(torch.split(x, frames, dim=2), dim=1).flatten(0, 1)
    return torch.unflatten(x, 2, (parts, frames)).transpose(1, 2).flatten(0, 1)


def of_passes(made: Parts, parts: int) -> Parts:
    """Put the maps of the passes of a clip behind one another in time."""
    if parts == 1:
        return made
    maps, extra = made
    whole = torch.unflatten(maps, 0, (-1, parts)).transpose(1, 2).flatten(2, 3)
    if extra is not None:
        extra = torch.unflatten(extra, 0, (-1, parts)).flatten(1, 2)
    return Parts(whole, extra)


def _reached(module: nn.Module, inputs: tuple[Any, ...]) -> None:
    raise Reached(inputs[0])


def _watch(net: nn.Module, run: Callable[[], Any]) -> tuple[dict[str, _Call], Any]:
    """Return how modules were called that were called once, by path, and what the pass gave."""
    seen: dict[str, list[_Call]] = {}

    def saw(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, given: Any, named: dict[str, Any], gave: Any) -> None:
            call = _Call(given[0] if given else None, given[1:], named, _first(gave))
            seen.setdefault(path, []).append(call)

        return hook

    modules = [(path, module) for path, module in net.named_modules() if path]
    handles = [m.register_forward_hook(saw(path), with_kwargs=True) for path, m in modules]
    with torch.inference_mode():
        end = run()
    for handle in handles:
        handle.remove()
    return {path: calls[0] for path, calls in seen.items() if len(calls) == 1}, end


def _chain(blocks: Sequence[str], calls: Mapping[str, _Call], end: Any) -> list[str]:
    """Return the paths of modules that follow one another up to the end; none if none do."""
    at, found = _first(getattr(end, "last_hidden_state", end)), list[str]()
    while blocks and calls[blocks[-1]].gave is not at:
        path = next((p for p in calls if p not in found and _ends(calls[p], at, p, blocks)), None)
        if path is None:
            return []
        at = calls[path].given
        found.insert(0, path)
    for path in reversed(blocks):
        if calls[path].gave is not at or not calls[path].alone:
            break
        at = calls[path].given
        found.insert(0, path)
    return found if blocks and blocks[-1] in found else []


def _ends(call: _Call, at: Any, path: str, blocks: Sequence[str]) -> bool:
    """Tell whether a module outside of all blocks gave a tensor."""
    holds = any(one.startswith(f"{path}.") or path.startswith(f"{one}.") for one in blocks)
    return call.gave is at and call.given is not at and call.alone and not holds


def _first(gave: Any) -> Any:
    return gave[0] if isinstance(gave, tuple) and gave else gave
