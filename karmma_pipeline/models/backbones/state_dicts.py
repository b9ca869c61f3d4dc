"""State dicts as found in the wild: read without running code, matched by name and shape.

They come nested, prefixed, with heads that a backbone has no use for, in half precision.
"""

import argparse
import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from karmma_pipeline.errors import CheckpointError

ENOUGH = 0.95
"""Share of a backbone's tensors that a file must hold; heads do not count."""

_NESTS = ("state_dict", "model_state_dict", "model_state", "model", "module", "net")
_PLAIN: list[Any] = [argparse.Namespace]
"""Classes beside tensors and containers that a file may hold: training scripts save their
arguments, and a Namespace only keeps values."""


@dataclass(frozen=True)
class Loaded:
    """What a source of weights gave: a digest and, for files, how they matched.

    ``digest`` is a sha256 (see `digest`); ``prefix`` stood before every matching name of the
    file. Names are the network's, except in ``unexpected``, where they are the file's.
    """

    digest: str
    prefix: str = ""
    matched: int = 0
    missing: tuple[str, ...] = ()
    wrong_shape: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()

    def report(self) -> str:
        """Say in one sentence what matched and what did not."""
        rest = {
            "missing": self.missing,
            "of another shape": self.wrong_shape,
            "unexpected": self.unexpected,
        }
        parts = [f"{len(names)} {what} ({_some(names)})" for what, names in rest.items() if names]
        under = f" under {self.prefix!r}" if self.prefix else ""
        return ", ".join([f"{self.matched} tensors matched{under}", *parts])


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the sha256 over names, dtypes, shapes and bytes, in the order of names."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def read_file(path: Path) -> dict[str, Tensor]:
    """Read a state dict, nested or not, from safetensors or torch's format; never runs code.

    Raises:
        CheckpointError: the file is missing, damaged, or holds something else.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such weights file.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals(_PLAIN):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}).") from None
    except Exception as error:  # torch raises whatever the bytes provoke
        raise CheckpointError(
            f"{path}: refused, it is damaged or holds more than tensors and plain values "
            f"({_reason(error)}); save it again with torch.save(model.state_dict(), ...) or as "
            "safetensors."
        ) from None
    content = _innermost(content)
    tensors = {str(k): v for k, v in content.items() if isinstance(v, Tensor)}
    if not tensors:
        raise CheckpointError(
            f"{path}: holds no state dict; found {sorted(map(str, content))[:8]}."
        )
    return tensors


def _innermost(content: Any) -> dict[Any, Any]:
    """Follow the usual keys down to the state dict, which itself never holds a dict."""
    while isinstance(content, dict):
        inner = next((content[k] for k in _NESTS if isinstance(content.get(k), dict)), None)
        if inner is None:
            return content
        content = inner
    return {type(content).__name__: None}


def _reason(error: Exception) -> str:
    """Return the line of torch's long advice that names the cause."""
    lines = str(error).splitlines() or [type(error).__name__]
    return next((line.strip() for line in lines if "Unsupported" in line), lines[0][:120])


def renamed(
    tensors: Mapping[str, Tensor], key_map: Sequence[tuple[str, str]], where: str
) -> dict[str, Tensor]:
    """Return a state dict of another code base under other names.

    Args:
        tensors: by the file's names.
        key_map: (regex, replacement) pairs, each applied to every name in this order.
        where: opens the error message.

    Raises:
        CheckpointError: two tensors get the same name.
    """
    found: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    for old, tensor in tensors.items():
        new = old
        for pattern, replacement in key_map:
            new = re.sub(pattern, replacement, new)
        if new in found:
            raise CheckpointError(
                f"{where}: key_map gives {origin[new]!r} and {old!r} the same name {new!r}."
            )
        found[new], origin[new] = tensor, old
    return found


def fill(net: nn.Module, tensors: Mapping[str, Tensor], where: str) -> Loaded:
    """Copy matching tensors into a network, whatever prefix they carry.

    Counters and index tables, which a network makes by itself, may be absent: files older than
    the network's code have none.

    Raises:
        CheckpointError: less than 95 % of the network's tensors are found with their shape.
    """
    state = net.state_dict()
    prefix = _prefix(tensors, set(state), where)
    stripped = {k.removeprefix(prefix): k for k in tensors if k.startswith(prefix)}
    found = {k: tensors[stripped[k]] for k in state if k in stripped}
    wrong = sorted(k for k, tensor in found.items() if tensor.shape != state[k].shape)
    needed = {k for k, tensor in state.items() if tensor.is_floating_point()}
    fitting = {k: tensor for k, tensor in found.items() if k not in wrong}
    loaded = Loaded(
        digest="",
        prefix=prefix,
        matched=len(needed & set(fitting)),
        missing=tuple(sorted(needed - set(found))),
        wrong_shape=tuple(wrong),
        unexpected=tuple(sorted(set(tensors) - {stripped[k] for k in found})),
    )
    if loaded.matched < ENOUGH * len(needed):
        raise CheckpointError(
            f"{where}: only {loaded.matched} of {len(needed)} tensors fit this backbone; "
            f"{loaded.report()}; is it another network?"
        )
    net.load_state_dict(fitting, strict=False)
    return Loaded(**{**vars(loaded), "digest": digest(net.state_dict())})


def _prefix(tensors: Mapping[str, Tensor], wanted: set[str], where: str) -> str:
    """Return what stands before the most of the wanted names."""
    hits: Counter[str] = Counter()
    for key in tensors:
        parts = key.split(".")
        tails = (".".join(parts[i:]) for i in range(len(parts)))
        hits.update(key.removesuffix(tail) for tail in tails if tail in wanted)
    best = hits.most_common(2)
    if len(best) == 2 and best[0][1] == best[1][1] > len(wanted) / 2:
        raise CheckpointError(
            f"{where}: holds this network more than once (under "
            f"{best[0][0]!r} and {best[1][0]!r}); save the one that you mean by itself."
        )
    return best[0][0] if best else ""


def _some(names: tuple[str, ...], most: int = 3) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")
