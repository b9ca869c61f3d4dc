"""Extractions that are run again when files have come, changed or gone, or on `--retry`."""

import csv
import shutil
import signal
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from support.forks import in_fork
from support.media_files import write_video
from support.nth_call import kill_at_call

from karmma_pipeline import config
from karmma_pipeline.cli import main
from karmma_pipeline.errors import StoreError
from karmma_pipeline.extraction.again import Retry
from karmma_pipeline.extraction.pipeline import extract
from karmma_pipeline.extraction.recipe import ExtractRecipe
from karmma_pipeline.jobs import Part
from karmma_pipeline.modalities import Reason
from karmma_pipeline.store import FeatureStore, verify

RECIPE: dict[str, Any] = {
    "audio": {"front_end": "vggish", "n_fft": 512, "win_length": 400, "mels": 32},
    "sets": {
        "one": {
            "rgb": {"name": "s3d", "weights": "random:0", "frames": 8, "size": 32},
            "audio": {"name": "resnet18", "weights": "random:2", "image": [32, 32]},
        },
        "two": {"audio": {"name": "resnet18", "weights": "random:2", "image": [32, 32]}},
    },
    "store": {"clips_per_shard": 4},
    "decode": {"workers": 1},
    "batch_size": 2,
    "precision": "float32",
    "memory_format": "contiguous",
    "max_failures": 1.0,
}


def recipe_of(folder: Path, **changes: Any) -> ExtractRecipe:
    tree = {**RECIPE, "manifest": str(folder / "m.csv"), "out": str(folder / "out"), **changes}
    return config.build(ExtractRecipe, tree, "test")
