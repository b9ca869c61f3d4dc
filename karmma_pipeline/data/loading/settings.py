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
        description="Where tokens are read from. map: the files, mapped into memory (the page\n"
        "cache keeps what fits, one copy for all ranks). device: all tokens on the device.",
    )
    stage: Path | None = Field(
        None,
        description="Folder on the node's own disk, to which stores are copied and verified\n"
        "first; a verified copy is used again. /dev/shm: the node's memory, one copy for all\n"
        "ranks, which nothing evicts and which stays until it is removed. null: read where\n"
        "they lie.",
    )
    threads: int = Field(1, ge=0, description="Threads that gather ahead; 0: when asked.")
    ahead: int = Field(2, ge=1, description="Batches that are gathered before they are asked for.")
    label_spaces: Literal["same", "join"] = Field(
        "same",
        description="Several stores whose class lists differ. same: refuse, naming the\n"
        "differences; join: classes meet by name.",
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
