"""A network as a sequence of named stages, to cut it between two of them.

What lies before a cut is frozen and computed once, what lies behind it is trained. Both parts run
the very modules of the whole network in their order: prefix and suffix give its numbers.

B clips in a batch, N places of an activation, D its channels.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn

from karmma_pipeline.errors import ConfigError
from karmma_pipeline.models.backbones.layers import as_map


@dataclass(frozen=True, eq=False)
class Stages:
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

    def as_tokens(self, x: Tensor) -> Tensor:
        """Turn an activation into tokens [B, N, D]."""
        return (x if self.channels_last else x.movedim(1, -1)).flatten(1, -2)

    def of_tokens(self, tokens: Tensor, grid: Sequence[int]) -> Tensor:
        """Turn tokens [B, N, D] back into the activation of a grid."""
        x = torch.unflatten(tokens, 1, tuple(grid))
        return x if self.channels_last else x.movedim(-1, 1).contiguous()

    def grid(self, x: Tensor) -> tuple[int, ...]:
        """Return the sides of an activation: its shape without batch and channels."""
        return tuple(x.shape[1:-1] if self.channels_last else x.shape[2:])


def _modules(net: nn.Module, paths: Iterable[str]) -> Iterator[nn.Module]:
    return (net.get_submodule(path) for path in paths)


def _run(modules: Iterable[nn.Module], x: Tensor) -> Tensor:
    for module in modules:
        x = module(x)
    return x
