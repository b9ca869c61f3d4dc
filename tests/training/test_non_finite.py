"""Tokens that are NaN or infinite are refused where they would do harm, with a remedy that works.

They cannot come from our own extraction: these stores are as other programs could write them.
"""

import re
from functools import partial
from pathlib import Path

import pytest
from click.testing import CliRunner
from support.forks import ended
from support.tiny_store import write_store
from support.training import (
    StopAt,
    fork_ranks,
    results,
    student_recipe,
    teacher_recipe,
)

from karmma_pipeline import config
from karmma_pipeline.cli import main
from karmma_pipeline.errors import (
    CheckpointError,
    ConfigError,
    KarmmaError,
    ManifestError,
    StoppedError,
    StoreError,
)
from karmma_pipeline.evaluation.evaluate import evaluate
from karmma_pipeline.evaluation.recipe import EvaluateRecipe
from karmma_pipeline.store import FeatureStore, finalize, repair, verify
from karmma_pipeline.store.spec import Dtype
from karmma_pipeline.training.recipe import TrainRecipe
from karmma_pipeline.training.stages import distill, train_teacher

NAN, INF = float("nan"), float("inf")
BAD = {("c001", "rgb"): NAN, ("c007", "audio"): INF, ("c008", "flow"): -INF}
IN_VAL = "c012"  # its verb is class 0, which NaN logits would choose
SENTENCE = r"tokens of these clips are NaN or infinite: .* one clip id per line\."


def sentence(error: BaseException) -> str:
    found = re.search(SENTENCE, str(error))
    assert found, error
    return found[0]


def evaluation(run: Path, store: Path, out: Path, **changes: object) -> EvaluateRecipe:
    tree = {"runs": [str(run)], "stores": [str(store)], "out": str(out), "costs": False}
    return config.build(EvaluateRecipe, {**tree, **changes}, "test")


@pytest.mark.parametrize("standardise", [True, False])
def test_clips_that_cannot_be_used_are_named_and_left_out_as_the_message_says(
    tmp_path: Path, standardise: bool
) -> None:
    store = write_store(tmp_path / "s", non_finite=BAD)
    changes = {"epochs": 1, "modality_dropout": 0.0, "standardise": standardise}
    with pytest.raises(StoreError) as caught:
        train_teacher(teacher_recipe(store, tmp_path / "r", batch_size=72, **changes))
    named = re.findall(r"(c\d+) \((\w+)\)", str(caught.value))
    assert named
    assert set(named) <= set(BAD)
    assert f"{store}: tokens of these clips are NaN or infinite" in str(caught.value)
    assert not (tmp_path / "r/best").exists()
    (tmp_path / "bad.txt").write_text("\n".join(clip for clip, _ in BAD) + "\n")
    report = train_teacher(
        teacher_recipe(store, tmp_path / "r2", exclude=str(tmp_path / "bad.txt"), **changes)
    )
    assert report.epochs == 1
    log = (tmp_path / "r2/log.txt").read_text()
    assert f"exclude: the clips listed in {tmp_path / 'bad.txt'} are not used" in log
    assert f"train: {72 - len(BAD)} clips" in log


def test_clips_that_cannot_be_used_are_found_by_verify_and_made_anew_after_its_repair(
    tmp_path: Path,
) -> None:
    store = write_store(tmp_path / "s", non_finite=BAD)
    said = CliRunner().invoke(main, ["store", "verify", str(store)])
    assert said.exit_code == 1
    for clip, modality in BAD:
        assert f"shard 0 {modality}: NaN or infinity in the tokens: {clip}\n" in said.output
    assert repair(store, verify(store))[0].startswith("shard 0")
    with pytest.raises(StoreError, match="shards missing"):
        finalize(store)
    # What extraction does then: the other shards stay, these clips get no such tokens.
    anew = write_store(tmp_path / "anew", absent=[*BAD])
    for path in anew.rglob("*"):
        there = store / path.relative_to(anew)
        if path.is_file() and path.name != "manifest.json" and not there.exists():
            there.parent.mkdir(parents=True, exist_ok=True)
            there.write_bytes(path.read_bytes())
    finalize(store)
    assert verify(store) == []
    for name, of in (("run_repaired", store), ("run_anew", anew)):
        train_teacher(teacher_recipe(of, tmp_path / name, epochs=1))
    assert results(tmp_path / "run_repaired")[2] == results(tmp_path / "run_anew")[2]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_verify_finds_infinity_in_every_type(tmp_path: Path, dtype: Dtype) -> None:
    assert verify(write_store(tmp_path / "whole", clips=32, dtype=dtype)) == []
    for number, value in enumerate((NAN, INF, -INF)):
        store = write_store(
            tmp_path / str(number), clips=32, dtype=dtype, non_finite={("c003", "flow"): value}
        )
        assert list(map(str, verify(store))) == [
            "shard 0 flow: NaN or infinity in the tokens: c003"
        ]


def test_validation_and_evaluation_refuse_the_same_clips_in_the_same_words(tmp_path: Path) -> None:
    clean = write_store(tmp_path / "clean")
    train_teacher(teacher_recipe(clean, tmp_path / "run", epochs=1))
    spoilt = write_store(tmp_path / "spoilt", non_finite={(IN_VAL, "rgb"): NAN})
    with pytest.raises(StoreError) as trained:
        train_teacher(teacher_recipe(spoilt, tmp_path / "r", epochs=1))
    with pytest.raises(StoreError) as evaluated:
        evaluate(evaluation(tmp_path / "run", spoilt, tmp_path / "report"))
    assert sentence(trained.value) == sentence(evaluated.value)
    assert f"{IN_VAL} (rgb)" in sentence(evaluated.value)
    assert not (tmp_path / "r/best").exists()
    assert not (tmp_path / "report/results.json").exists()
    (tmp_path / "bad.txt").write_text(f"{IN_VAL}\n")
    changes = {"exclude": str(tmp_path / "bad.txt")}
    recipe = evaluation(tmp_path / "run", spoilt, tmp_path / "report", **changes)
    data = evaluate(recipe).results.data
    assert data.clips == 23
    assert data.notes == (f"The clips listed in {tmp_path / 'bad.txt'} are excluded.",)


def test_validation_clips_without_a_label_are_looked_at_too(tmp_path: Path) -> None:
    without = {"val": ("verb", "noun")}
    bad = {(IN_VAL, "rgb"): NAN}
    store = write_store(tmp_path / "s", clips=48, unlabelled=without, non_finite=bad)
    with pytest.raises(StoreError, match=rf"{IN_VAL} \(rgb\)"):
        train_teacher(teacher_recipe(store, tmp_path / "r", epochs=1, select_by="epoch"))


def test_a_teacher_is_not_asked_about_clips_that_cannot_be_used(tmp_path: Path) -> None:
    store = write_store(tmp_path / "s")
    train_teacher(teacher_recipe(store, tmp_path / "teacher", epochs=1))
    spoilt = write_store(tmp_path / "spoilt", non_finite={("c001", "rgb"): INF})
    card = tmp_path / "teacher/best/model.json"
    mine, other = (FeatureStore.open(of).digest for of in (store, spoilt))
    card.write_text(card.read_text().replace(mine, other))
    recipe = student_recipe(spoilt, tmp_path / "teacher", tmp_path / "student", standardise=False)
    with pytest.raises(StoreError, match=rf"{spoilt}: tokens of these clips .* c001 \(rgb\)"):
        distill(recipe)


def test_ranks_refuse_together(tmp_path: Path) -> None:
    """Each rank has every second clip of a batch; the one without the bad clip must not wait."""
    for name, clip in (("train", "c001"), ("val", IN_VAL)):
        store = write_store(tmp_path / name, non_finite={(clip, "rgb"): NAN})
        changes = {"epochs": 1, "standardise": False, "modality_dropout": 0.0}
        recipe = teacher_recipe(store, tmp_path / f"r_{name}", **changes)
        log = tmp_path / f"log_{name}"
        children = fork_ranks(partial(train_teacher, recipe), log)
        assert [ended(child) for child in children] == [1, 1]
        for rank in range(2):
            assert f"{clip} (rgb)" in log.with_suffix(f".{rank}").read_text()


def test_a_list_of_excluded_clips_is_checked(tmp_path: Path) -> None:
    store, path = write_store(tmp_path / "s"), tmp_path / "bad.txt"
    recipe = teacher_recipe(store, tmp_path / "r", epochs=3, exclude=str(path))
    with pytest.raises(ConfigError, match=r"bad\.txt': cannot be read"):
        train_teacher(recipe)
    path.write_text("c001\n\n nosuch \n")
    with pytest.raises(ConfigError, match="has no clip 'nosuch'"):
        train_teacher(recipe)
    path.write_text("\n".join(f"c{i:03d}" for i in range(96)))
    with pytest.raises(ManifestError, match=r"excludes every clip of split='train'"):
        train_teacher(recipe)
    path.write_text("c001\n")
    with pytest.raises(StoppedError):
        train_teacher(recipe, stop=StopAt(5))
    path.write_text("c002\n")
    with pytest.raises(CheckpointError, match=r"started with exclude .*bad\.txt of digest"):
        train_teacher(recipe)


def test_a_run_of_a_version_that_took_bad_clips_as_absent_is_resumed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store, saved = write_store(tmp_path / "s"), tmp_path / "old/recipe.yaml"
    whole, old = (teacher_recipe(store, tmp_path / name, epochs=2) for name in ("whole", "old"))
    train_teacher(whole)
    with pytest.raises(StoppedError):
        train_teacher(old, stop=StopAt(5))
    text = saved.read_text()
    assert "exclude: null\n" in text
    saved.write_text(text.replace("exclude: null\n", "bad_clips: 8\n"))
    train_teacher(config.load(type(old), saved))
    assert results(tmp_path / "old") == results(tmp_path / "whole")
    advice = [r.getMessage() for r in caplog.records if "bad_clips" in r.getMessage()]
    assert advice == [f"{saved}: bad_clips: {TrainRecipe.OLD_KEYS['bad_clips']}"]


def test_a_loss_that_diverges_with_good_features_stops_and_names_the_clips(tmp_path: Path) -> None:
    store = write_store(tmp_path / "s")
    recipe = teacher_recipe(
        store, tmp_path / "r", optimiser={"lr": 1e30, "warmup": 0.0, "clip_norm": 1e30}
    )
    with pytest.raises(
        KarmmaError, match=r"although the features are finite; .* Clips: c\d+, c\d+"
    ):
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
