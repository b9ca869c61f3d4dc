"""Training states and models on disk: damaged, foreign or hostile ones."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_store import write_store
from support.training import StopAt, results, student_recipe, teacher_recipe

from karmma_pipeline import config
from karmma_pipeline.errors import CheckpointError, ConfigError, StoppedError
from karmma_pipeline.models.saved import load_model
from karmma_pipeline.training.recipe import TeacherRecipe
from karmma_pipeline.training.stages import distill, train_teacher
from karmma_pipeline.training.state import load_state, save_state, write_checksummed


class Evil:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (os.system, (f"touch {self.path}",))


def states(run: Path) -> list[Path]:
    return sorted((run / "state").glob("*.pt"))


def halt(recipe: TeacherRecipe, looks: int = 15) -> None:
    with pytest.raises(StoppedError):
        train_teacher(recipe, stop=StopAt(looks))


def test_the_newest_state_that_verifies_is_used(tmp_path: Path) -> None:
    store = write_store(tmp_path / "s")
    for name in ("whole", "hurt"):
        train_teacher(teacher_recipe(store, tmp_path / name, epochs=3))
    newest = states(tmp_path / "hurt")[-1]
    newest.write_bytes(newest.read_bytes()[:-7])
    assert not train_teacher(teacher_recipe(store, tmp_path / "hurt", epochs=3)).already_done
    assert results(tmp_path / "hurt") == results(tmp_path / "whole")
    assert f"{newest}: the file is damaged" in (tmp_path / "hurt/log.txt").read_text()


def test_if_no_state_verifies_nothing_is_trained_over(tmp_path: Path) -> None:
    store = write_store(tmp_path / "s")
    recipe = teacher_recipe(store, tmp_path / "r", epochs=3)
    train_teacher(recipe)
    before = results(tmp_path / "r")
    for state in states(tmp_path / "r"):
        state.write_bytes(b"x" * 100)
    with pytest.raises(CheckpointError, match=r"no usable training state: .* or remove "):
        train_teacher(recipe)
    assert results(tmp_path / "r") == before


def test_a_hostile_state_runs_nothing_whatever_the_environment_says(tmp_path: Path) -> None:
    proof = tmp_path / "proof"
    evil = pickle.dumps({"version": 1, "model": Evil(proof)})
    save_state(tmp_path / "state", 1, {"a": torch.zeros(2)})
    torch.save({"version": 1, "model": Evil(proof)}, tmp_path / "zipped")
    for number, data in enumerate((evil, (tmp_path / "zipped").read_bytes()), 2):
        write_checksummed(tmp_path / f"state/{number:09d}.pt", data)
    code = (
        "import sys, pathlib; from karmma_pipeline.training.state import load_state\n"
        "state, faults = load_state(pathlib.Path(sys.argv[1]))\n"
        "assert sorted(state) == ['a', 'version'], state\n"
        "assert len(faults) == 2 and all('not a training state' in f for f in faults)\n"
    )
    subprocess.run(
        [sys.executable, "-W", "error", "-c", code, str(tmp_path / "state")],
        check=True,
        env={**os.environ, "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"},
    )
    assert not proof.exists()
    for path in sorted((tmp_path / "state").iterdir())[:1]:
        path.unlink()
    with pytest.raises(CheckpointError, match="no usable training state"):
        load_state(tmp_path / "state")


def test_a_hostile_model_runs_nothing_and_is_refused(tmp_path: Path) -> None:
    store = write_store(tmp_path / "s")
    train_teacher(teacher_recipe(store, tmp_path / "r", epochs=1))
    folder, proof = tmp_path / "r/best", tmp_path / "proof"
    evil = pickle.dumps(Evil(proof))
    (folder / "model.safetensors").write_bytes(evil)
    with pytest.raises(CheckpointError, match="damaged or belong to another model"):
        load_model(folder)
    import hashlib

    card = json.loads((folder / "model.json").read_text())
    card["weights_sha256"] = hashlib.sha256(evil).hexdigest()
    (folder / "model.json").write_text(json.dumps(card))
    with pytest.raises(CheckpointError, match="is not a safetensors file"):
        load_model(folder)
    assert not proof.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modalities": {"../../etc": [2, 8]}}, "use letters, digits"),
        ({"modalities": {"rgb": [10**9, 10**9]}}, "does not match"),
        ({"size": {"layers": 10**9}}, "less than or equal to 1000"),
    ],
)
def test_a_card_with_foreign_paths_or_absurd_sizes_is_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    store = write_store(tmp_path / "s", clips=32)
    train_teacher(teacher_recipe(store, tmp_path / "r", epochs=1))
    path = tmp_path / "r/best/model.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path / "r/best")


def test_a_recipe_with_python_tags_runs_nothing(tmp_path: Path) -> None:
    proof = tmp_path / "proof"
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"store: !!python/object/apply:os.system ['touch {proof}']\nout: x\n")
    with pytest.raises(ConfigError, match="not valid YAML"):
        config.load(TeacherRecipe, recipe)
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text(recipe.read_text())
    with pytest.raises(ConfigError, match="not valid YAML"):
        train_teacher(teacher_recipe(tmp_path, run))
    assert not proof.exists()


def test_another_store_at_the_same_path_is_noticed(tmp_path: Path) -> None:
    store = write_store(tmp_path / "s")
    recipe = teacher_recipe(store, tmp_path / "r", epochs=4)
    halt(recipe)
    store.rename(tmp_path / "old")
    write_store(store, seed=1)
    with pytest.raises(CheckpointError, match=rf"clips of this run have changed in {store}"):
        train_teacher(recipe)
    store.rename(tmp_path / "new")
    (tmp_path / "old").rename(store)
    train_teacher(recipe)
    (store.rename(tmp_path / "old"), (tmp_path / "new").rename(store))
    with pytest.raises(CheckpointError, match="Restore the old store"):  # finished, all the same
        train_teacher(recipe)


def test_another_teacher_at_the_same_path_is_noticed(tmp_path: Path) -> None:
    store = write_store(tmp_path / "s")
    for seed in (0, 1):
        train_teacher(teacher_recipe(store, tmp_path / f"t{seed}", epochs=1, seed=seed))
    (tmp_path / "t0").rename(tmp_path / "teacher")
    recipe = student_recipe(store, tmp_path / "teacher", tmp_path / "r", epochs=4)
    with pytest.raises(StoppedError, match=r"state before validation is saved"):
        distill(recipe, stop=StopAt(22))
    (tmp_path / "teacher").rename(tmp_path / "t0")
    (tmp_path / "t1").rename(tmp_path / "teacher")
    with pytest.raises(CheckpointError, match=r"started with teacher of .* now .*teacher of"):
        distill(recipe)


def test_a_finished_run_needs_neither_store_nor_teacher(tmp_path: Path) -> None:
    store = write_store(tmp_path / "s")
    train_teacher(teacher_recipe(store, tmp_path / "teacher", epochs=1))
    recipe = student_recipe(store, tmp_path / "teacher", tmp_path / "r", epochs=1)
    done = distill(recipe)
    (tmp_path / "teacher").rename(tmp_path / "gone")
    store.rename(tmp_path / "gone too")
    again = distill(recipe)
    assert again.already_done
    assert again.best == done.best
    assert "(already done)" in again.summary()
