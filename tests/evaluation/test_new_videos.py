"""Models on clips that they were not trained on, and the edges of small data."""

import csv
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file
from support.any_store import fill_store
from support.evaluation import BACKBONE, make_recipe, save_run
from support.forks import ended
from support.lanes import slow_unless
from support.training import fork

from karmma_pipeline.cli import main
from karmma_pipeline.errors import ConfigError, KarmmaError, StoreError
from karmma_pipeline.evaluation import results as schema
from karmma_pipeline.evaluation.evaluate import EvaluateReport, evaluate
from karmma_pipeline.evaluation.predict import predict
from karmma_pipeline.evaluation.score import score
from karmma_pipeline.metrics import wilson_interval

pytestmark = pytest.mark.usefixtures("one_kind_of_figures")

BOTH = {"rgb": (4, 6), "audio": (2, 5)}
NEW = tuple(f"d{i:02d}" for i in range(8))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of two modalities and the classes open and shut."""
    root = tmp_path_factory.mktemp("taught")
    store = fill_store(root / "store", provenance=BACKBONE)
    return save_run(root / "run", store, name="Taught")


def videos(root: Path, **changes: Any) -> Path:
    return fill_store(root, NEW, **({"provenance": BACKBONE} | changes))


def ask(run: Path, store: Path, **changes: Any) -> EvaluateReport:
    recipe = make_recipe(
        store.parent, runs=[run], stores=[store], out=str(store.parent / "report"), **changes
    )
    return evaluate(recipe)


def table(report: EvaluateReport) -> list[dict[str, str]]:
    (path,) = (report.folder / "predictions").iterdir()
    return list(csv.DictReader(path.read_text().splitlines()))


def test_clips_without_labels_get_predictions_and_no_accuracy(run: Path, tmp_path: Path) -> None:
    bare = ask(run, videos(tmp_path / "store", labelled=()))
    scores = bare.results.runs[0].subsets[0].scores["verb_top1"]
    assert (scores.n, scores.value, scores.low) == (0, None, None)
    assert bare.results.data.constant == {"verb": None}
    assert "No clip of this split has a label" in bare.summary()
    assert {row["verb"] for row in table(bare)} <= {"open", "shut"}
    assert {row["verb_label"] for row in table(bare)} == {""}
    assert "Drop curve" not in (bare.folder / "index.html").read_text()
    assert schema.read(bare.folder / "results.json") == bare.results


@pytest.mark.parametrize("name", ["back\\slash", "no\xa0break", "[glob]*?", "Schüler δ"])
def test_a_run_folder_may_have_any_name(run: Path, tmp_path: Path, name: str) -> None:
    odd = shutil.copytree(run, tmp_path / name)
    asked = ["evaluate", str(odd), "--store", str(videos(tmp_path / "store"))]
    options = ["--out", str(tmp_path / "report"), "--set", "split=", "--set", "classes=false"]
    result = CliRunner().invoke(main, [*asked, *options])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "report/index.html").is_file()


def test_clips_that_are_partly_labelled_are_counted_as_far_as_they_are(
    run: Path, tmp_path: Path
) -> None:
    some = ask(run, videos(tmp_path / "store", labelled=NEW[:3]))
    assert some.results.runs[0].subsets[0].scores["verb_top1"].n == 3
    assert "5 clips without a known verb: not counted." in some.summary()


@pytest.mark.parametrize(
    ("classes", "known"),
    [
        (("shut",), {"shut": 8}),
        (("shut", "open"), {"shut": 4, "open": 4}),
        (("wipe", "open", "shut", "bin"), {"open": 2, "shut": 2}),
        (("wipe",), {}),
    ],
)
def test_classes_meet_by_name(
    run: Path, tmp_path: Path, classes: Sequence[str], known: Mapping[str, int]
) -> None:
    report = ask(run, videos(tmp_path / "store", classes=classes))
    wanted = [classes[i % len(classes)] for i in range(8)]
    labels = [row["verb_label"] for row in table(report)]
    assert labels == [name if name in ("open", "shut") else "" for name in wanted]
    counts = report.results.data.class_clips["verb"]
    assert {name: n for name, n in zip(("open", "shut"), counts, strict=True) if n} == known
    strange = sorted({*classes} - {"open", "shut"})
    if strange:
        assert f"that the model was not trained on ({', '.join(strange)})" in report.summary()


def test_other_heads_are_no_labels_of_this_model(run: Path, tmp_path: Path) -> None:
    report = ask(run, videos(tmp_path / "store", head="gesture"))
    assert report.results.runs[0].subsets[0].scores["verb_top1"].n == 0


def test_a_modality_that_the_store_lacks_is_absent(run: Path, tmp_path: Path) -> None:
    whole = ask(run, videos(tmp_path / "whole/store", absent=[(c, "audio") for c in NEW]))
    mute = ask(run, videos(tmp_path / "mute/store", modalities={"rgb": BOTH["rgb"]}))
    one, other = (
        load_file(next((r.folder / "logits").iterdir()))["logits.verb"] for r in (whole, mute)
    )
    np.testing.assert_allclose(one, other, atol=1e-6)
    assert mute.results.data.reasons["audio"] == {"not_in_dataset": 8}
    assert mute.results.modalities == ("rgb", "audio")


def test_a_modality_that_the_model_lacks_is_left_out(run: Path, tmp_path: Path) -> None:
    more = {**BOTH, "gaze": (3, 2)}
    report = ask(run, videos(tmp_path / "store", modalities=more))
    assert report.results.modalities == ("rgb", "audio")


def test_other_features_are_refused_and_what_is_other_is_named(run: Path, tmp_path: Path) -> None:
    other = videos(tmp_path / "a", provenance={"backbone": "y", "weights": "random:3"})
    with pytest.raises(
        StoreError, match=r"different features \(.*rgb\.backbone is 'y' in the store"
    ):
        ask(run, other)
    wide = videos(tmp_path / "b", modalities={"rgb": (4, 7)})
    with pytest.raises(
        StoreError, match=r"rgb: token shape \(4, 7\) in the store and \(4, 6\) in the model"
    ):
        ask(run, wide)
    gaze = videos(tmp_path / "c", modalities={"gaze": (3, 2)})
    with pytest.raises(StoreError, match="has none of rgb, audio"):
        ask(run, gaze)
    assert not (tmp_path / "report").exists()


def test_another_version_of_a_library_and_another_place_of_weights_are_the_same_features(
    tmp_path: Path,
) -> None:
    made = {**BACKBONE, "weights": "/a/w.pt", "weights_sha256": "ab", "decoder": "PyAV 17"}
    store = fill_store(tmp_path / "old/store", provenance=made)
    run = save_run(tmp_path / "run", store, name="Taught", provenance=made)
    later = {**made, "weights": "/b/w.pt", "decoder": "PyAV 18"}
    report = ask(run, videos(tmp_path / "new/store", provenance=later))
    sentence = (
        "rgb.decoder is 'PyAV 18' in the store and 'PyAV 17' in the model; results may differ in "
        "the last bits."
    )
    assert sentence in report.summary()
    assert not any("weights" in note for note in report.results.data.notes)
    other = videos(tmp_path / "other/store", provenance={**later, "weights_sha256": "cd"})
    with pytest.raises(StoreError, match=r"weights_sha256 is 'cd' in the store and 'ab'"):
        ask(run, other)


def test_a_clip_with_nothing_to_see_gets_no_class_and_counts_as_wrong(
    run: Path, tmp_path: Path
) -> None:
    blind = [(NEW[2], m) for m in BOTH]
    report = ask(run, videos(tmp_path / "store", absent=blind))
    rows = {row["clip_id"]: row for row in table(report)}
    assert rows[NEW[2]]["seen"] == rows[NEW[2]]["verb"] == "no modality"
    assert rows[NEW[3]]["seen"] == "rgb+audio"
    right = sum(row["verb"] == row["verb_label"] for row in rows.values())
    top1 = report.results.runs[0].subsets[0].scores["verb_top1"]
    assert (top1.correct, top1.n) == (right, 8)
    assert "1 clip without any modality: counted as wrong." in report.summary()


@pytest.mark.parametrize("classes", [("open",), ("open", "shut")])
@pytest.mark.parametrize("clips", slow_unless({1, 4}, [1, 2, 4, 7]))
def test_the_smallest_data_have_a_report(
    tmp_path: Path, clips: int, classes: Sequence[str]
) -> None:
    ids = NEW[:clips]
    store = fill_store(tmp_path / "store", ids, classes=classes, provenance=BACKBONE)
    report = ask(save_run(tmp_path / "run", store, name="Small"), store)
    assert (report.folder / "figures/subsets.svg").is_file()


def test_intervals_hold_their_share_at_every_count() -> None:
    for n in range(1, 400):
        for right in {0, 1, n // 2, n - 1, n}:
            found = score(np.arange(n) < right)
            assert found.low is not None
            assert found.value is not None
            assert found.high is not None
            assert 0 <= found.low <= found.value <= found.high <= 100
    low, high = wilson_interval(0, 10)
    assert (low, round(high, 4)) == (0.0, 0.2775)  # R: binom.confint(0, 10, methods = "wilson")
    assert not math.isnan(low)


def test_a_folder_of_anything_else_is_never_written_into(run: Path, tmp_path: Path) -> None:
    store = videos(tmp_path / "store")
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    recipe = make_recipe(tmp_path, runs=[run], stores=[store], out=str(run))
    with pytest.raises(ConfigError, match="contains other files, such as best, but no report"):
        evaluate(recipe)
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before
    report = ask(run, store)
    (report.folder / "thesis.tex").write_text("mine")
    with pytest.raises(ConfigError, match=r"thesis\.tex"):
        ask(run, store)


def test_of_two_evaluations_into_one_folder_the_second_is_refused(
    run: Path, tmp_path: Path
) -> None:
    store = videos(tmp_path / "store")

    def meanwhile(*arguments: Any) -> Any:
        child = fork(lambda stop: ask(run, store), tmp_path / "log")
        assert ended(child) == 1
        said = (tmp_path / "log").read_text()
        assert "is writing a report to this folder; choose another" in said
        assert not (tmp_path / "report/results.json").exists()
        return predict(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("karmma_pipeline.evaluation.evaluate.predict", meanwhile)
        assert ask(run, store).folder.is_dir()
    assert not list((tmp_path / "report").glob(".*"))


def test_a_failed_evaluation_leaves_nothing(run: Path, tmp_path: Path) -> None:
    store = videos(tmp_path / "store")
    for changes in ({"split": "vall"}, {"exclude": "nowhere.txt"}, {"checkpoint": "x/y"}):
        with pytest.raises(KarmmaError):
            ask(run if "split" in changes else run.parent, store, **changes)
        assert not (tmp_path / "report").exists(), changes


def test_the_folder_of_a_model_is_as_good_as_its_runs(run: Path, tmp_path: Path) -> None:
    report = ask(run / "best", videos(tmp_path / "store"))
    assert report.results.runs[0].name == "Taught"
