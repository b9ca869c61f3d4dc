"""What a run is: digests of what it learns from, and the settings that change numbers."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.tiny_store import write_store
from support.training import StopAt, results, student_recipe, teacher_recipe

from karmma_pipeline import config
from karmma_pipeline.errors import (
    CheckpointError,
    ConfigError,
    KarmmaError,
    ManifestError,
    StoppedError,
    StoreError,
)
from karmma_pipeline.runs import RunFolder
from karmma_pipeline.training.recipe import TeacherRecipe
from karmma_pipeline.training.stages import distill, train_teacher


@pytest.fixture(scope="module")
def teacher(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "teacher"
    train_teacher(teacher_recipe(store, run, epochs=2))
    return run


def halt(recipe: TeacherRecipe, looks: int = 6) -> None:
    with pytest.raises(StoppedError):
        train_teacher(recipe, StopAt(looks))


def test_a_run_goes_on_under_other_paths_names_and_settings_that_change_no_number(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "none.txt").write_text("c000\n")
    kept: dict[str, Any] = {"epochs": 3, "exclude": str(tmp_path / "none.txt")}
    whole = train_teacher(teacher_recipe(store, tmp_path / "whole", **kept)).run
    halt(teacher_recipe(store, tmp_path / "run", **kept))
    shutil.copytree(store, tmp_path / "elsewhere/store")
    (tmp_path / "run").rename(tmp_path / "elsewhere/run")
    (tmp_path / "none.txt").rename(tmp_path / "elsewhere/list")
    monkeypatch.chdir(tmp_path / "elsewhere")
    free = {"name": "Schüler δ", "save_every_s": 0.0, "device": "cpu", "exclude": "list"}
    moved = teacher_recipe(Path("store"), Path("run"), **(kept | free))
    train_teacher(moved)
    assert results(Path("run")) == results(whole)
    assert train_teacher(moved).already_done


def test_a_moved_teacher_and_its_moved_store_are_known_again(
    store: Path, teacher: Path, tmp_path: Path
) -> None:
    with pytest.raises(StoppedError):
        distill(student_recipe(store, teacher, tmp_path / "s", epochs=3), StopAt(8))
    shutil.copytree(teacher, tmp_path / "t")
    shutil.copytree(store, tmp_path / "there")
    moved = student_recipe(tmp_path / "there", tmp_path / "t", tmp_path / "s", epochs=3)
    done = distill(moved)
    distill(student_recipe(store, teacher, tmp_path / "whole", epochs=3))
    assert results(done.run) == results(tmp_path / "whole")
    train_teacher(teacher_recipe(store, tmp_path / "t2", epochs=1, seed=7))
    other = student_recipe(store, tmp_path / "t2", tmp_path / "s", epochs=3)
    with pytest.raises(CheckpointError, match="started with teacher of"):  # finished, all the same
        distill(other)


def test_what_changes_numbers_is_refused_and_named(store: Path, tmp_path: Path) -> None:
    recipe = teacher_recipe(store, tmp_path / "r", epochs=3)
    halt(recipe)
    for change in ({"epochs": 4}, {"seed": 1}, {"precision": "bfloat16"}):
        with pytest.raises(ConfigError, match=f"different recipe \\({next(iter(change))} was"):
            train_teacher(teacher_recipe(store, tmp_path / "r", **({"epochs": 3} | change)))
    (tmp_path / "list").write_text("c001\n")
    fewer = teacher_recipe(store, tmp_path / "r", epochs=3, exclude=str(tmp_path / "list"))
    with pytest.raises(CheckpointError, match=r"started with exclude not set, but now uses .*list"):
        train_teacher(fewer)


def test_a_precision_left_open_is_settled_when_a_run_begins(store: Path, tmp_path: Path) -> None:
    train_teacher(teacher_recipe(store, tmp_path / "cpu", epochs=1))
    assert yaml.safe_load((tmp_path / "cpu/recipe.yaml").read_text())["precision"] == "float32"
    halt(teacher_recipe(store, tmp_path / "r", epochs=2, precision="bfloat16"))
    train_teacher(teacher_recipe(store, tmp_path / "r", epochs=2, precision="auto"))
    train_teacher(teacher_recipe(store, tmp_path / "w", epochs=2, precision="bfloat16"))
    assert results(tmp_path / "r") == results(tmp_path / "w")


def test_a_failed_start_leaves_nothing_and_the_corrected_one_begins(
    store: Path, tmp_path: Path
) -> None:
    out = tmp_path / "runs/new"
    wrong: list[tuple[type[KarmmaError], dict[str, Any]]] = [
        (StoreError, {"store": str(tmp_path / "nowhere")}),
        (ManifestError, {"val_split": "vall"}),
        (ConfigError, {"exclude": "nowhere.txt"}),
        (ConfigError, {"select_by": "verb"}),
        (CheckpointError, {"init_from": str(tmp_path / "nobody")}),
    ]
    for error, changes in wrong:
        with pytest.raises(error):
            train_teacher(teacher_recipe(store, out, **changes))
        assert not out.parent.exists(), changes
    with pytest.raises(CheckpointError):
        distill(student_recipe(store, tmp_path / "nobody", out, epochs=1))
    assert not out.parent.exists()
    bad = write_store(tmp_path / "bad", non_finite={("c001", "rgb"): float("nan")})
    with pytest.raises(StoreError, match="NaN"):
        train_teacher(teacher_recipe(bad, out, epochs=1))
    wild = {"lr": 1e30, "warmup": 0.0}
    with pytest.raises(KarmmaError, match=r"epoch 1, .* Lower optimiser\.lr"):
        train_teacher(teacher_recipe(store, out, optimiser=wild))
    train_teacher(teacher_recipe(store, out, epochs=1))  # the folder holds nothing that was learned
    assert yaml.safe_load((out / "recipe.yaml").read_text())["optimiser"]["lr"] < 1
    with pytest.raises(StoreError, match=r"is inside the feature store"):
        train_teacher(teacher_recipe(store, store / "run"))


def test_a_start_that_an_older_program_let_fail_is_taken_over(store: Path, tmp_path: Path) -> None:
    for name in ("environment.json", "log.txt"):
        (tmp_path / "r").mkdir(exist_ok=True)
        (tmp_path / "r" / name).write_text("{}\n")
    config.save(
        teacher_recipe(tmp_path / "nowhere", tmp_path / "r", seed=5), tmp_path / "r/recipe.yaml"
    )
    train_teacher(teacher_recipe(store, tmp_path / "r", epochs=1))
    assert yaml.safe_load((tmp_path / "r/recipe.yaml").read_text())["seed"] == 0


def test_the_folder_of_another_command_is_never_taken_over(store: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("manifest: a.csv\nout: features\n")
    (tmp_path / "teacher").mkdir()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match="contains other files, such as teacher"):
        train_teacher(teacher_recipe(store, tmp_path, epochs=1))
    assert sorted(tmp_path.rglob("*")) == before


def test_a_recipe_that_an_older_program_saved_goes_on_without_the_keys_that_it_lacks(
    store: Path, tmp_path: Path
) -> None:
    recipe = teacher_recipe(store, tmp_path / "r", epochs=3)
    halt(recipe)
    path = tmp_path / "r/recipe.yaml"
    tree = yaml.safe_load(path.read_text())
    for key in ("version", "select_by", "init_from"):
        del tree[key]
    path.write_text(yaml.safe_dump(tree | {"precision": "auto"}))
    train_teacher(recipe)
    train_teacher(teacher_recipe(store, tmp_path / "w", epochs=3))
    assert results(tmp_path / "r") == results(tmp_path / "w")


def test_a_finished_run_without_its_states_is_done_and_a_half_one_is_not_trained_over(
    store: Path, tmp_path: Path
) -> None:
    recipe = teacher_recipe(store, tmp_path / "r", epochs=2)
    done = train_teacher(recipe)
    before = results(tmp_path / "r")
    shutil.rmtree(tmp_path / "r/state")
    again = train_teacher(recipe)
    assert (again.already_done, again.best) == (True, done.best)
    weights = tmp_path / "r/best/model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-4])
    with pytest.raises(CheckpointError, match=r"damaged .* copy the folder again, or train in"):
        train_teacher(recipe)
    weights.write_bytes(whole)
    metrics = tmp_path / "r/metrics.jsonl"
    metrics.write_text(metrics.read_text().splitlines(keepends=True)[0])
    with pytest.raises(
        CheckpointError, match=r"states .* are missing after epoch 1 of 2.*init_from"
    ):
        train_teacher(recipe)
    assert results(tmp_path / "r")[:2] == before[:2]


def test_killed_before_the_first_epoch_was_saved_it_begins_where_it_was(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = iter(range(9))  # the first one empties the metrics, before any step

    def killed_second(*_: object) -> None:
        if next(calls) == 1:
            raise KeyboardInterrupt

    recipe = teacher_recipe(store, tmp_path / "r", epochs=2)
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "write_metrics", killed_second)
        with pytest.raises(KeyboardInterrupt):
            train_teacher(recipe)
    assert (tmp_path / "r/last").is_dir()
    train_teacher(recipe)
    train_teacher(teacher_recipe(store, tmp_path / "w", epochs=2))
    assert results(tmp_path / "r") == results(tmp_path / "w")


def test_what_it_ran_on_is_noted_beside_what_came_out(store: Path, tmp_path: Path) -> None:
    train_teacher(teacher_recipe(store, tmp_path / "r", epochs=1))
    row = json.loads((tmp_path / "r/metrics.jsonl").read_text())
    assert (row["device"], row["ranks"]) == ("cpu", 1)
    assert row["threads"] >= 1
    assert row["clips_per_s"] > 0
    assert f"1 x cpu, float32, {row['threads']} threads" in (tmp_path / "r/log.txt").read_text()


def test_another_process_that_took_the_folder_over_ends_a_training(
    store: Path, tmp_path: Path
) -> None:
    class Suspended(StopAt):
        @property
        def requested(self) -> bool:
            (tmp_path / "r/.lock").write_text("node7 12 - 0 boot 99")
            return False

    with pytest.raises(KarmmaError, match="process 12 on node7 took over this folder"):
        train_teacher(teacher_recipe(store, tmp_path / "r", save_every_s=0.0), Suspended(1))
