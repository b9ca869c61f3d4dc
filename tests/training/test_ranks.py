"""Two processes under torchrun: the same clips, masks, order and (to rounding) the same model."""

import json
import os
import signal
import sys
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from support.forks import ended
from support.patience import PATIENCE_S
from support.tiny_store import write_store
from support.training import (
    SignalAt,
    fork_ranks,
    karmma,
    results,
    says,
    student_recipe,
    teacher_recipe,
)

from karmma_pipeline import config
from karmma_pipeline.errors import ConfigError, KarmmaError
from karmma_pipeline.jobs import StopFlag
from karmma_pipeline.training import ranks
from karmma_pipeline.training.ranks import Ranks
from karmma_pipeline.training.stages import distill, train_teacher

UNEVEN = {"batch_size": 17, "accumulate": 2, "save_every_s": 0.0}
"""72 clips: 9 and 8 of each batch, then 4 clips that one rank passes in two parts."""


NAME_THREADS = """
import atexit, os, pathlib, sys
def tell():
    if "RANK" in os.environ:
        names = [p.read_text().strip() for p in pathlib.Path("/proc/self/task").glob("*/comm")]
        print("threads at the end:", names, file=sys.stderr)
atexit.register(tell)
"""


def losses(folder: Path) -> np.ndarray:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return np.array([[row["train_loss"], row["val_loss"], row["val_action_top1"]] for row in rows])


@pytest.mark.slow
def test_two_ranks_train_the_model_of_one(tmp_path: Path) -> None:
    store = write_store(tmp_path / "s")
    train_teacher(teacher_recipe(store, tmp_path / "teacher", epochs=1))
    recipes = {
        n: student_recipe(store, tmp_path / "teacher", tmp_path / n, epochs=2, **UNEVEN)
        for n in ("one", "two")
    }
    distill(recipes["one"])
    config.save(recipes["two"], tmp_path / "two.yaml")
    (tmp_path / "sitecustomize.py").write_text(NAME_THREADS)
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    process = karmma("distill", str(tmp_path / "two.yaml"), ranks=2, PYTHONPATH=path)
    out, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, err
    assert err.count("threads at the end: ['python") == 2
    assert "gloo" not in err  # what outlives its group may abort while the interpreter ends
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    one, two = says(tmp_path / "one", store), says(tmp_path / "two", store)
    torch.testing.assert_close(two, one, rtol=1e-3, atol=1e-3)
    assert out.count("best epoch") == 1
    assert err.count("epoch 1/2") == 1


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (
            {"WORLD_SIZE": "2"},
            r"WORLD_SIZE=2 without RANK and MASTER_ADDR and MASTER_PORT.*torchrun",
        ),
        ({"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "n"}, "without MASTER_PORT"),
        (
            {"SLURM_STEP_NUM_TASKS": "3", "SLURM_PROCID": "1"},
            "SLURM_STEP_NUM_TASKS=3 without WORLD",
        ),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK=2: must be less than WORLD_SIZE=2"),
    ],
)
def test_processes_that_were_not_started_by_torchrun_are_told_so(
    environment: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        Ranks.from_environment()


def test_a_rank_that_waits_in_vain_says_for_whom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks, "_MEETING", timedelta(milliseconds=300))
    here = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, value in here.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(KarmmaError, match=r"2 ranks could not connect to .*unset RANK"):  # noqa: SIM117
        with ranks.joined(torch.device("cpu")):
            raise AssertionError("alone")


@pytest.mark.slow
def test_ranks_stop_together_and_go_on_exactly_after_a_stop_and_a_killed_rank(
    tmp_path: Path,
) -> None:
    store = write_store(tmp_path / "s")
    whole, parts = (
        teacher_recipe(store, tmp_path / n, epochs=8, ema=0.9, **UNEVEN) for n in ("whole", "parts")
    )
    children = fork_ranks(lambda stop: train_teacher(whole, stop), tmp_path / "log")
    assert [ended(child) for child in children] == [0, 0]
    for number, codes in ((signal.SIGUSR1, [75, 75]), (signal.SIGKILL, [1, -signal.SIGKILL])):

        def hurt(stop: StopFlag, number: int = number) -> None:
            one_alone = os.environ["RANK"] == "1"
            train_teacher(parts, SignalAt(stop, 7, number) if one_alone else stop)

        children = fork_ranks(hurt, tmp_path / "log")
        assert [ended(child) for child in children] == codes
        assert list(tmp_path.glob("parts/state/*.pt"))
    assert "another rank exited" in (tmp_path / "log.0").read_text()
    children = fork_ranks(lambda stop: train_teacher(parts, stop), tmp_path / "log")
    assert [ended(child) for child in children] == [0, 0]
    assert results(tmp_path / "parts") == results(tmp_path / "whole")
