"""Models that were never trained, and recipes that evaluate them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from support.tiny_store import write_store

from karmma_pipeline import config
from karmma_pipeline.evaluation.recipe import EvaluateRecipe
from karmma_pipeline.models.fusion import FusionSize
from karmma_pipeline.models.saved import ModelCard, save_model
from karmma_pipeline.store import open_joined

BACKBONE = {"backbone": "x", "weights": "random:3"}
EVIL = "<script>alert(1)</script> $x_$ | a"


def save_run(
    run: Path,
    *stores: Path,
    name: str,
    kind: str = "student",
    seed: int = 0,
    provenance: Mapping[str, str] = BACKBONE,
    training: Mapping[str, Any] | None = None,
) -> Path:
    opened = open_joined(stores, "join")
    card = ModelCard.model_validate(
        {
            "kind": kind,
            "name": name,
            "size": FusionSize(dim=8, attention_heads=2, ffn_width=8, head_width=8),
            "modalities": {m: opened.shape(m) for m in opened.modalities},
            "heads": opened.heads,
            "provenance": dict.fromkeys(opened.modalities, provenance),
            "store_digest": opened.digest,
            "training": dict(training or {}),
        }
    )
    torch.manual_seed(seed)
    save_model(run / "best", card.build(), card)
    return run


def write_two_runs(root: Path, clips: int) -> Path:
    """Write a store and the two runs that `make_recipe` names; return the store."""
    store = write_store(root / "store", clips=clips)
    for seed in range(2):
        save_run(root / f"run{seed}", store, name=f"r{seed}", seed=seed)
    return store


def make_recipe(place: Path, **changes: Any) -> EvaluateRecipe:
    tree = {
        "runs": [str(place / "run0"), str(place / "run1")],
        "stores": [str(place / "store")],
        "out": str(place / "report"),
        "split": "",
        "title": EVIL,
        "classes": False,
        **changes,
    }
    return config.build(EvaluateRecipe, tree, "test")
