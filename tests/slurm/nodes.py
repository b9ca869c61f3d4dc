"""One training over two nodes of the real Slurm: warned, a rank killed, against one process."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

EPOCHS = 150
TOLERANCE = 0.02
"""How far the loss of two ranks may lie from that of one, relative: sums are in another order."""


def is_built() -> bool:
    """Tell whether this version trains with several ranks."""
    return importlib.util.find_spec("karmma_pipeline.train.ranks") is not None


def recipe(training: dict[str, Any], out: str) -> dict[str, Any]:
    return {**training, "store": "features/teacher", "out": out, "epochs": EPOCHS}


def chain(resources: dict[str, Any]) -> dict[str, Any]:
    stage = {"command": "train-teacher", "resources": resources}
    return {
        "name": "nodes",
        "folder": "jobs_nodes",
        "stages": {
            "one": {**stage, "recipe": "recipes/one.yaml"},
            "two": {**stage, "recipe": "recipes/two.yaml", "nodes": 2},
        },
    }


def disturb(
    job_id: str, wait_for: Callable[..., Any], shell: Callable[..., str], run: Path
) -> dict[str, str]:
    """Kill a rank, later warn the job; return what Slurm says of it in the end."""
    wait_for("both ranks", lambda: len(ranks(job_id)) == 2)
    wait_for("a first epoch of two ranks", lambda: epochs(run) > 0)
    ranks(job_id)[-1].kill()
    wait_for("both ranks again", lambda: len(ranks(job_id)) == 2)
    before = epochs(run)
    wait_for("another epoch", lambda: epochs(run) > before)
    shell("scancel", "--signal=USR1", job_id)
    wait_for("the job saved and waiting again", lambda: facts(shell, job_id)["Restarts"] != "0")
    return facts(shell, job_id)


def ranks(job_id: str) -> list[psutil.Process]:
    """Return the processes that train: those that torchrun gave a rank."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        try:
            environment = process.environ()
        except psutil.Error:
            continue
        words = process.info["cmdline"] or []
        mine = environment.get("SLURM_JOB_ID") == job_id and "RANK" in environment
        if mine and words[1:3] == ["-m", "karmma_pipeline.cli"]:
            found.append(process)
    return sorted(found, key=lambda process: process.environ()["RANK"])


def facts(shell: Callable[..., str], job_id: str) -> dict[str, str]:
    words = shell("scontrol", "show", "job", job_id).split()
    return dict(word.split("=", 1) for word in words if "=" in word)


def epochs(run: Path) -> int:
    return len(losses(run))


def losses(run: Path) -> list[float]:
    metrics = run / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.is_file() else []
    return [json.loads(line)["train_loss"] for line in lines if line.endswith("}")]


def difference(one: Path, two: Path) -> float:
    """Return the largest relative difference of an epoch's loss."""
    pairs = list(zip(losses(one), losses(two), strict=True))
    return max(abs(a - b) / max(a, 1e-3) for a, b in pairs)
