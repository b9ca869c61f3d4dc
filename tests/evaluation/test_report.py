"""Evaluation of small trained models, and the report made from it."""

import json
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file
from support.any_store import IDS, fill_store
from support.evaluation import BACKBONE, EVIL, make_recipe, save_run
from support.leftovers import leave
from support.tiny_store import write_store

from karmma_pipeline.errors import ConfigError, ManifestError, StoppedError, StoreError
from karmma_pipeline.evaluation import results as schema
from karmma_pipeline.evaluation.evaluate import evaluate
from karmma_pipeline.evaluation.report import figures
from karmma_pipeline.evaluation.report.page import write_report
from karmma_pipeline.evaluation.results import Results, SubsetScores
from karmma_pipeline.jobs import StopFlag
from karmma_pipeline.models.saved import load_model
from karmma_pipeline.store import FeatureStore, open_joined


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("evaluate")
    store = write_store(root / "store", clips=60)
    for seed, name in enumerate(("Plain", EVIL)):
        save_run(root / f"run{seed}", store, name=name, seed=seed)
    return root


@pytest.fixture(scope="module")
def found(place: Path) -> Results:
    return evaluate(make_recipe(place)).results


def test_a_subset_is_what_the_model_says_without_the_other_modalities(
    place: Path, found: Results
) -> None:
    store = FeatureStore.open(place / "store")
    model, _ = load_model(place / "run0/best")
    tokens = {m: store.gather(m, torch.arange(60)) for m in store.modalities}
    mask = torch.from_numpy(store.present) & torch.tensor([True, False, True])
    with torch.inference_mode():
        out = {h: v.numpy() for h, v in model(tokens, mask).items()}
    right = np.ones(60, bool)
    for head, scores in out.items():
        right &= scores.argmax(axis=1) == store.labels[head]
    score = found.runs[0].subset(("rgb", "audio"), "all").scores["action_top1"]
    assert (score.correct, score.n) == (right.sum(), 60)
    path = place / "report/logits/0_Plain.safetensors"
    with safe_open(path, "numpy") as file:
        (about,) = file.metadata().values()  # of several the order, and the bytes, would vary
    assert json.loads(about)["subsets"][2] == ["rgb", "audio"]
    logits = load_file(path)
    np.testing.assert_allclose(logits["logits.verb"][2], out["verb"], atol=1e-5)


def test_clips_that_lack_a_modality_are_counted_and_can_be_left_out(found: Results) -> None:
    run = found.runs[0]
    assert run.subset(("audio",), "all").without == 12  # every fifth of 60
    complete = run.subset(("audio",), "complete")
    assert (complete.clips, complete.without) == (48, 0)
    assert found.data.reasons["audio"] == {"no_stream": 12}
    assert found.data.complete == 48


def value_of(subset: SubsetScores) -> float:
    value = subset.scores["action_top1"].value
    assert value is not None
    return value


def test_the_expected_drop_curve_joins_the_subsets_and_the_sampled_one(found: Results) -> None:
    run = found.runs[0]
    curve = run.curve("action", "complete")
    assert curve is not None
    whole = value_of(run.subset(("rgb", "flow", "audio"), "complete"))
    assert curve.points[0].expected == pytest.approx(whole)
    singles = [value_of(run.subset((m,), "complete")) for m in found.modalities]
    pairs = [
        value_of(run.subset(s, "complete"))
        for s in (("rgb", "flow"), ("rgb", "audio"), ("flow", "audio"))
    ]
    p = 0.5
    chance_single = (1 - p) * p**2 + p**3 / 3
    by_hand = (1 - p) ** 3 * whole + (1 - p) ** 2 * p * sum(pairs) + chance_single * sum(singles)
    assert curve.points[5].expected == pytest.approx(by_hand)
    for point in curve.points:
        assert point.sampled is not None
        assert abs(point.sampled.mean - point.expected) < 4


SENSORS = {f"s{i}": (1, 3) for i in range(8)}


@pytest.mark.slow
def test_of_many_modalities_some_subsets_and_drawn_masks_are_evaluated(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ids = [f"c{i:02d}" for i in range(60)]
    absent = [(f"c{i:02d}", f"s{j}") for i in range(20) for j in range(i % 9)]  # some have nothing
    store = fill_store(tmp_path / "store", ids, SENSORS, absent=absent)
    run = save_run(tmp_path / "run", store, name="Many")
    names = {"runs": [str(run)], "names": {}, "draws": 30, "drop_rates": [0.0, 0.3, 0.6, 0.9]}
    with caplog.at_level("INFO"):
        found = evaluate(make_recipe(tmp_path, **names)).results
    assert "47 passes for each of 60 clips, 17 subsets and 30 sampled masks" in caplog.text
    assert [len(s) for s in found.subsets] == [8] + [7] * 8 + [1] * 8
    for rate, exact in exact_curve(run, store, [0.0, 0.3, 0.6, 0.9]).items():
        curve = found.runs[0].curve("verb", "all")
        assert curve is not None
        point = curve.at(rate)
        assert point is not None
        assert point.sampled is not None
        assert point.sampled.low <= point.expected <= point.sampled.high
        assert point.low <= point.sampled.low <= point.sampled.high <= point.high
        assert abs(point.expected - exact) <= point.sampled.high - point.sampled.low + 1e-9
        assert point.sampled.high - point.sampled.low < 8
    page = (tmp_path / "report/index.html").read_text()
    assert "estimates of the expected values" in page
    assert "all but s3" in page
    assert load_file(tmp_path / "report/logits/0_Many.safetensors")["drawn"].shape == (30, 60, 8)
    short = evaluate(
        make_recipe(tmp_path, **{**names, "draws": 0}, out=str(tmp_path / "r"))
    ).results
    assert short.runs[0].drop == ()


def exact_curve(run: Path, root: Path, rates: list[float]) -> dict[float, float]:
    """The mean over all 2^M masks of every clip, counted out."""
    store = FeatureStore.open(root)
    model, _ = load_model(run / "best")
    tokens = {m: store.gather(m, torch.arange(len(store))) for m in store.modalities}
    total = dict.fromkeys(rates, 0.0)
    truth = torch.from_numpy(np.asarray(store.labels["verb"], np.int64))
    for bits in product((False, True), repeat=len(store.modalities)):
        mask = torch.from_numpy(store.present & np.array(bits))
        with torch.inference_mode():
            right = (model(tokens, mask)["verb"].argmax(dim=1) == truth).numpy()
        for clip, pattern in enumerate(store.present.tolist()):
            within = all(p or not b for b, p in zip(bits, pattern, strict=True))
            if any(bits) and within and right[clip]:
                kept, count = sum(bits), sum(pattern)
                for rate in rates:
                    restored = rate**count / count if kept == 1 else 0.0
                    total[rate] += (1 - rate) ** kept * rate ** (count - kept) + restored
    return {rate: 100 * value / len(store) for rate, value in total.items()}


def test_a_model_that_is_always_right_has_100_percent_of_drawn_masks_too(tmp_path: Path) -> None:
    store = fill_store(tmp_path / "store", IDS, SENSORS, absent=[], classes=("only",))
    run = save_run(tmp_path / "run", store, name="Right")
    found = evaluate(make_recipe(tmp_path, runs=[str(run)], names={}, draws=5)).results
    curve = found.runs[0].curve("verb", "all")
    assert curve is not None
    assert {(p.low, p.expected, p.high) for p in curve.points} == {(100.0, 100.0, 100.0)}


def test_equal_models_make_equal_bytes(place: Path, found: Results, tmp_path: Path) -> None:
    left = leave(tmp_path / "index.html")
    write_report(tmp_path, found)
    assert not left.exists()
    for path in sorted(tmp_path.rglob("*.*")):
        assert path.read_bytes() == (place / "report" / path.relative_to(tmp_path)).read_bytes()
    assert schema.read(tmp_path / "results.json") == found


def test_names_cannot_become_code_and_random_weights_are_called_random(
    place: Path, found: Results
) -> None:
    page = (place / "report/index.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "backbones are not pretrained" in page
    assert "V: rgb, F: flow, A: audio. All" in page  # the letters of its tables
    assert found.weights == ("random:3",)
    drawn = (place / "report/figures/subsets.svg").read_text()
    assert "NOT PRETRAINED" in drawn  # matplotlib says in a comment what it draws as outlines
    assert "<script" not in drawn
    row = (place / "report/tables/subsets.md").read_text().splitlines()[-1]
    assert "\\|" in row


def test_a_run_takes_the_store_it_was_trained_on(place: Path, tmp_path: Path) -> None:
    other = write_store(tmp_path / "other", clips=60, width=4)
    recipe = make_recipe(place, stores=[str(other), str(place / "store")], out=str(tmp_path / "r"))
    assert (
        evaluate(recipe).results.runs[0].store_digest == FeatureStore.open(place / "store").digest
    )
    with pytest.raises(StoreError, match="was trained on different features"):
        evaluate(make_recipe(place, stores=[str(other)], out=str(tmp_path / "r")))


RGB, AUDIO = {"rgb": (4, 6)}, {"audio": (2, 5)}


def test_a_run_on_several_stores_finds_them_whatever_their_order(tmp_path: Path) -> None:
    rgb = fill_store(tmp_path / "rgb", IDS, RGB)
    audio = fill_store(tmp_path / "audio", IDS[::-1], AUDIO)
    both = fill_store(tmp_path / "both", IDS)
    runs = [
        save_run(tmp_path / "joined", audio, rgb, name="joined"),
        save_run(tmp_path / "plain", both, name="plain"),
    ]
    found = evaluate(make_recipe(tmp_path, runs=runs, stores=[both, rgb, audio])).results
    assert found.data.present == {"rgb": 12, "audio": 11}
    assert found.runs[0].store_digest == open_joined([audio, rgb], "join").digest
    with pytest.raises(StoreError, match="the stores that it was trained on"):
        evaluate(make_recipe(tmp_path, runs=runs[:1], stores=[both, rgb]))


def test_other_clips_of_the_same_features_may_be_several_stores(tmp_path: Path) -> None:
    made: dict[str, Any] = {"provenance": BACKBONE}
    shapes = (RGB | AUDIO).items()
    parts = [fill_store(tmp_path / m, modalities={m: s}, **made) for m, s in shapes]
    run = save_run(tmp_path / "run", *parts, name="joined")
    more = [f"d{i:02d}" for i in range(7)]
    test = [fill_store(tmp_path / f"{m}_", more, {m: s}, **made) for m, s in shapes]
    found = evaluate(make_recipe(tmp_path, runs=[run], stores=test)).results
    assert (found.data.clips, found.data.complete) == (7, 7)


def test_runs_that_list_their_clips_in_another_order_are_compared_clip_by_clip(
    tmp_path: Path,
) -> None:
    plain = fill_store(tmp_path / "plain", IDS)
    turned = fill_store(tmp_path / "turned", IDS[::-1])
    runs = [save_run(tmp_path / s.name, s, name=s.name, kind="teacher") for s in (plain, turned)]
    evaluate(make_recipe(tmp_path, runs=runs, stores=[plain, turned], names={}))
    one, other = (
        load_file(tmp_path / f"report/logits/{n}.safetensors") for n in ("0_plain", "1_turned")
    )
    for name, of in one.items():
        np.testing.assert_allclose(of, other[name], atol=1e-5, err_msg=name)


def test_runs_on_other_clips_are_not_put_into_one_report(place: Path, tmp_path: Path) -> None:
    other = write_store(tmp_path / "other", clips=40)
    save_run(tmp_path / "run", other, name="Other")
    recipe = make_recipe(
        place,
        runs=[str(place / "run0"), str(tmp_path / "run")],
        stores=[str(place / "store"), str(other)],
        out=str(tmp_path / "r"),
    )
    with pytest.raises(ConfigError, match="differ in clips"):
        evaluate(recipe)


class StopsAt(StopFlag):
    """Has been told to stop at the n-th time that anybody looks."""

    def __init__(self, looks: int) -> None:
        super().__init__()
        self.looks = looks

    def check(self, saved: str) -> None:
        self.looks -= 1
        if self.looks == 0:
            self.request()
        super().check(saved)


@pytest.mark.parametrize("looks", [5, 17, 40])  # of the first run: passes of a batch, then tables
def test_an_evaluation_ends_between_two_passes(place: Path, tmp_path: Path, looks: int) -> None:
    stop = StopsAt(looks)
    with pytest.raises(StoppedError, match="no results of this evaluation were saved"):
        evaluate(make_recipe(place, runs=[str(place / "run0")], out=str(tmp_path / "r")), stop)
    assert not (tmp_path / "r").exists()
    assert stop.looks == 0


def test_an_unknown_split_names_the_known_ones(place: Path) -> None:
    with pytest.raises(ManifestError, match="its splits: train, val"):
        evaluate(make_recipe(place, split="test"))


def test_groups_have_their_own_scores_and_a_tail_action_has_any_tail_class(
    place: Path, tmp_path: Path
) -> None:
    (tmp_path / "unseen.csv").write_text("participant_id\nP1\n")
    (tmp_path / "verbs.csv").write_text("verb\n0\n")
    (tmp_path / "nouns.csv").write_text("noun\nn2\n")
    groups = {
        "unseen": str(tmp_path / "unseen.csv"),
        "tail": {"verb": str(tmp_path / "verbs.csv"), "noun": str(tmp_path / "nouns.csv")},
    }
    found = evaluate(make_recipe(place, groups=groups, out=str(tmp_path / "r"))).results
    store = FeatureStore.open(place / "store")
    scores = found.runs[0].subset(("rgb",), "all").scores
    verb, noun = (np.asarray(store.labels[h]) for h in ("verb", "noun"))
    assert scores["unseen_verb"].n == (store.group == "P1").sum()
    assert scores["tail_verb"].n == (verb == 0).sum()
    assert scores["tail_action"].n == ((verb == 0) | (noun == 2)).sum()


def test_groups_that_extraction_left_beside_the_store_are_used(tmp_path: Path) -> None:
    store = write_store(tmp_path / "features/store", clips=24)
    save_run(tmp_path / "run", store, name="Plain")
    sidecar = tmp_path / "features/groups.json"
    sidecar.write_text(json.dumps({"unseen": ["P1"], "tail": {"noun": [2]}}))
    recipe = make_recipe(
        tmp_path, runs=[str(tmp_path / "run")], stores=[str(store)], out=str(tmp_path / "r")
    )
    scores = evaluate(recipe).results.runs[0].subset(("rgb",), "all").scores
    opened = FeatureStore.open(store)
    assert scores["unseen_noun"].n == (opened.group == "P1").sum()
    assert scores["tail_noun"].n == (np.asarray(opened.labels["noun"]) == 2).sum()
    assert "tail_verb" not in scores
    sidecar.write_text('{"unseen": 3}')
    with pytest.raises(ManifestError, match=r"groups\.json: cannot be read"):
        evaluate(recipe)


def test_results_of_another_version_are_refused(place: Path, tmp_path: Path) -> None:
    tree = json.loads((place / "report/results.json").read_text())
    tree["version"] = 99
    (tmp_path / "results.json").write_text(json.dumps(tree))
    with pytest.raises(ValueError, match="not readable as results of this version"):
        schema.read(tmp_path / "results.json")


def test_long_names_of_subsets_have_room_beside_their_bars(tmp_path: Path) -> None:
    sensors = {"accelerometer": (1, 2), "gyroscope": (1, 2), "skeleton": (1, 2)}
    store = fill_store(tmp_path / "store", modalities=sensors, absent=())
    save_run(tmp_path / "run0", store, name="Student", provenance={})
    recipe = make_recipe(tmp_path, runs=[str(tmp_path / "run0")], costs=False, draws=0)
    figure = figures.subset_bars(evaluate(recipe).results)
    figure.canvas.draw()
    boxes = [text.get_window_extent() for text in figure.axes[0].get_yticklabels()]
    assert len(boxes) == 7
    assert all(above.y0 > below.y1 for above, below in pairwise(boxes))
