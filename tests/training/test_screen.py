"""Features that are NaN or infinite: one bad clip costs one modality of one clip, no more."""

from pathlib import Path

import pytest
from support.tiny_store import write_store
from support.training import StopAt, poison, student_recipe, teacher_recipe

from karmma_pipeline.errors import KarmmaError, StoppedError
from karmma_pipeline.store import FeatureStore
from karmma_pipeline.training.stages import distill, train_teacher

BAD = [("c001", "rgb"), ("c006", "audio"), ("c009", "flow")]
IN_VAL = next(i for i in range(96) if i % 4 == 3 - i // 4 % 4)


def weights(run: Path) -> bytes:
    return (run / "last/model.safetensors").read_bytes()


def test_bad_features_count_exactly_as_if_the_store_had_called_them_absent(tmp_path: Path) -> None:
    bad = [*BAD, (f"c{IN_VAL:03d}", "rgb")]
    spoilt = write_store(tmp_path / "spoilt")
    for number, (clip, modality) in enumerate(bad):
        value = float("nan") if number % 2 else float("inf")
        poison(spoilt, clip, modality, value)
    absent = write_store(tmp_path / "absent", absent=bad)
    for store, run in ((spoilt, "spoilt"), (absent, "absent")):
        train_teacher(teacher_recipe(store, tmp_path / f"run_{run}", epochs=3))
    assert weights(tmp_path / "run_spoilt") == weights(tmp_path / "run_absent")
    metrics = [(tmp_path / f"run_{r}/metrics.jsonl").read_text() for r in ("spoilt", "absent")]
    assert metrics[0] == metrics[1]
    log = (tmp_path / "run_spoilt/log.txt").read_text()
    for clip, modality in bad:
        assert f"{clip}: its {modality} features are NaN or infinite; taken as absent" in log
    assert log.count("taken as absent") == len(bad)


def test_more_bad_clips_than_allowed_stop_the_run_and_are_named(tmp_path: Path) -> None:
    store = write_store(tmp_path / "s")
    for clip, modality in BAD:
        poison(store, clip, modality)
    recipe = teacher_recipe(store, tmp_path / "r", bad_clips=2, modality_dropout=0.0)
    with pytest.raises(KarmmaError, match=r"3 clips have features .* c001, c006, c009; extract"):
        train_teacher(recipe)


def test_a_stopped_run_remembers_what_was_bad(tmp_path: Path) -> None:
    store = write_store(tmp_path / "s")
    poison(store, "c001", "rgb")
    whole, parts = (teacher_recipe(store, tmp_path / n, epochs=3) for n in ("whole", "parts"))
    train_teacher(whole)
    with pytest.raises(StoppedError):
        train_teacher(parts, stop=StopAt(12))
    train_teacher(parts)
    assert weights(tmp_path / "whole") == weights(tmp_path / "parts")
    assert (tmp_path / "parts/log.txt").read_text().count("taken as absent") == 1


def test_a_teacher_says_nothing_of_features_that_are_bad(tmp_path: Path) -> None:
    store = write_store(tmp_path / "s")
    train_teacher(teacher_recipe(store, tmp_path / "teacher", epochs=2))
    poison(store, "c001", "rgb")
    poison(store, "c001", "flow")
    report = distill(student_recipe(store, tmp_path / "teacher", tmp_path / "student", epochs=2))
    assert report.best["val_loss"] > 0


def test_a_loss_that_diverges_with_good_features_stops_and_names_the_clips(tmp_path: Path) -> None:
    store = write_store(tmp_path / "s")
    recipe = teacher_recipe(
        store, tmp_path / "r", optimiser={"lr": 1e30, "warmup": 0.0, "clip_norm": 1e30}
    )
    with pytest.raises(KarmmaError, match=r"with finite features; .* The clips were c\d+, c\d+"):
        train_teacher(recipe)
    assert not (tmp_path / "r/best").exists()


def test_why_modalities_are_absent_stands_in_the_log(tmp_path: Path) -> None:
    store = write_store(tmp_path / "s", absent=[("c001", "rgb")])
    train_teacher(teacher_recipe(store, tmp_path / "r", epochs=1))
    opened = FeatureStore.open(store)
    train = opened.split == "train"
    without_audio = int((~opened.present[train, 2]).sum())
    log = (tmp_path / "r/log.txt").read_text()
    assert (
        f"train: {train.sum()} clips; rgb {train.sum() - 1} (absent: bad_value 1); "
        f"flow {train.sum()}; audio {train.sum() - without_audio} "
        f"(absent: no_stream {without_audio})"
    ) in log
    assert "val: 24 clips" in log
