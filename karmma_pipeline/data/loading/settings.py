"""How a recipe says that tokens come from disk to the model; torch is not needed to read it."""

import logging
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from karmma_pipeline.config import Recipe

_logger = logging.getLogger(__name__)


class LoaderSettings(Recipe):
    """How tokens come from disk to the model."""

    FREE = frozenset({"cache", "stage", "threads", "ahead"})

    cache: Literal["map", "device"] = Field(
        "map",
        description="Where tokens are read from. map: memory-mapped files, kept in the page "
        "cache as far as memory allows, shared by all ranks. device: all tokens are copied to the "
        "device.",
    )
    stage: Path | None = Field(
        None,
        description="Folder on a local disk of the node, to which stores are copied and "
        "verified first; verified copies are reused. /dev/shm: the node's memory, one copy "
        "for all ranks, which stays until you delete it. null: read in place.",
    )
    threads: int = Field(1, ge=0, description="Threads that prefetch batches; 0: none.")
    ahead: int = Field(2, ge=1, description="Batches to prefetch.")
    label_spaces: Literal["same", "join"] = Field(
        "same",
        description="How to treat several stores with different class lists. same: raise an "
        "error; join: match classes by name.",
    )

    @model_validator(mode="before")
    @classmethod
    def _read_cache_node(cls, keys: Any) -> Any:
        """Read what recipes up to 0.1.0 call ``cache: node``."""
        if not isinstance(keys, dict) or keys.get("cache") != "node":
            return keys
        stage = keys.get("stage") or "/dev/shm"  # noqa: S108  (the copy's owner is checked)
        _logger.warning(
            "loader.cache=node is now loader.stage=%s; remove the copy after the last run: "
            "rm -r %s/karmma-*",
            stage,
            stage,
        )
        return keys | {"cache": "map", "stage": stage}
