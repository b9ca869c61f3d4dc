"""Two processes under torchrun: the same clips, masks, order and (to rounding) the same model."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.tiny_store import write_store
from support.training import karmma, poison, results, says, student_recipe, teacher_recipe

from karmma_pipeline import config
from karmma_pipeline.train.recipe import TrainRecipe
from karmma_pipeline.train.stages import distill, train_teacher

UNEVEN = {"batch_size": 17, "accumulate": 2, "save_every_s": 0.0}
"""72 clips: 9 and 8 of each batch, then 4 clips that one rank passes in two parts."""


def run(recipe: TrainRecipe, command: str, path: Path, **more: Any) -> tuple[str, str]:
    config.save(recipe, path)
    process = karmma(command, str(path), ranks=2, **more)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    return out, err


def losses(folder: Path) -> np.ndarray:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return np.array([[row["train_loss"], row["val_loss"], row["val_action_top1"]] for row in rows])


def test_two_ranks_train_the_model_of_one(tmp_path: Path) -> None:
    store = write_store(tmp_path / "s")
    poison(store, "c001", "rgb")
    train_teacher(teacher_recipe(store, tmp_path / "teacher", epochs=1))
    recipes = {
        n: student_recipe(store, tmp_path / "teacher", tmp_path / n, epochs=2, **UNEVEN)
        for n in ("one", "two")
    }
    distill(recipes["one"])
    out, err = run(recipes["two"], "distill", tmp_path / "two.yaml")
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    one, two = says(tmp_path / "one", store), says(tmp_path / "two", store)
    torch.testing.assert_close(two, one, rtol=1e-3, atol=1e-3)
    assert out.count("best epoch") == 1
    assert err.count("epoch 1/2") == 1
    assert (tmp_path / "two/log.txt").read_text().count("c001: its rgb features") == 1


def test_ranks_stop_together_and_go_on_exactly_after_a_stop_and_a_killed_rank(
    tmp_path: Path,
) -> None:
    store = write_store(tmp_path / "s")
    recipes = {
        n: teacher_recipe(store, tmp_path / n, epochs=12, ema=0.9, **UNEVEN)
        for n in ("whole", "parts")
    }
    run(recipes["whole"], "train-teacher", tmp_path / "whole.yaml")
    config.save(recipes["parts"], tmp_path / "parts.yaml")
    for number in (signal.SIGTERM, signal.SIGKILL):
        process = karmma("train-teacher", str(tmp_path / "parts.yaml"), ranks=2)
        newest = wait_for_a_state(tmp_path / "parts", process)
        children = rank_ids(process.pid)
        assert len(children) == 2
        os.kill(children[1], number)  # one rank alone hears of it
        _, err = process.communicate(timeout=100)
        assert process.returncode != 0
        if number == signal.SIGTERM:
            assert "stopped by SIGTERM" in err
            assert "exitcode  : 75" in err or "exitcode: 75" in err
        assert newest >= 0
    run(recipes["parts"], "train-teacher", tmp_path / "parts.yaml")
    assert results(tmp_path / "parts") == results(tmp_path / "whole")


def wait_for_a_state(folder: Path, process: Any) -> int:
    before = {p.name for p in (folder / "state").glob("*.pt")}
    deadline = time.monotonic() + 100
    while process.poll() is None and time.monotonic() < deadline:
        new = {p.name for p in (folder / "state").glob("*.pt")} - before
        if new:
            return int(max(new).removesuffix(".pt"))
        time.sleep(0.01)
    raise AssertionError(process.communicate()[1])


def rank_ids(parent: int) -> list[int]:
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return sorted(
        int(c) for c in children if b"karmma_pipeline" in Path(f"/proc/{c}/cmdline").read_bytes()
    )
