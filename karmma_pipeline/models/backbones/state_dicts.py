"""Weights of a backbone: from a file, published by torchvision, or random from a seed.

Files are read without running code and matched by name and shape: they come nested, prefixed,
with heads that a backbone has no use for, in half precision. Published weights are looked for in
torch's cache; only `fetch` downloads. ``random:SEED`` gives features without any download, the
same whatever the global random state: a random network keeps inputs apart if its activations
neither vanish nor explode on the way.
"""

import argparse
import hashlib
import re
import socket
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from karmma_pipeline import files
from karmma_pipeline.errors import CheckpointError, ConfigError
from karmma_pipeline.models.backbones import hub
from karmma_pipeline.models.backbones.registry import LIBRARIES, Architecture, find

#: Share of a backbone's tensors that a file must hold; heads do not count.
ENOUGH = 0.95

_NESTS = ("state_dict", "model_state_dict", "model_state", "model", "module", "net")
# Classes beside tensors and containers that a file may hold: training scripts save their arguments,
# and a Namespace only keeps values.
_PLAIN: list[Any] = [argparse.Namespace]


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
            f"{path}: rejected, because it is damaged or contains more than tensors and plain "
            f"values ({_reason(error)}); save it again with torch.save(model.state_dict(), ...) "
            "or as safetensors."
        ) from None
    content = _innermost(content)
    tensors = {str(k): v for k, v in content.items() if isinstance(v, Tensor)}
    if not tensors:
        raise CheckpointError(
            f"{path}: contains no state dict; found {sorted(map(str, content))[:8]}."
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
    named: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    for old, tensor in tensors.items():
        new = old
        for pattern, replacement in key_map:
            new = re.sub(pattern, replacement, new)
        if new in named:
            raise CheckpointError(
                f"{where}: key_map maps both {origin[new]!r} and {old!r} to {new!r}."
            )
        named[new], origin[new] = tensor, old
    return named


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
    given = {k: tensors[stripped[k]] for k in state if k in stripped}
    wrong = sorted(k for k, tensor in given.items() if tensor.shape != state[k].shape)
    needed = {k for k, tensor in state.items() if tensor.is_floating_point()}
    fitting = {k: tensor for k, tensor in given.items() if k not in wrong}
    loaded = Loaded(
        digest="",
        prefix=prefix,
        matched=len(needed & set(fitting)),
        missing=tuple(sorted(needed - set(given))),
        wrong_shape=tuple(wrong),
        unexpected=tuple(sorted(set(tensors) - {stripped[k] for k in given})),
    )
    if loaded.matched < ENOUGH * len(needed):
        raise CheckpointError(
            f"{where}: only {loaded.matched} of {len(needed)} tensors match this backbone; "
            f"{loaded.report()}. Are these the weights of another network?"
        )
    net.load_state_dict(fitting, strict=False)
    return Loaded(**{**vars(loaded), "digest": digest(net.state_dict())})


def _prefix(tensors: Mapping[str, Tensor], wanted: set[str], where: str) -> str:
    """Return the most common prefix of the expected parameter names."""
    hits: Counter[str] = Counter()
    for key in tensors:
        parts = key.split(".")
        tails = (".".join(parts[i:]) for i in range(len(parts)))
        hits.update(key.removesuffix(tail) for tail in tails if tail in wanted)
    best = hits.most_common(2)
    if len(best) == 2 and best[0][1] == best[1][1] > len(wanted) / 2:
        raise CheckpointError(
            f"{where}: contains this network more than once (under {best[0][0]!r} and "
            f"{best[1][0]!r}); save the one to use separately."
        )
    return best[0][0] if best else ""


def _some(names: tuple[str, ...], most: int = 3) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


#: Seconds without an answer after which a download counts as failed: nodes behind a firewall would
#: wait for ever.
TIMEOUT_S = 10.0


def enum_member(architecture: Architecture, name: str) -> Any | None:
    """Return torchvision's weight of a name, with or without its enum's name; None if none."""
    enum = architecture.weights
    if enum is None:
        return None
    return enum.__members__.get(name.removeprefix(f"{enum.__name__}."))


def known(architecture: Architecture) -> tuple[str, ...]:
    """Return the full names of the weights that are published for a network."""
    enum = architecture.weights
    return () if enum is None else tuple(f"{enum.__name__}.{m}" for m in enum.__members__)


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
            f"{path}: the weights {member} are missing; run `karmma backbones fetch {backbone} "
            f"{member}` on a machine with internet access (on a cluster, with TORCH_HOME set to "
            "a folder that the compute nodes can read, or --to DIR and weights: "
            f"DIR/{path.name})."
        )
    return read_file(path)


def fetch(name: str, weights: str = "DEFAULT", folder: Path | None = None) -> Path:
    """Download a published weight into its library's cache or a folder, and check it.

    A file that is already there is checked and kept.

    Raises:
        ConfigError: there is no such backbone, or no such weight of it.
        CheckpointError: there is no network, or the file is not what it should be.
    """
    library, _, rest = name.partition(":")
    if library in LIBRARIES:
        repository = (
            rest
            if library == "hf"
            else import_module("karmma_pipeline.models.backbones.timm_networks").repository(rest)
        )
        return hub.fetch(repository, name, folder)
    architecture = find(name)
    member = enum_member(architecture, weights)
    if member is None:
        raise ConfigError(
            f"weights={weights!r}: not published for {name}; "
            f"known: {', '.join(known(architecture)) or 'none'}."
        )
    cached = cached_file(member)
    path = (folder or cached.parent) / cached.name
    if path.is_file():
        _check_hash(path)
    else:
        _download(member.url, path, f"karmma backbones fetch {name} {member}")
    return path


def _hash_prefix(path: Path) -> str:
    digits = re.search(r"-([0-9a-f]{8,})\.", path.name)
    return digits.group(1) if digits else ""


def _check_hash(path: Path) -> None:
    sha = files.sha256(path)
    if not sha.startswith(_hash_prefix(path)):
        raise CheckpointError(
            f"{path}: its sha256 {sha[:8]} does not match its file name; remove it and fetch it "
            "again."
        )


def _download(url: str, path: Path, command: str) -> None:
    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT_S)
    try:
        with files.replacing(path) as temporary:
            torch.hub.download_url_to_file(url, str(temporary), _hash_prefix(path) or None)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(
            f"{url}: the download failed ({error}); without internet access here, run "
            f"`{command}` elsewhere with the same TORCH_HOME or --to, or copy the file to "
            f"{path}."
        ) from None
    finally:
        socket.setdefaulttimeout(patience)


#: Version of the calibrating pass below; part of the digest, since it decides the features.
CALIBRATION = 2

# Pixels (over all frames) of noise to calibrate with: small inputs give few positions in the last
# maps, and need more clips for sound statistics.
_POSITIONS = 2**21


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw CPU random numbers from a seed inside, and leave the global state as it was."""
    state = torch.get_rng_state()
    # Not torch.manual_seed, which would reset the generators of all GPUs too.
    torch.default_generator.manual_seed(seed)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_rng_state(state)


def random_net(architecture: Architecture, seed: int, shape: tuple[int, ...]) -> nn.Module:
    """Build a network with seeded random weights that works as a random feature extractor.

    Batch normalisation gets its running statistics from one pass of seeded noise of the input's
    shape, layer by layer, since each layer normalises with what it has just seen; with
    torchvision's own start (mean 0, variance 1) activations vanish or explode.
    """
    with seeded(seed):
        net = architecture.headless().eval()
        layers = [m for m in net.modules() if isinstance(m, _BatchNorm)]
        if layers:
            _set_running_statistics(net, layers, architecture, shape)
    return net.eval()


def _set_running_statistics(
    net: nn.Module, layers: list[_BatchNorm], architecture: Architecture, shape: tuple[int, ...]
) -> None:
    noise = _noise(shape, clips=min(32, max(2, _POSITIONS // prod(shape[1:]))))
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.momentum = None  # one plain average
        layer.train()
    with torch.inference_mode():
        architecture.features(net, noise)
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
        if layer.running_var is not None:  # channels that noise hardly moves must not explode
            layer.running_var.clamp_(min=float(layer.running_var.mean()) / 10)


def _noise(shape: tuple[int, ...], clips: int) -> torch.Tensor:
    """Draw noise [clips, *shape] whose colour, contrast and coarseness vary as those of scenes do.

    Statistics of noise that is all alike fit no picture: features of real clips then come out
    hundreds of times too large.
    """
    one = [1] * (len(shape) - 1)
    mode = "trilinear" if len(shape) == 4 else "bilinear"
    noise = torch.zeros(clips, *shape)
    for coarseness in (16, 8, 4, 1):
        drawn = torch.randn(clips, 3, *(-(-side // coarseness) for side in shape[1:]))
        drawn = nn.functional.interpolate(drawn, shape[1:], mode=mode)
        noise += torch.rand(clips, 1, *one) * drawn
    return noise * torch.rand(clips, 1, *one) + torch.randn(clips, 3, *one)
