import tracemalloc
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from karmma_pipeline.metrics import (
    action_correct,
    drop_distribution,
    mean_class_accuracy,
    topk_correct,
    wilson_interval,
)

# Per-subset accuracies of the paper's first version (arXiv v1) and the drop curves of its page:
# two published sources that the expected curve must join.
SUBSETS = ("VFA", "VF", "VA", "FA", "V", "F", "A")
PUBLISHED = {
    "EPIC Baseline": (
        (40.00, 36.80, 37.48, 5.49, 32.10, 2.58, 2.05),
        (40.00, 36.16, 32.24, 28.38, 24.64, 21.55, 18.05, 15.82, 13.84, 12.79),
        0.25,
    ),
    "EPIC Baseline w/ delta": (
        (41.49, 39.69, 39.36, 27.09, 37.84, 25.64, 6.23),
        (41.49, 39.45, 37.25, 34.77, 32.26, 29.85, 27.70, 25.93, 24.56, 23.43),
        0.16,
    ),
    "SSv2 Baseline": (
        (57.31, 56.98, 40.03, 37.35, 39.91, 36.50, 0.07),
        (57.31, 53.28, 49.09, 44.82, 40.58, 36.86, 32.99, 29.97, 27.39, 25.64),
        0.20,
    ),
    "SSv2 Baseline w/ delta": (
        (60.31, 60.38, 53.04, 50.78, 53.02, 50.97, 1.21),
        (60.31, 58.07, 55.51, 52.24, 49.07, 45.73, 42.46, 39.70, 37.54, 35.51),
        0.21,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_papers_drop_curves_follow_from_its_subset_accuracies(name: str) -> None:
    accuracy, curve, tolerance = PUBLISHED[name]
    of_mask = {
        tuple(m in subset for m in "VFA"): a for subset, a in zip(SUBSETS, accuracy, strict=True)
    }
    expected = [
        sum(c * of_mask[m] for m, c in drop_distribution((True,) * 3, p / 10).items())
        for p in range(10)
    ]
    rms = np.sqrt(np.mean((np.array(expected) - curve) ** 2))
    assert rms < tolerance


@given(present=st.lists(st.booleans(), min_size=1, max_size=4).map(tuple), rate=st.floats(0, 0.99))
def test_drop_chances_are_those_of_the_rule_counted_out(
    present: tuple[bool, ...], rate: float
) -> None:
    found = drop_distribution(present, rate)
    assert sum(found.values()) == pytest.approx(1)
    wanted: dict[tuple[bool, ...], float] = {}
    places = [i for i, p in enumerate(present) if p]
    for kept in product((False, True), repeat=len(places)):
        chance = float(np.prod([1 - rate if k else rate for k in kept]))
        restored = (
            [kept]
            if any(kept) or not kept
            else [tuple(i == j for i in range(len(kept))) for j in range(len(kept))]
        )
        for kept_now in restored:
            mask = [False] * len(present)
            for place, keep in zip(places, kept_now, strict=True):
                mask[place] = keep
            wanted[tuple(mask)] = wanted.get(tuple(mask), 0) + chance / len(restored)
    for outcome, chance in wanted.items():
        assert found.get(outcome, 0) == pytest.approx(chance, abs=1e-12)


@settings(deadline=None)
@given(
    seed=st.integers(0, 10**6),
    verbs=st.integers(2, 120),
    nouns=st.integers(2, 120),
    k=st.sampled_from([1, 5]),
)
def test_actions_are_ranked_by_the_product_of_probabilities(
    seed: int, verbs: int, nouns: int, k: int
) -> None:
    rng = np.random.default_rng(seed)
    logits = {"verb": rng.normal(size=(6, verbs)), "noun": rng.normal(size=(6, nouns)) * 3}
    labels = {"verb": rng.integers(0, verbs, 6), "noun": rng.integers(0, nouns, 6)}
    for i in range(3):  # likely answers, or hardly any would be right
        labels["verb"][i], labels["noun"][i] = (logits[h][i].argmax() for h in ("verb", "noun"))
    wanted = []
    for i in range(6):
        p = [np.exp(logits[h][i]) / np.exp(logits[h][i]).sum() for h in ("verb", "noun")]
        scores = np.outer(*p)
        own = scores[labels["verb"][i], labels["noun"][i]]
        wanted.append((scores > own).sum() < k)
    assert action_correct(logits, labels, k).tolist() == wanted


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10**6))
def test_actions_of_three_heads_are_ranked_by_all_products(seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits = {h: rng.normal(size=(4, c)) for h, c in (("a", 7), ("b", 6), ("c", 5))}
    labels = {h: of.argsort(axis=1)[:, -1 - i % 2] for i, (h, of) in enumerate(logits.items())}
    wanted = []
    for i in range(4):
        p = [np.exp(of[i]) / np.exp(of[i]).sum() for of in logits.values()]
        scores = np.einsum("a,b,c->abc", *p)
        wanted.append((scores > scores[tuple(of[i] for of in labels.values())]).sum() < 5)
    assert action_correct(logits, labels, 5).tolist() == wanted


def test_actions_of_many_heads_need_little_memory() -> None:
    rng = np.random.default_rng(0)
    logits = {h: rng.normal(size=(256, 120)) for h in "abcd"}
    labels = {h: rng.integers(0, 120, 256) for h in "abcd"}
    tracemalloc.start()
    action_correct(logits, labels, 5)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 300e6


def test_one_head_is_the_action_itself() -> None:
    logits = {"action": np.array([[0.1, 0.9], [0.8, 0.2]])}
    assert action_correct(logits, {"action": np.array([1, 1])}, 1).tolist() == [True, False]


def test_large_logits_do_not_overflow() -> None:
    logits = {"verb": np.array([[1e4, 0.0, -1e4]]), "noun": np.array([[-1e4, 1e4]])}
    assert action_correct(logits, {"verb": np.array([0]), "noun": np.array([1])}, 5).all()


def test_top_k_counts_the_k_highest() -> None:
    logits = np.array([[3.0, 2, 1], [1, 2, 3]])
    labels = np.array([1, 0])
    assert topk_correct(logits, labels, 1).tolist() == [False, False]
    assert topk_correct(logits, labels, 2).tolist() == [True, False]


def test_mean_class_accuracy_weighs_classes_not_clips() -> None:
    labels = np.array([0, 0, 0, 2])
    assert mean_class_accuracy(np.array([True, True, False, False]), labels) == pytest.approx(1 / 3)


def test_the_wilson_interval_is_the_textbooks() -> None:
    low, high = wilson_interval(81, 263)  # Newcombe (1998), table I: 0.2553 to 0.3662
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)
    assert wilson_interval(0, 20)[0] == 0
    assert wilson_interval(0, 0) == (0.0, 1.0)
