"""Runs whose store has changed meanwhile: they go on with their own clips, or name those."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from support.tiny_store import write_store
from support.training import StopAt, results, teacher_recipe

from karmma_pipeline.errors import CheckpointError, StoppedError
from karmma_pipeline.store import FeatureStore
from karmma_pipeline.store.source import PartOfStore
from karmma_pipeline.training.stages import train_teacher


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return write_store(tmp_path / "s", clips=64)


def halt(store: Path, run: Path) -> None:
    with pytest.raises(StoppedError):
        train_teacher(teacher_recipe(store, run, epochs=3), StopAt(8))


def test_a_run_goes_on_with_its_clips_after_their_list_has_grown(
    store: Path, tmp_path: Path
) -> None:
    recipe = teacher_recipe(store, tmp_path / "run", epochs=3)
    whole = train_teacher(teacher_recipe(store, tmp_path / "whole", epochs=3)).run
    halt(store, tmp_path / "run")
    shutil.rmtree(store)
    write_store(store, clips=96)  # of the same seed: the first clips are the same
    train_teacher(recipe)
    assert results(tmp_path / "run") == results(whole)
    assert train_teacher(recipe).already_done
    other = train_teacher(teacher_recipe(store, tmp_path / "other", epochs=3)).run
    assert results(other) != results(whole)


def test_a_run_whose_clips_are_others_now_names_them_and_a_way_on_that_works(
    store: Path, tmp_path: Path
) -> None:
    halt(store, tmp_path / "run")
    shutil.rmtree(store)
    write_store(store, clips=64, absent=[("c005", "rgb"), ("c017", "flow")])
    with pytest.raises(
        CheckpointError,
        match=r"2 of the 64 clips .* have changed .*: c005, c017; .*init_from=",
    ):
        train_teacher(teacher_recipe(store, tmp_path / "run", epochs=3))
    changes = {"epochs": 1, "init_from": str(tmp_path / "run")}
    assert train_teacher(teacher_recipe(store, tmp_path / "new", **changes)).epochs == 1


def test_a_part_of_a_store_is_read_as_a_store_with_its_own_classes(store: Path) -> None:
    whole = FeatureStore.open(store)
    clips = np.array([40, 3, 8])
    heads = {"verb": ("v3", "v0"), "noun": whole.heads["noun"]}
    part = PartOfStore(whole, clips, heads, "x")
    assert part.labels["verb"].tolist() == [1, 0, 1]  # of classes 0, 3 and 0
    assert part.clip_digests.tolist() == whole.clip_digests[clips].tolist()
    wanted = whole.gather("rgb", torch.tensor([8, -1, 40]))
    assert torch.equal(part.gather("rgb", torch.tensor([2, -1, 0])), wanted)
