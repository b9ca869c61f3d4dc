"""What is checked before work, how the best epoch is chosen, and beginning with learned weights."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.tiny_store import write_store
from support.training import StopAt, results, student_recipe, teacher_recipe

from karmma_pipeline.config import resolve
from karmma_pipeline.errors import (
    CheckpointError,
    ConfigError,
    ManifestError,
    StoppedError,
)
from karmma_pipeline.models.device import pick_device
from karmma_pipeline.models.saved import begin_from, load_model, read_card
from karmma_pipeline.store import FeatureStore
from karmma_pipeline.training.progress import TrainingProgress
from karmma_pipeline.training.recipe import TeacherRecipe
from karmma_pipeline.training.stages import distill, train_teacher


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_training_without_any_label_is_refused_before_it_begins(tmp_path: Path) -> None:
    bare = write_store(tmp_path / "bare", heads={"verb": ("a", "b")})
    with pytest.raises(ManifestError, match="no clip of train_split='train' has a label"):
        train_teacher(teacher_recipe(bare, tmp_path / "r", epochs=1))
    assert not (tmp_path / "r").exists()


def test_clips_that_are_trained_on_and_choose_the_epoch_are_counted(
    store: Path, tmp_path: Path
) -> None:
    train_teacher(teacher_recipe(store, tmp_path / "r", epochs=1, val_split="train"))
    log = (tmp_path / "r/log.txt").read_text()
    assert "clips are also trained on; its accuracy" in log


@pytest.mark.parametrize(
    ("key", "value"),
    [("seed", 2**64), ("seed", -(2**63) - 1), ("store", ()), ("optimiser", {"betas": (0.9, 1)})],
)
def test_what_pytorch_cannot_take_is_refused_by_the_recipe(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"^recipe: {key}"):
        resolve(TeacherRecipe, {"store": "s", "out": "o", key: value}, {})


def test_a_device_that_computes_nothing_is_not_available() -> None:
    for name in ("meta", "gpu", "mps"):
        with pytest.raises(ConfigError, match=f"^device='{name}': not available here") as caught:
            pick_device(name)
        assert len(str(caught.value)) < 250


def test_a_metric_that_is_undefined_is_none_and_never_chooses(tmp_path: Path) -> None:
    half = write_store(tmp_path / "half", unlabelled={"val": ("noun",)})
    with pytest.raises(ManifestError, match=r"set select_by to one of verb_top1, loss, epoch\."):
        train_teacher(teacher_recipe(half, tmp_path / "r", epochs=2))
    train_teacher(teacher_recipe(half, tmp_path / "r", epochs=2, select_by="verb_top1"))
    for row in rows(tmp_path / "r"):
        assert row["val_action_top1"] is None
        assert row["val_noun_top1"] is None
        assert row["val_verb_top1"] > 0
        assert row["val_loss"] > 0
    bare = write_store(tmp_path / "bare", unlabelled={"val": ("verb", "noun")})
    with pytest.raises(ManifestError, match=r"one of epoch\."):
        train_teacher(teacher_recipe(bare, tmp_path / "b", epochs=2, select_by="loss"))
    done = train_teacher(teacher_recipe(bare, tmp_path / "b", epochs=2, select_by="epoch"))
    assert (done.best["epoch"], done.best["val_loss"]) == (2, None)
    assert "best epoch 2 of 2" in done.summary()
    with pytest.raises(ConfigError, match=r"'top1': must be one of noun_top1, verb_top1, action_"):
        train_teacher(teacher_recipe(half, tmp_path / "c", select_by="top1"))


def test_among_equal_epochs_the_one_of_lower_loss_is_best() -> None:
    progress = TrainingProgress()
    values = [(50.0, 3.0), (50.0, 2.0), (40.0, 1.0), (50.0, 2.0), (50.0, 2.5)]
    best = []
    for top1, loss in values:
        row = progress.close_epoch({"action_top1": top1, "loss": loss}, "action_top1")
        best.append(row["best_epoch"])
    assert best == [1, 2, 2, 2, 2]
    by_loss = TrainingProgress()
    for top1, loss in values:
        by_loss.close_epoch({"action_top1": top1, "loss": loss}, "loss")
    assert by_loss.best["epoch"] == 3


def test_epochs_that_an_older_program_closed_keep_its_choice() -> None:
    old = [{"epoch": n, "val_action_top1": 50.0, "val_loss": 3.0 - n} for n in (1, 2)]
    progress = TrainingProgress(2, history=old)
    assert progress.best["epoch"] == 1
    progress.close_epoch({"action_top1": 50.0, "loss": 9.0}, "action_top1")
    assert progress.best["epoch"] == 1


def test_classes_that_no_training_clip_has_are_named(tmp_path: Path) -> None:
    heads = {"verb": tuple("abcdefgh")}
    store = write_store(tmp_path / "s", heads=heads, label=3)
    train_teacher(teacher_recipe(store, tmp_path / "r", epochs=1))
    log = (tmp_path / "r/log.txt").read_text()
    said = "verb: 7 of 8 classes without a training clip (a, b, c, e, f, ...); 0 validation clips"
    assert said in log


def test_a_clip_with_nothing_to_see_counts_as_wrong(store: Path, tmp_path: Path) -> None:
    opened = FeatureStore.open(store)
    val = np.flatnonzero(opened.split == "val")
    lost = [opened.clip_ids[i].decode() for i in val[:6]]
    empty = [(clip, m) for clip in lost for m in opened.modalities]
    there = [m for m in empty if not (m[1] == "audio" and int(m[0][1:]) % 5 == 0)]
    poor = write_store(tmp_path / "poor", absent=there)
    changes: dict[str, Any] = {"epochs": 1, "exclude": str(tmp_path / "list")}
    (tmp_path / "list").write_text("\n".join(lost))
    train_teacher(teacher_recipe(poor, tmp_path / "without", **changes))
    train_teacher(teacher_recipe(poor, tmp_path / "with", epochs=1))
    without, beside = (rows(tmp_path / n)[0]["val_verb_top1"] for n in ("without", "with"))
    assert beside == pytest.approx(without * (len(val) - 6) / len(val))
    assert "6 without any modality" in (tmp_path / "with/log.txt").read_text()


def test_a_teacher_that_is_still_to_train_is_refused_unless_it_may_be(
    store: Path, tmp_path: Path
) -> None:
    with pytest.raises(StoppedError):
        train_teacher(teacher_recipe(store, tmp_path / "t", epochs=9), StopAt(16))
    student = student_recipe(store, tmp_path / "t", tmp_path / "s", epochs=1)
    with pytest.raises(
        CheckpointError, match=r"trained for \d of 9 epochs; finish its training, or set"
    ):
        distill(student)
    distill(student.model_copy(update={"allow_unfinished": True}))
    (tmp_path / "t/metrics.jsonl").unlink()  # as if only the model had been copied
    assert distill(student).already_done


def test_a_run_begins_with_the_weights_of_another_and_its_like_classes(
    store: Path, tmp_path: Path
) -> None:
    first = train_teacher(teacher_recipe(store, tmp_path / "first", epochs=4)).run
    more = {"epochs": 1, "init_from": str(first), "optimiser": {"lr": 1e-9}}
    longer = train_teacher(teacher_recipe(store, tmp_path / "longer", **more))
    assert longer.best["val_action_top1"] == pytest.approx(
        rows(first)[-1]["val_action_top1"], abs=5
    )
    assert "newly initialised weights: none" in (tmp_path / "longer/log.txt").read_text()
    heads = {"verb": ("v3", "new", "v0"), "place": ("here", "there")}
    other = write_store(tmp_path / "other", heads=heads, label=0)
    train_teacher(teacher_recipe(other, tmp_path / "other_run", **more))
    log = (tmp_path / "other_run/log.txt").read_text()
    assert "newly initialised weights: place: 2 of 2 classes, verb: 1 of 3 classes" in log
    model, _ = load_model(tmp_path / "other_run/last")
    taught, card = load_model(first / "best")
    assert list(card.heads) == ["noun", "verb"]
    for row, its in ((2, 3 + 3), (4, 3 + 0)):  # behind two places, and behind three nouns
        mine, theirs = (m.get_parameter("classify.weight") for m in (model, taught))
        torch.testing.assert_close(mine[row], theirs[its], atol=1e-6, rtol=0)


def test_features_of_another_network_and_another_size_begin_anew(
    store: Path, tmp_path: Path
) -> None:
    train_teacher(teacher_recipe(store, tmp_path / "r", epochs=1))
    card = read_card(tmp_path / "r/best")
    changed = card.model_copy(
        update={"provenance": {**card.provenance, "rgb": {"backbone": "another"}}}
    )
    torch.manual_seed(5)
    model = changed.build()
    fresh = {k: v.clone() for k, v in model.state_dict().items()}
    assert begin_from(model, changed, tmp_path / "r/best") == ["rgb"]
    learned, _ = load_model(tmp_path / "r/best")
    for name, tensor in model.state_dict().items():
        source = fresh if ".rgb" in name or name.endswith("_rgb") else learned.state_dict()
        assert torch.equal(tensor, source[name]), name
    size = card.size.model_copy(update={"dim": 32})
    wider = card.model_copy(update={"size": size})
    with pytest.raises(CheckpointError, match=r"size\.dim is 16 in this model, but 32 in the"):
        begin_from(wider.build(), wider, tmp_path / "r/best")


def test_a_run_that_goes_on_does_not_need_what_it_began_from(store: Path, tmp_path: Path) -> None:
    train_teacher(teacher_recipe(store, tmp_path / "first", epochs=1))
    recipes = [
        teacher_recipe(store, tmp_path / name, epochs=2, init_from=str(tmp_path / "first"))
        for name in ("whole", "r")
    ]
    train_teacher(recipes[0])
    with pytest.raises(StoppedError):
        train_teacher(recipes[1], StopAt(4))
    (tmp_path / "first").rename(tmp_path / "gone")
    train_teacher(recipes[1])
    assert results(tmp_path / "r") == results(tmp_path / "whole")


def test_the_metrics_say_what_the_loss_is_made_of(store: Path, tmp_path: Path) -> None:
    train_teacher(teacher_recipe(store, tmp_path / "t", epochs=1))
    recipe = student_recipe(store, tmp_path / "t", tmp_path / "s", epochs=2, alpha=0.25)
    distill(recipe)
    for row in rows(tmp_path / "s"):
        parts = 0.25 * row["train_kl"] + 0.75 * row["train_cross_entropy"]
        assert row["train_loss"] == pytest.approx(parts, rel=1e-5)
        assert row["train_gradient_norm"] > 0
        assert {"val_verb_top1", "val_noun_top1", "clips_per_s", "waiting_for_data"} <= row.keys()
    warm, last = (row["lr"] for row in rows(tmp_path / "s"))
    assert 0 < last < warm < recipe.optimiser.lr
