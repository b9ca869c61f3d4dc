from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny_store import write_store
from support.training import baseline_recipe

from karmma_pipeline.data.loading.loader import Batch
from karmma_pipeline.data.loading.masks import clip_keys
from karmma_pipeline.store import FeatureStore
from karmma_pipeline.training import clips, loop
from karmma_pipeline.training.clips import balanced_order
from karmma_pipeline.training.stages import train_baseline

IDS = np.array([f"c{i}" for i in range(200)], "S8")


@settings(deadline=None, max_examples=40)
@given(
    labels=st.lists(st.integers(-1, 4), min_size=1, max_size=200),
    power=st.floats(0, 1),
    epoch=st.integers(0, 5),
)
def test_each_clip_comes_as_often_as_the_formula_says_rounded_up_or_down(
    labels: list[int], power: float, epoch: int
) -> None:
    y = np.array(labels)
    order = balanced_order(clip_keys(IDS[: len(y)]), {"verb": y}, power, seed=3)
    drawn = order(epoch)
    assert len(drawn) == len(y)
    counts = np.bincount(y[y >= 0], minlength=5)
    weight = np.array([counts[c] ** -power if c >= 0 else np.nan for c in labels], float)
    known = ~np.isnan(weight)
    weight[~known] = weight[known].mean() if known.any() else 1.0
    expected = len(y) * weight / weight.sum()
    times = np.bincount(drawn, minlength=len(y))
    assert (np.abs(times - expected) < 1 + 1e-6).all()
    assert np.array_equal(drawn, order(epoch))


def test_full_balance_makes_classes_equally_frequent_and_epochs_differ() -> None:
    y = np.array([0] * 150 + [1] * 40 + [2] * 10)
    order = balanced_order(clip_keys(IDS), {"verb": y}, 1.0, seed=0)
    drawn = np.concatenate([order(epoch) for epoch in range(30)])
    shares = np.bincount(y[drawn]) / len(drawn)
    assert shares == pytest.approx([1 / 3] * 3, abs=0.01)
    assert not np.array_equal(order(0), order(1))
    assert np.diff(np.flatnonzero(y[order(0)] == 2)).max() < 30  # spread over the epoch


def test_a_balanced_training_learns_from_the_clips_that_are_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = write_store(tmp_path / "s")
    seen: list[int] = []
    step = loop.Trainer._step

    def spy(self: loop.Trainer, objective: Any, batch: Batch, counts: Any) -> float:
        seen.extend(batch.clip_index.tolist())
        return step(self, objective, batch, counts)

    def only_the_third(keys: Any, labels: Any, power: float, seed: int) -> Any:
        assert (power, seed) == (0.5, 7)
        return lambda epoch: np.full(len(keys), 2 + epoch)

    monkeypatch.setattr(loop.Trainer, "_step", spy)
    monkeypatch.setattr(clips, "balanced_order", only_the_third)
    train_baseline(baseline_recipe(store, tmp_path / "r", epochs=2, class_balance=0.5, seed=7))
    train = np.flatnonzero(FeatureStore.open(store).split == "train")
    assert seen == [train[2]] * 72 + [train[3]] * 72
