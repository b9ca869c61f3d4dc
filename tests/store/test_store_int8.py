"""int8 rows: the error is what the format promises, through disk, loader and conversion."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from support.tiny_store import write_store

from karmma_pipeline.data.loading.loader import FeatureLoader
from karmma_pipeline.errors import StoreError
from karmma_pipeline.store import ClipRow, FeatureStore, ShardWriter, StoreSpec, create_store
from karmma_pipeline.store.spec import LARGEST, ModalitySpec, dequantise, quantise


@settings(deadline=None, max_examples=60)
@given(hnp.arrays(np.float32, (3, 7), elements=st.floats(-1e6, 1e6, width=32)))
def test_the_error_of_a_value_is_at_most_half_a_step(values: np.ndarray) -> None:
    steps, scale = quantise(values)
    error = np.abs(dequantise(steps, scale) - values)
    largest = np.abs(values).max(axis=-1, keepdims=True)
    # half a step, and what rounding the scale to float16 can add at the ends of the range
    assert (error <= 0.5 * largest / 127 * 1.002 + largest * 2.0**-11 + 4e-6).all()


def test_the_largest_value_that_fits_does_and_zeros_stay_zeros() -> None:
    steps, scale = quantise(np.array([[LARGEST, -LARGEST, 0], [0, 0, 0]]))
    assert dequantise(steps, scale).tolist() == [[LARGEST, -LARGEST, 0], [0, 0, 0]]


def test_quantising_again_changes_nothing() -> None:
    spec = ModalitySpec(tokens=50, width=64, dtype="int8")
    once = spec.encode(np.random.default_rng(0).normal(size=(50, 64)))
    again = spec.encode(spec.decode(once))
    for a, b in zip(once, again, strict=True):
        np.testing.assert_array_equal(a, b)


def test_layer_norm_features_lose_under_two_percent() -> None:
    values = np.random.default_rng(0).normal(size=(200, 768)).astype(np.float32)
    error = dequantise(*quantise(values)) - values
    assert np.sqrt((error**2).mean() / (values**2).mean()) < 0.02


def test_a_batch_on_the_device_equals_the_gathered_tokens(tmp_path: Path) -> None:
    store = FeatureStore.open(write_store(tmp_path / "s", clips=40, dtype="int8"))
    exact = FeatureStore.open(write_store(tmp_path / "x", clips=40, dtype="float32"))
    for batch in FeatureLoader(store, range(40), 16, shuffle=True).epoch(0):
        assert batch.tokens["rgb"].dtype == torch.int8
        for m, tokens in batch.tokens_on(torch.device("cpu")).items():
            assert torch.equal(tokens, store.gather(m, batch.clip_index))
            wanted = exact.gather(m, batch.clip_index)
            assert float((tokens - wanted).abs().max()) <= float(wanted.abs().max()) / 127 * 0.51
        half = batch.rows(slice(3, 5))
        whole = batch.tokens_on(torch.device("cpu"))["audio"]
        assert torch.equal(half.tokens_on(torch.device("cpu"))["audio"], whole[3:5])


def test_what_an_int8_row_cannot_hold_is_refused(tmp_path: Path) -> None:
    one = ModalitySpec(tokens=1, width=2, dtype="int8")
    create_store(tmp_path, StoreSpec(modalities={"rgb": one}, heads={}), [ClipRow("a", {})])
    with ShardWriter(tmp_path, 0) as writer:
        with pytest.raises(StoreError, match="the maximum of int8"):
            writer.append("a", {"rgb": np.array([[1, 2 * LARGEST]])}, {}, {})
        writer.append("a", {"rgb": np.array([[1, 6e4]], np.float16)}, {}, {})


def test_int8_takes_half_the_bytes() -> None:
    int8, fp16 = (ModalitySpec(tokens=8, width=1024, dtype=d) for d in ("int8", "float16"))
    assert int8.clip_bytes == pytest.approx(fp16.clip_bytes / 2, rel=0.01)
