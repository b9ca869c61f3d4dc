"""A small chain around stores of synthetic tokens, and stand-ins for Slurm's commands."""

import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from karmma_pipeline import config
from karmma_pipeline.extraction.recipe import ExtractRecipe

EXTRACT: dict[str, Any] = {
    "manifest": "clips/m.csv",
    "out": "features",
    "sets": {
        "teacher": {"audio": {"name": "resnet18", "weights": "random:0", "image": [32, 32]}},
        "student": {"audio": {"name": "resnet18", "weights": "random:1", "image": [32, 32]}},
    },
    "audio": {"front_end": "vggish", "n_fft": 512, "win_length": 400, "mels": 32},
    "store": {"clips_per_shard": 1},
    "decode": {"workers": 1},
    "batch_size": 1,
}
RECIPES: dict[str, dict[str, Any]] = {
    "extract": EXTRACT,
    "teacher": {"store": "features/teacher", "out": "runs/teacher", "epochs": 2},
    "student": {
        "store": "features/student",
        "out": "runs/student",
        "teacher": "runs/teacher",
        "teacher_store": "features/teacher",
        "epochs": 2,
    },
    "report": {
        "runs": ["runs/teacher", "runs/student"],
        "stores": ["features/teacher", "features/student"],
        "out": "report",
    },
}
COMMANDS = {
    "extract": "extract",
    "teacher": "train-teacher",
    "student": "distill",
    "report": "evaluate",
}


def write_chain(array: int = 3, **changes: Any) -> Path:
    """Write a chain and its recipes into the current folder; changes are of stages."""
    for name, tree in RECIPES.items():
        Path(f"{name}.yaml").write_text(yaml.safe_dump(tree))
    stages: dict[str, Any] = {
        name: {"command": command, "recipe": f"{name}.yaml", "resources": {"gpus": 0, "cpus": 1}}
        for name, command in COMMANDS.items()
    }
    stages["extract"]["array"] = array
    stages = {name: stage for name, stage in {**stages, **changes}.items() if stage}
    Path("chain.yaml").write_text(yaml.safe_dump({"name": "t", "stages": stages}, sort_keys=False))
    return Path("chain.yaml")


def extract_recipe() -> ExtractRecipe:
    return config.build(ExtractRecipe, EXTRACT, "test")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to be in, with a manifest."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips/m.csv").write_text("clip_id,video,start,stop,verb\na,a.mp4,0,1,x\n")
    return tmp_path


class FakeSlurm:
    """Programs that keep a queue in a file: one line per job, ``id|array|state|name``."""

    def __init__(self, folder: Path) -> None:
        self.queue, self.calls = folder / "queue", folder / "calls"
        self.queue.write_text("")
        self.calls.write_text("")
        for name, text in {
            "squeue": f'cat "{self.queue}"',
            "scancel": f'echo "scancel $*" >> "{self.calls}"',
            "sbatch": f"""
                echo "sbatch $*" >> "{self.calls}"
                name=$(sed -n 's/^#SBATCH --job-name=//p' "${{@: -1}}")
                id=$(( $(grep -c ^sbatch "{self.calls}") + 100 ))
                echo "$id|$id|PENDING|$name" >> "{self.queue}"
                echo "$id;cluster" """,
        }.items():
            (folder / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
            (folder / name).chmod(0o755)

    def jobs(self) -> list[str]:
        return self.calls.read_text().splitlines()


@pytest.fixture
def slurm(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    folder = tmp_path_factory.mktemp("bin")
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return FakeSlurm(folder)
