"""One missing modality and a stale sensor, against numpy and the model itself."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.evaluation import make_recipe, write_two_runs

from karmma_pipeline import logs
from karmma_pipeline.evaluation.evaluate import evaluate
from karmma_pipeline.evaluation.results import Results, Robustness
from karmma_pipeline.evaluation.robustness import before
from karmma_pipeline.models.saved import load_model
from karmma_pipeline.store import FeatureStore

pytestmark = pytest.mark.usefixtures("one_kind_of_figures")

QUICK: dict[str, Any] = {"costs": False, "draws": 0, "drop_rates": [0.0], "title": "t"}
SHARES = [0.0, 0.25, 0.5, 1.0]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("robustness")
    store = write_two_runs(root, clips=40)
    ids = FeatureStore.open(store).clip_ids.astype(str).tolist()
    lines = [f"{ids[3]},audio", f"{ids[7]},rgb+flow", f"{ids[8]},"]
    (root / "list.csv").write_text("clip_id,missing\n" + "\n".join(lines) + "\n")
    return root


@pytest.fixture(scope="module")
def found(place: Path) -> Results:
    tests = {"missing": SHARES, "stale": SHARES, "patterns": {"mine": str(place / "list.csv")}}
    return evaluate(make_recipe(place, robustness=tests, **QUICK)).results


def test_of(found: Results, run: int, kind: str, what: str) -> Robustness:
    return next(t for t in found.runs[run].robustness if (t.kind, t.what) == (kind, what))


test_of.__test__ = False  # type: ignore[attr-defined]


def right(place: Path, mask: np.ndarray, audio: np.ndarray | None = None) -> np.ndarray:
    """Clips that run 0 answers rightly with every head, seen under a mask [40, 3]."""
    store = FeatureStore.open(place / "store")
    model, _ = load_model(place / "run0/best")
    every = torch.arange(len(store))
    tokens = {m: store.gather(m, every) for m in store.modalities}
    if audio is not None:
        tokens["audio"] = tokens["audio"][torch.from_numpy(audio)]
    with torch.inference_mode():
        out = model(tokens, torch.from_numpy(mask))
    best = [out[h].argmax(dim=1).numpy() == store.labels[h] for h in store.heads]
    return np.logical_and.reduce(best) & mask.any(axis=1)


def test_one_modality_is_missing_for_ever_more_clips(place: Path, found: Results) -> None:
    for run in found.runs:
        for m, left in (("audio", ("rgb", "flow")), ("rgb", ("flow", "audio"))):
            points = next(t for t in run.robustness if (t.kind, t.what) == ("missing", m)).points
            assert [p.hit for p in points] == [0, 10, 20, 40]
            whole = run.subset(("rgb", "flow", "audio"), "all").scores["action_top1"]
            assert points[0].scores["action_top1"] == whole
            without = run.subset(left, "all").scores["action_top1"]
            assert points[-1].scores["action_top1"] == without
    # all runs are hit on the same clips, and on those of a smaller share too
    store = FeatureStore.open(place / "store")
    full = right(place, store.present)
    lost = right(place, store.present & [True, True, False])
    points = test_of(found, 0, "missing", "audio").points
    right_of = [point.scores["action_top1"].correct for point in points]
    for (low, few), (high, many) in pairwise(zip(SHARES, right_of, strict=True)):
        most = int((full != lost).sum())
        assert abs(many - few) <= min(most, round(40 * (high - low)))


def test_a_list_says_what_clips_lack(place: Path, found: Results) -> None:
    store = FeatureStore.open(place / "store")
    mask = store.present.copy()
    mask[3, 2] = mask[7, 0] = mask[7, 1] = False
    (point,) = test_of(found, 0, "pattern", "mine").points
    assert (point.hit, point.share) == (2, 2 / 40)
    assert point.scores["action_top1"].correct == right(place, mask).sum()


def test_a_stale_sensor_repeats_the_clip_before(place: Path, found: Results) -> None:
    store = FeatureStore.open(place / "store")
    has = store.present[:, 2]
    previous = np.full(40, -1)
    for clip in range(40):
        earlier = [c for c in range(clip) if store.group[c] == store.group[clip] and has[c]]
        previous[clip] = earlier[-1] if earlier else -1
    mask = store.present.copy()
    mask[:, 2] &= previous >= 0
    stale = right(place, mask, np.where(mask[:, 2], previous, np.arange(40)))
    points = test_of(found, 0, "stale", "audio").points
    assert points[-1].scores["action_top1"].correct == stale.sum()
    assert points[0].scores["action_top1"].correct == right(place, store.present).sum()


def test_the_clip_before_is_of_the_group_and_has_the_modality() -> None:
    groups, has = np.array(["a", "b", "a", "a", "b"]), np.array([True, True, False, True, True])
    clips = np.array([10, 11, 12, 13, 9])  # in another order than the store's
    assert before(clips, groups, has).tolist() == [-1, 9, 10, 10, -1]


def test_the_report_shows_every_test(place: Path, found: Results) -> None:
    table = (place / "report/tables/robustness.md").read_text()
    assert "| test | modality or pattern | clips affected | r0 | r1 |" in table
    assert table.count("\n") == 2 + 3 * len(SHARES) * 2 + 1
    assert (place / "report/figures/robustness.svg").is_file()
    assert "clips affected" in (place / "report/index.html").read_text()


def test_long_steps_after_the_passes_show_bars_too(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tests = {"missing": [], "stale": [1.0]}
    with logs.bars(shown=True):
        evaluate(make_recipe(place, robustness=tests, out=str(tmp_path / "r"), **QUICK))
    said = capsys.readouterr().err
    for bar in ("stale audio, r1", "compare verb"):
        assert f"{bar}: 100%" in said
