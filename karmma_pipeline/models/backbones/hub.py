"""The Hugging Face hub's cache: files are looked for there, and only `fetch` downloads.

``HF_HOME`` moves the cache, ``HF_ENDPOINT`` the hub, ``HF_HUB_OFFLINE`` forbids it: all three are
the library's own variables.
"""

import re
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from types import ModuleType

import yaml

from karmma_pipeline import files
from karmma_pipeline.errors import CheckpointError, ConfigError, one_line
from karmma_pipeline.models.backbones import names

#: Licence of weights that state none.
NOT_STATED = "not stated"

# What a node needs of a repository: no pickles, no code.
_WEIGHTS = "model*.safetensors"
_WANTED = ("*.json", _WEIGHTS, "README.md", "LICENSE*")

_FRONT_MATTER = re.compile(r"\A---\s*\n(.*?)\n---\s*$", re.DOTALL | re.MULTILINE)

_EXTRAS = {
    "timm": "timm",
    "transformers": "hf",
    "huggingface_hub": "hf",
    **dict.fromkeys(("onnx", "onnxruntime", "onnxruntime.quantization"), "export"),
}


def library(name: str) -> ModuleType:
    """Import an optional library.

    Raises:
        ConfigError: it is not installed; the message names the extra.
    """
    try:
        return import_module(name)
    except ImportError as error:
        which = _EXTRAS[name]
        raise ConfigError(
            f"{which}: needs the package {name} ({error}); "
            f"run pip install 'karmma-pipeline[{which}]'."
        ) from None


def non_commercial(licence: str) -> bool:
    """Tell whether a licence's name forbids commercial use."""
    return bool(re.search(r"\bnc\b|non.?commercial", licence.lower()))


def licence(folder: Path) -> str:
    """Return the licence that a repository's card (README.md) states."""
    with suppress(OSError, UnicodeDecodeError, yaml.YAMLError):
        found = _FRONT_MATTER.search((folder / "README.md").read_text(encoding="utf-8"))
        facts = yaml.safe_load(found.group(1)) if found else None
        if isinstance(facts, dict) and isinstance(facts.get("license"), str):
            named = facts.get("license_name") if facts["license"] == "other" else None
            return str(named or facts["license"])
    return NOT_STATED


def cached(repository: str, file: str, name: str) -> Path:
    """Return where the cache has a file of a repository.

    Raises:
        CheckpointError: it was never fetched; the message names the command that does.
    """
    found = library("huggingface_hub").try_to_load_from_cache(repository, file)
    if not isinstance(found, str):
        raise CheckpointError(
            f"{name}: {file} of {repository} is not in the cache; run `karmma backbones fetch "
            f"{name}` on a machine with internet access (on a cluster, with HF_HOME set to a "
            "folder that the compute nodes can read)."
        )
    return Path(found)


def fetch(repository: str, name: str, folder: Path | None = None) -> Path:
    """Download a repository's configuration and safetensors into the cache, or a folder.

    What was cut off goes on where it ended; what is there is kept, and checked by its sha256.

    Raises:
        CheckpointError: there is no network, no such repository, or it has no safetensors; or a
            file is not what the hub says.
    """
    hub = library("huggingface_hub")
    try:
        listed = hub.HfApi().model_info(repository, files_metadata=True).siblings
        where = Path(
            hub.snapshot_download(repository, local_dir=folder, allow_patterns=list(_WANTED))
        )
    except Exception as error:  # of the hub, of HTTP, of the disk
        reason = one_line(error, 300)
        if isinstance(error, hub.errors.RepositoryNotFoundError):
            raise CheckpointError(
                f"{name}: no such repository on the hub{names.near(name)}; if the "
                "repository is gated, accept its terms on the hub and set HF_TOKEN."
            ) from None
        raise CheckpointError(
            f"{repository}: the download failed ({type(error).__name__}: {reason}); run `karmma "
            f"backbones fetch {name}` again to resume."
        ) from None
    for file in listed:
        path, stored = where / file.rfilename, file.lfs
        if stored is not None and path.is_file() and files.sha256(path) != stored.sha256:
            path.resolve().unlink()
            path.unlink(missing_ok=True)
            raise CheckpointError(f"{path}: was damaged and has been removed; fetch it again.")
    if not any(where.glob(_WEIGHTS)):
        raise CheckpointError(
            f"{repository}: has no model.safetensors, and other formats may execute code; "
            "convert the weights, or use another repository."
        )
    return where


def folder_of(repository: str, wanted: Sequence[str]) -> Path:
    """Return a folder with some files of a repository, which the cache keeps.

    Without network it is what was downloaded before.

    Args:
        repository: ``USER/NAME``.
        wanted: patterns of file names.

    Raises:
        CheckpointError: there is no network and nothing in the cache, or no such repository.
    """
    hub = library("huggingface_hub")
    try:
        return Path(hub.snapshot_download(repository, allow_patterns=list(wanted)))
    except Exception as error:  # of the hub, of HTTP, of the disk
        reason = one_line(error, 300)
        raise CheckpointError(
            f"hf:{repository}: the download failed ({type(error).__name__}: {reason})."
        ) from None
