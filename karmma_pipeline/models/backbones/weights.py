"""Where a backbone's weights come from: a torchvision enum, a local file, or a seed.

Untrusted files never run code, and nothing is downloaded except by `fetch`.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from karmma_pipeline.errors import CheckpointError, ConfigError
from karmma_pipeline.models.backbones.registry import Architecture

ENOUGH = 0.95
"""Share of a backbone's tensors that a file must hold; heads do not count."""

_NESTS = ("state_dict", "model", "model_state_dict", "model_state", "module")
_PREFIXES = ("module.", "backbone.", "encoder.", "model.", "net.")


@dataclass(frozen=True)
class Loaded:
    """What a weights source gave: its digest and, for files, what did not fit."""

    digest: str
    missing: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the sha256 over names, dtypes, shapes and bytes, in the order of names."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def random_net(architecture: Architecture, seed: int, shape: tuple[int, ...]) -> nn.Module:
    """Build a network with seeded random weights that works as a random feature extractor.

    Batch normalisation gets its running statistics from one pass of seeded smooth noise of
    the input's shape; without that, activations vanish layer by layer.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = architecture.headless().eval()
        layers = [m for m in net.modules() if isinstance(m, _BatchNorm)]
        if layers:
            _calibrate(net, layers, architecture, shape)
    return net.eval()


def _calibrate(
    net: nn.Module, layers: list[_BatchNorm], architecture: Architecture, shape: tuple[int, ...]
) -> None:
    coarse = torch.randn(4, 3, *(max(1, side // 8) for side in shape[1:]))
    mode = "trilinear" if coarse.dim() == 5 else "bilinear"
    smooth = nn.functional.interpolate(coarse, shape[1:], mode=mode)
    noise = smooth + 0.3 * torch.randn(4, *shape)
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.momentum = None  # one plain average
        layer.train()
    with torch.inference_mode():
        architecture.feature_map(net, noise)
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
        if layer.running_var is not None:  # channels that noise hardly moves must not explode
            layer.running_var.clamp_(min=float(layer.running_var.mean()) / 10)


def parse_seed(weights: str) -> int | None:
    """Return the seed of ``random:SEED``, None for any other source."""
    if not weights.startswith("random:"):
        return None
    try:
        return int(weights.removeprefix("random:"))
    except ValueError:
        raise ConfigError(f"weights={weights!r}: write random:SEED with a whole number.") from None


def enum_member(architecture: Architecture, name: str) -> Any:
    """Return the torchvision weight of a name, with or without its enum's name before it.

    Raises:
        ConfigError: there is none of that name.
    """
    enum = architecture.weights
    short = name.removeprefix(f"{enum.__name__}.")
    if short in enum.__members__:
        return enum[short]
    known = ", ".join(f"{enum.__name__}.{m}" for m in enum.__members__)
    raise ConfigError(
        f"weights={name!r}: neither a file nor a published weight; "
        f"write random:SEED, a path, or one of {known}."
    )


def cached_file(member: Any) -> Path:
    """Return where torchvision keeps a published weight's file (``TORCH_HOME`` moves it)."""
    return Path(torch.hub.get_dir()) / "checkpoints" / Path(member.url).name


def read_published(member: Any, backbone: str) -> dict[str, Tensor]:
    """Read a published weight from the cache, without the network.

    Raises:
        CheckpointError: it was never fetched; the message names the command that does.
    """
    path = cached_file(member)
    if not path.is_file():
        raise CheckpointError(
            f"{path}: the weights {member} are not there; where there is network, run "
            f"`karmma backbones fetch {backbone} {member}`, on a cluster with TORCH_HOME set to "
            "a folder that the compute nodes see."
        )
    return read_file(path)


def read_file(path: Path) -> dict[str, Tensor]:
    """Read a state dict as found in the wild, nested or not; never runs code.

    Raises:
        CheckpointError: the file is missing, damaged, or holds something else.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such weights file.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}).") from None
    except Exception as error:  # torch raises whatever the bytes provoke
        reason = str(error).splitlines()[0]
        raise CheckpointError(
            f"{path}: no plain state dict, refused ({reason}); "
            "save it again with torch.save(model.state_dict(), ...) or as safetensors."
        ) from None
    while isinstance(content, dict) and not _is_state_dict(content):
        inner = next((content[key] for key in _NESTS if isinstance(content.get(key), dict)), None)
        if inner is None:
            raise CheckpointError(
                f"{path}: holds no state dict; found {sorted(map(str, content))[:8]}."
            )
        content = inner
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, not a state dict.")
    return {str(k): v for k, v in content.items() if isinstance(v, Tensor)}


def _is_state_dict(content: Mapping[Any, Any]) -> bool:
    return any(isinstance(value, Tensor) for value in content.values())


def fill(net: nn.Module, tensors: Mapping[str, Tensor], where: str) -> Loaded:
    """Copy matching tensors into a network, whatever prefix they carry.

    Raises:
        CheckpointError: less than 95 % of the network's tensors are found with their shape.
    """
    wanted = net.state_dict()
    stripped = _strip(tensors, set(wanted))
    found = {k: v for k, v in stripped.items() if k in wanted and v.shape == wanted[k].shape}
    missing = tuple(sorted(set(wanted) - set(found)))
    if len(found) < ENOUGH * len(wanted):
        raise CheckpointError(
            f"{where}: only {len(found)} of {len(wanted)} tensors fit this backbone "
            f"(missing or of another shape: {', '.join(missing[:4])}, ...); is it another network?"
        )
    net.load_state_dict(found, strict=False)
    return Loaded(digest(net.state_dict()), missing, tuple(sorted(set(stripped) - set(found))))


def _strip(tensors: Mapping[str, Tensor], wanted: set[str]) -> dict[str, Tensor]:
    best = dict(tensors)
    candidate = best
    while True:
        prefix = next((p for p in _PREFIXES if any(k.startswith(p) for k in candidate)), None)
        if prefix is None:
            return best
        candidate = {k.removeprefix(prefix): v for k, v in candidate.items()}
        if len(wanted & set(candidate)) > len(wanted & set(best)):
            best = candidate


def fetch(architecture: Architecture, name: str, folder: Path | None = None) -> Path:
    """Download a published weight, checked against its hash, into the cache or a folder.

    Raises:
        CheckpointError: there is no network, or the file is not what it should be.
    """
    member = enum_member(architecture, name)
    path = (folder or cached_file(member).parent) / cached_file(member).name
    try:
        torch.hub.load_state_dict_from_url(
            member.url, model_dir=str(path.parent), check_hash=True, weights_only=True
        )
    except (OSError, RuntimeError) as error:
        raise CheckpointError(
            f"{member.url}: the download failed ({error}); run this where there is network, "
            f"or copy the file to {path} yourself."
        ) from None
    return path
