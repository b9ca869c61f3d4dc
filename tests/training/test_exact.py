"""Stopped anywhere, run in parts, averaged: the weights come out the same.

What SIGKILL and broken disks do to a run is in test_faults.py.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.tiny_store import write_store
from support.training import (
    SIZE,
    StopAt,
    results,
    says,
    stopped_and_resumed,
    student_recipe,
    teacher_recipe,
)

from karmma_pipeline.errors import StoppedError
from karmma_pipeline.training.stages import distill, train_teacher

ALL = {"size": {**SIZE, "dropout": 0.2}, "accumulate": 3, "ema": 0.9, "class_balance": 0.5}


def weights(run: Path, which: str = "last") -> dict[str, torch.Tensor]:
    return load_file(run / which / "model.safetensors")


@pytest.mark.parametrize("changes", [{"size": {**SIZE, "dropout": 0.2}}, ALL], ids=["plain", "all"])
def test_stopped_in_the_middle_of_epochs_it_goes_on_exactly(
    store: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    whole, parts = (
        teacher_recipe(store, tmp_path / n, epochs=4, **changes) for n in ("whole", "parts")
    )
    train_teacher(whole)
    stopped_and_resumed(train_teacher, parts, (5, 1, 13), "is saved; run the same command again")
    assert results(tmp_path / "whole") == results(tmp_path / "parts")


def test_a_stopped_student_goes_on_exactly(store: Path, tmp_path: Path) -> None:
    train_teacher(teacher_recipe(store, tmp_path / "teacher", epochs=2))
    more = {"temperature": 2.0, "position_std": 0.5, "kl_clips": "better", **ALL}
    whole, parts = (
        student_recipe(store, tmp_path / "teacher", tmp_path / n, epochs=3, **more)
        for n in ("whole", "parts")
    )
    distill(whole)
    stopped_and_resumed(distill, parts, (6, 8), "run the same command again")
    assert results(tmp_path / "whole") == results(tmp_path / "parts")


@pytest.mark.parametrize("absent", ["learned", "drop"])
def test_a_batch_in_parts_moves_the_weights_as_the_whole(
    store: Path, tmp_path: Path, absent: str
) -> None:
    """Parts of 5, 5, 5 and 1 clips, with masks and missing modalities that differ."""
    size = {**SIZE, "absent": absent}
    for name, accumulate in (("whole", 1), ("parts", 4)):
        recipe = teacher_recipe(store, tmp_path / name, epochs=2, accumulate=accumulate, size=size)
        train_teacher(recipe)
    whole, parts = says(tmp_path / "whole", store), says(tmp_path / "parts", store)
    torch.testing.assert_close(parts, whole, rtol=1e-3, atol=1e-3)


def test_a_stop_while_an_epoch_is_validated_is_heard_and_the_validation_done_again(
    tmp_path: Path,
) -> None:
    store = write_store(tmp_path / "s")
    whole, parts = (teacher_recipe(store, tmp_path / n, epochs=2) for n in ("whole", "parts"))
    train_teacher(whole)
    with pytest.raises(StoppedError, match="the state before validation is saved"):
        train_teacher(parts, StopAt(8))  # at the start, 5 steps, the first batch of validation
    assert not (tmp_path / "parts/best").exists()
    train_teacher(parts)
    assert results(tmp_path / "parts") == results(tmp_path / "whole")


def test_the_average_is_what_its_formula_says_and_is_what_is_saved(
    store: Path, tmp_path: Path
) -> None:
    from karmma_pipeline.training import loop

    seen: list[torch.Tensor] = []
    original = loop.Trainer._step

    def record(self: loop.Trainer, *arguments: Any) -> float:
        value = original(self, *arguments)
        seen.append(self.model.get_parameter("cls").detach().clone())
        return value

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Trainer, "_step", record)
        train_teacher(teacher_recipe(store, tmp_path / "r", epochs=2, ema=0.7))
    average = seen[0]
    for n, value in enumerate(seen[1:], 1):
        decay = min(0.7, (1 + n) / (10 + n))
        average = decay * average + (1 - decay) * value
    torch.testing.assert_close(weights(tmp_path / "r")["cls"], average)
    assert not torch.equal(weights(tmp_path / "r")["cls"], seen[-1])


def test_without_progress_training_ends_early(store: Path, tmp_path: Path) -> None:
    recipe = teacher_recipe(store, tmp_path / "r", epochs=40, patience=2, optimiser={"lr": 1e-12})
    report = train_teacher(recipe)
    assert report.early
    assert report.epochs == report.best["epoch"] + 2 == 3
    assert "stopped early" in report.summary()
    assert train_teacher(recipe).already_done


def test_states_are_saved_between_the_ends_of_epochs(store: Path, tmp_path: Path) -> None:
    recipe = teacher_recipe(store, tmp_path / "r", epochs=1, save_every_s=0.0)
    train_teacher(recipe)
    steps = sorted(int(p.stem) for p in (tmp_path / "r/state").glob("*.pt"))
    assert steps == [4, 5]  # five steps; the last state is that of the closed epoch
