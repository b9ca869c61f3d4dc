from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny_store import write_store
from support.training import baseline_recipe

from karmma_pipeline.data.masks import clip_keys
from karmma_pipeline.train.balance import balanced_order
from karmma_pipeline.train.stages import train_baseline

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


def test_a_balanced_training_runs_and_draws_other_clips(tmp_path: Path) -> None:
    store = write_store(tmp_path / "s", clips=70)
    for name, balance in (("plain", 0.0), ("balanced", 1.0)):
        train_baseline(baseline_recipe(store, tmp_path / name, epochs=1, class_balance=balance))
    weights = [
        (tmp_path / n / "last/model.safetensors").read_bytes() for n in ("plain", "balanced")
    ]
    assert weights[0] != weights[1]
