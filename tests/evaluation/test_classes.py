"""What a report says besides accuracy: classes, calibration, probes, tables for papers."""

import csv
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from sklearn.linear_model import RidgeClassifier
from support.evaluation import EVIL, make_recipe, save_run
from support.tiny_store import write_store

from karmma_pipeline.evaluation import probe
from karmma_pipeline.evaluation.evaluate import EvaluateReport, evaluate
from karmma_pipeline.evaluation.report import tables
from karmma_pipeline.metrics import softmax
from karmma_pipeline.store import FeatureStore


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> EvaluateReport:
    root = tmp_path_factory.mktemp("classes")
    store = write_store(root / "store", clips=60)
    runs = []
    for name, seeds in ((EVIL, (0, 1)), ("plain", (0, 1))):
        for seed in seeds:
            training = {"seed": seed, "train_split": "train", "val_split": "val"}
            run = root / f"{len(name)}_{seed}"
            runs.append(save_run(run, store, name=name, seed=len(name) + seed, training=training))
    changes = {"names": {}, "classes": True, "probe": True, "costs": False, "draws": 0}
    return evaluate(make_recipe(root, runs=[*map(str, runs)], split="val", **changes))


def test_confusions_and_calibration_follow_from_the_logits(report: EvaluateReport) -> None:
    saved = load_file(next((report.folder / "logits").glob("2_*")))
    run = report.results.runs[2]
    logits, labels = saved["logits.verb"][0], saved["labels.verb"]
    seen = saved["present"].astype(bool).any(axis=1)
    counts = np.zeros((4, 4), int)
    for true, answer, clips in run.confusion["verb"]:
        counts[true, answer] = clips
    assert counts.sum() == seen.sum()
    right = (logits.argmax(axis=1) == labels) & seen
    assert np.trace(counts) == right.sum()
    assert counts.sum(axis=1).tolist() == np.bincount(labels, minlength=4).tolist()
    sure = softmax(logits).max(axis=1)
    error = 0.0
    for k in range(15):
        inside = (sure > k / 15) & (sure <= (k + 1) / 15)
        if inside.any():
            error += inside.mean() * abs(right[inside].mean() - sure[inside].mean())
    assert run.calibration["verb"].ece == pytest.approx(error)
    for k, one in enumerate(run.calibration["verb"].bins):
        assert one.clips == ((sure > k / 15) & (sure <= (k + 1) / 15)).sum()
    sure_of_action = sure * softmax(saved["logits.noun"][0]).max(axis=1)
    bins = run.calibration["action"].bins
    mean = sum(b.clips * b.confidence for b in bins) / sum(b.clips for b in bins)
    assert mean == pytest.approx(sure_of_action.mean())


def test_every_run_names_its_five_likeliest_classes(report: EvaluateReport) -> None:
    with (report.folder / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 * 2 * report.results.data.clips
    row = next(r for r in rows if (r["run"], r["seed"], r["head"]) == ("plain", "1", "verb"))
    saved = load_file(next((report.folder / "logits").glob("3_*")))
    shares = softmax(saved["logits.verb"][0, 0])
    assert row["top1"] == f"v{shares.argmax()}"
    assert float(row["p4"]) == pytest.approx(shares.min(), abs=1e-4)
    assert row["top5"] in (None, "")  # there are four verbs


def test_a_linear_probe_is_ridge_on_the_flattened_tokens(report: EvaluateReport) -> None:
    store = FeatureStore.open(report.folder.parent / "store")
    train, val = (np.flatnonzero(store.split == s) for s in ("train", "val"))
    of_clips = [
        store.gather("rgb", torch.from_numpy(of)).float().flatten(1).numpy() for of in (train, val)
    ]
    mean, sd = of_clips[0].mean(axis=0), of_clips[0].std(axis=0)
    x, y = ((tokens - mean) / sd for tokens in of_clips)
    truth = np.asarray(store.labels["verb"])
    found = next(p for p in report.results.probes if (p.modalities, p.head) == (("rgb",), "verb"))
    assert found.penalty is not None
    assert (found.clips, found.features) == (len(train), 24)
    model = RidgeClassifier(alpha=24 * found.penalty).fit(x, truth[train])
    assert found.score.correct == (model.predict(y) == truth[val]).sum()
    names = [(p.modalities, p.head) for p in report.results.probes]
    assert names[-1] == (("rgb", "flow", "audio"), "action")


def test_more_numbers_than_clips_give_the_same_ridge() -> None:
    rng = np.random.default_rng(0)
    train, test = (rng.normal(size=(n, 90)).astype(np.float32) for n in (30, 20))
    labels = rng.integers(3, size=30)
    few = probe._rotated([train, test])
    assert few[0].shape == (30, 30)
    whole = RidgeClassifier(alpha=50).fit(train, labels)
    rotated = RidgeClassifier(alpha=50).fit(few[0], labels)
    np.testing.assert_allclose(
        rotated.decision_function(few[1]), whole.decision_function(test), atol=1e-4
    )


def test_probes_that_do_not_fit_into_memory_are_left_out(
    report: EvaluateReport, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(probe, "MOST_BYTES", 4 * 20 * 60)
    run = report.folder.parent / f"{len('plain')}_0"
    changes = {"names": {}, "probe": True, "costs": False, "draws": 0, "out": str(tmp_path / "r")}
    recipe = make_recipe(report.folder.parent, runs=[str(run)], split="val", **changes)
    found = evaluate(recipe).results
    assert {p.modalities for p in found.probes} == {("flow",), ("audio",)}
    assert found.probe_notes[0].startswith(
        "V: no linear probe was trained, because its tokens need"
    )


def test_tables_for_papers_escape_names(report: EvaluateReport) -> None:
    texts = {p.stem: p.read_text() for p in (report.folder / "tables").glob("*.tex")}
    assert {"subsets", "drop_curve", "differences", "classes", "seeds", "probes"} <= texts.keys()
    for text in texts.values():
        columns = len(re.findall("[lr]", text.split("tabular}{")[1].split("}")[0]))
        for line in text.splitlines():
            if line.endswith(r"\\"):
                assert len(re.findall(r"(?<!\\)&", line)) == columns - 1
                # What TeX would act on stands only where we put it.
                plain = re.sub(
                    r"\$\\?[a-z<>-]+\$|\\[&%$#_{}]|\\text[a-z]+\{\}|\{\[\}|\\\\$", "", line
                )
                assert not re.search(r"[\\$#_%^~{}]", plain), line
    assert tables.escape_latex("w/ δ_1 & 50 % Ω") == r"w/ $\delta$\_1 \& 50 \% $\Omega$"


def test_the_page_says_what_is_shown_and_what_is_not(report: EvaluateReport) -> None:
    page = (report.folder / "index.html").read_text()
    assert "15 clips, 2 seeds" in page
    assert re.search("is better than|predict the same|is not significant", page)
    assert "on which the best epoch was chosen (" in page
    assert "<script" not in page
    assert (report.folder / "figures/confusion_verb_1.pdf").read_bytes()[:4] == b"%PDF"
    assert "± " in (report.folder / "tables/subsets.md").read_text()
