"""Names of networks and weights, for lists, completion in the shell and those who mistype one.

Neither torch nor any library of networks is imported: a completion must not take seconds. So what
timm and transformers have is not asked for; the names of them that are known here are those of
`PUBLISHED` and those whose files lie in the hub's cache.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Literal

Kind = Literal["video", "image", "boxes", "series"]

#: The group of entry points under which packages give names to networks of their own.
ENTRY_POINTS = "karmma.backbones"

#: The shipped networks that take frames and sizes as they come.
FREE: dict[str, Kind] = {
    **dict.fromkeys(("swin3d_t", "swin3d_s", "swin3d_b", "s3d"), "video"),
    **dict.fromkeys(("r2plus1d_18", "r3d_18", "mc3_18"), "video"),
    **dict.fromkeys(("efficientnet_b0", "resnet18", "mobilenet_v3_large"), "image"),
    "boxes": "boxes",
    "windows": "series",
}

#: All shipped networks.
SHIPPED = (*FREE, "mvit_v1_b", "mvit_v2_s")

#: Networks of timm and transformers: what they take, and the licence of their weights. Only some of
#: what those libraries have; the licence that counts is the one that comes with the files.
PUBLISHED = {
    "timm:vit_small_patch16_dinov3.lvd1689m": ("video", "DINOv3 License"),
    "timm:vit_base_patch16_siglip_224.v2_webli": ("video", "Apache-2.0"),
    "timm:vit_pe_core_base_patch16_224.fb": ("video", "Apache-2.0"),
    "hf:MCG-NJU/videomae-base": ("video", "CC BY-NC 4.0 (non-commercial)"),
    "hf:facebook/vjepa2-vitl-fpc64-256": ("video", "MIT"),
    "hf:facebook/timesformer-base-finetuned-k400": ("video", "CC BY-NC 4.0 (non-commercial)"),
    "hf:google/vivit-b-16x2-kinetics400": ("video", "MIT"),
    "hf:facebook/dinov2-base": ("video", "Apache-2.0"),
    "hf:facebook/dinov3-vits16-pretrain-lvd1689m": ("video", "DINOv3 License"),
    "hf:google/siglip2-base-patch16-224": ("video", "Apache-2.0"),
    "hf:openai/clip-vit-base-patch16": ("video", "MIT"),
    "hf:MIT/ast-finetuned-audioset-10-10-0.4593": ("image", "BSD-3-Clause"),
    "hf:laion/clap-htsat-unfused": ("image", "Apache-2.0"),
    "hf:openai/whisper-base": ("image", "Apache-2.0"),
}


def known() -> list[str]:
    """Return the names that need no library to be known, the shipped networks first."""
    names = [*SHIPPED, *sorted(entry_points(group=ENTRY_POINTS).names), *PUBLISHED, *_cached()]
    return list(dict.fromkeys(names))


def _hub_cache() -> Path:
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    return Path(os.environ.get("HF_HUB_CACHE") or home / "hub").expanduser()


def _cached() -> Iterator[str]:
    """Yield the networks in the hub's cache: ``models--OWNER--NAME`` is a repository."""
    for folder in sorted(_hub_cache().glob("models--*--*")):
        _, owner, name = folder.name.split("--", 2)
        yield f"timm:{name}" if owner == "timm" else f"hf:{owner}/{name}"


def cached_sha256(name: str) -> str | None:
    """Return the sha256 of a timm or hf network's weights in the hub's cache, None if not there.

    The hub keeps a file of weights under its sha256 and links to it, so nothing is read; empty
    where it could not link.
    """
    repository = name.removeprefix("hf:").replace("timm:", "timm/")
    folder = _hub_cache() / f"models--{repository.replace('/', '--')}"
    files = list(folder.glob("snapshots/*/model.safetensors"))
    newest = max(files, key=lambda file: file.stat().st_mtime, default=None)
    if newest is None:
        return None
    return newest.resolve().name if newest.is_symlink() else ""


def near(name: str, among: Iterable[str] | None = None) -> str:
    """Return `` (did you mean A, B?)`` for a name that was mistyped, or nothing.

    Args:
        name: as it was written.
        among: the names that there are; None: `known`.
    """
    folded = {one.lower(): one for one in (known() if among is None else among)}
    found = difflib.get_close_matches(name.lower(), folded, n=3, cutoff=0.7)
    return f" (did you mean {', '.join(folded[one] for one in found)}?)" if found else ""
