import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from karmma_pipeline.data.loading.masks import clip_keys, modality_mask, sized_masks
from karmma_pipeline.errors import ConfigError

N = 40_000
KEYS = clip_keys(np.array([f"P01_{i}" for i in range(N)], dtype="S"))
ALL = np.ones((N, 3), dtype=np.bool_)


def five_sigma(rate: float, n: int = N) -> float:
    return 5 * float(np.sqrt(rate * (1 - rate) / n))


def test_keys_do_not_depend_on_the_width_of_the_id_column() -> None:
    ids = ["a", "b", "abc"]
    assert np.array_equal(clip_keys(np.array(ids, "S3")), clip_keys(np.array(ids, "S40")))


def test_keys_of_many_clips_are_unique() -> None:
    assert len(np.unique(KEYS)) == N


def test_keys_and_masks_stay_the_same_across_versions() -> None:
    """Changing these numbers changes every published run: fnv1a('a') mixed by splitmix64."""

    def mix(x: int) -> int:  # the reference finaliser, on Python integers
        word = 2**64 - 1
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & word
        x = (x ^ x >> 27) * 0x94D049BB133111EB & word
        return x ^ x >> 31

    assert int(clip_keys(np.array(["a"], "S"))[0]) == mix(0xAF63DC4C8601EC8C)  # published fnv1a64


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_modalities_drop_independently_at_rate_p_and_one_is_restored_uniformly(p: float) -> None:
    mask = modality_mask(7, 3, KEYS, ALL, p)
    for m in range(3):
        rate = (1 - p) + p**3 / 3
        assert abs(mask[:, m].mean() - rate) < five_sigma(rate)
    only = (1 - p) * p * p + p**3 / 3
    for m in range(3):
        rate_only = (mask[:, m] & (mask.sum(axis=1) == 1)).mean()
        assert abs(rate_only - only) < five_sigma(only)
    pair = (1 - p) ** 2
    assert abs((mask[:, 0] & mask[:, 2]).mean() - pair) < five_sigma(pair)


def test_certain_dropout_leaves_exactly_one_drawn_uniformly() -> None:
    mask = modality_mask(0, 0, KEYS, ALL, 1.0)
    assert (mask.sum(axis=1) == 1).all()
    assert np.abs(mask.mean(axis=0) - 1 / 3).max() < five_sigma(1 / 3)


def test_repair_is_uniform_over_the_present_ones_only() -> None:
    present = ALL & np.array([True, False, True])
    mask = modality_mask(0, 0, KEYS, present, 1.0)
    assert abs(mask[:, 0].mean() - 0.5) < five_sigma(0.5)
    assert not mask[:, 1].any()


def test_seed_and_epoch_change_the_masks_and_are_independent_draws() -> None:
    base = modality_mask(0, 0, KEYS, ALL, 0.5)
    for seed, epoch in [(0, 1), (1, 0), (1, 1), (-1, 0)]:
        other = modality_mask(seed, epoch, KEYS, ALL, 0.5)
        rate = (1 - 0.5 + 0.125 / 3) ** 2
        assert abs((base[:, 0] & other[:, 0]).mean() - rate) < five_sigma(rate)


def test_no_dropout_is_presence_in_a_copy() -> None:
    mask = modality_mask(0, 0, KEYS, ALL, 0.0)
    mask[0] = False
    assert ALL.all()


@given(
    present=hnp.arrays(np.bool_, st.tuples(st.integers(1, 20), st.integers(1, 5))),
    p=st.floats(0, 1),
    seed=st.integers(-(2**40), 2**70),
    epoch=st.integers(0, 10_000),
)
def test_a_mask_lies_within_presence_and_is_never_empty_where_something_is_present(
    present: NDArray[np.bool_], p: float, seed: int, epoch: int
) -> None:
    mask = modality_mask(seed, epoch, KEYS[: len(present)], present, p)
    assert not (mask & ~present).any()
    assert np.array_equal(mask.any(axis=1), present.any(axis=1))


@given(st.permutations(list(range(12))), st.integers(1, 12))
def test_masks_do_not_depend_on_order_or_batch(order: list[int], size: int) -> None:
    present = (np.arange(36).reshape(12, 3) % 5) != 0
    whole = modality_mask(5, 2, KEYS[:12], present, 0.6)
    picked = np.array(order[:size])
    assert np.array_equal(modality_mask(5, 2, KEYS[picked], present[picked], 0.6), whole[picked])


@pytest.mark.parametrize("p", [-0.1, 1.5, float("nan")])
def test_a_rate_that_is_no_probability_is_refused(p: float) -> None:
    with pytest.raises(ConfigError, match=r"modality_dropout=.*between 0 and 1"):
        modality_mask(0, 0, KEYS, ALL, p)


def test_drawn_subsets_have_each_size_and_each_member_equally_often() -> None:
    present = np.ones((4000, 7), np.bool_)
    present[:1000, 0] = False
    low, high = np.full(4000, 2), np.full(4000, 4)
    high[:500] = 1  # no size at all: what is present stays
    masks = sized_masks(3, 6, KEYS[:4000], present, low, high)
    assert not (masks & ~present).any()
    assert (masks[:, :500] == present[:500]).all()
    sizes = masks[:, 500:].sum(axis=2)
    assert {*sizes.ravel().tolist()} == {2, 3, 4}
    spread = np.sort(sizes, axis=0)  # of each clip: two of every size
    assert (spread == np.array([2, 2, 3, 3, 4, 4])[:, None]).all()
    assert np.abs((sizes[0][:, None] == [2, 3, 4]).mean(axis=0) - 1 / 3).max() < five_sigma(
        0.3, 3500
    )
    whole = masks[:, 1000:].mean(axis=(0, 1))
    assert np.abs(whole - 3 / 7).max() < five_sigma(3 / 7, 3000 * 6)
    other = sized_masks(3, 6, KEYS[1000:1010], present[1000:1010], low[:10], high[-10:])
    assert np.array_equal(other, masks[:, 1000:1010])
