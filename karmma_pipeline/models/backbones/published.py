"""Weights that torchvision publishes: found in torch's cache, downloaded only by `fetch`."""

import re
import socket
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from karmma_pipeline import files
from karmma_pipeline.errors import CheckpointError, ConfigError
from karmma_pipeline.models.backbones.registry import Architecture, find
from karmma_pipeline.models.backbones.state_dicts import read_file

PATIENCE_S = 10.0
"""Seconds without an answer after which a download counts as failed: nodes behind a firewall
would wait for ever."""


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
            f"{path}: the weights {member} are not there; where there is network, run "
            f"`karmma backbones fetch {backbone} {member}`, on a cluster with TORCH_HOME set to a "
            f"folder that the compute nodes see (or --to DIR, and weights: DIR/{path.name})."
        )
    return read_file(path)


def fetch(name: str, weights: str = "DEFAULT", folder: Path | None = None) -> Path:
    """Download a published weight into torch's cache or a folder, and check it against its hash.

    A file that is already there is checked and kept.

    Raises:
        ConfigError: there is no such backbone, or no such weight of it.
        CheckpointError: there is no network, or the file is not what it should be.
    """
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
    found = re.search(r"-([0-9a-f]{8,})\.", path.name)
    return found.group(1) if found else ""


def _check_hash(path: Path) -> None:
    sha = files.sha256(path)
    if not sha.startswith(_hash_prefix(path)):
        raise CheckpointError(
            f"{path}: its sha256 {sha[:8]} is not the one in its name; remove it and fetch again."
        )


def _download(url: str, path: Path, command: str) -> None:
    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(PATIENCE_S)
    try:
        with files.replacing(path) as temporary:
            torch.hub.download_url_to_file(url, str(temporary), _hash_prefix(path) or None)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(
            f"{url}: the download failed ({error}); without network here, run `{command}` where "
            f"there is, with the same TORCH_HOME or --to, or copy the file to {path} yourself."
        ) from None
    finally:
        socket.setdefaulttimeout(patience)
