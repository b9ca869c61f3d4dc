"""int8 rows: the error is what the format promises, through disk, loader and conversion."""

import json
import tarfile
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from support.cut_store import write_cut_store
from support.tiny_store import write_store

from karmma_pipeline.data.loading.loader import FeatureLoader
from karmma_pipeline.errors import StoreError
from karmma_pipeline.store import (
    ClipRow,
    FeatureStore,
    ShardWriter,
    StoreSpec,
    create_store,
    verify,
)
from karmma_pipeline.store.joined import JoinedStore
from karmma_pipeline.store.spec import LARGEST, ModalitySpec, dequantise, quantise, quantise_affine
from karmma_pipeline.store.tools.export import export
from karmma_pipeline.store.tools.info import diff
from karmma_pipeline.store.tools.rewrite import convert, split
from karmma_pipeline.store.tools.stage import stage


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


@settings(deadline=None, max_examples=60)
@given(hnp.arrays(np.float32, (3, 7), elements=st.floats(-1e6, 1e6, width=32)))
def test_with_a_zero_point_a_step_is_a_255th_of_the_range_and_zero_is_exact(
    values: np.ndarray,
) -> None:
    values[:, 3] = 0
    found = dequantise(*quantise_affine(values))
    span = np.ptp(values, axis=-1, keepdims=True)
    # Half a step, another at the ends (the zero point is a whole step), and the scale's rounding.
    bound = span / 255 * 1.002 + span * 2.0**-11 + 1.6e-5
    assert (np.abs(found - values) <= bound).all()
    assert (found[:, 3] == 0).all()


def test_zero_points_are_those_of_pytorch() -> None:
    values = np.random.default_rng(0).normal(size=(50, 64)).astype(np.float32)
    values[:25] = np.maximum(values[:25], 0)  # behind a ReLU
    steps, scale = quantise_affine(values)
    assert set(scale[:25, 1]) == {-128}
    theirs = torch.fake_quantize_per_channel_affine(
        torch.from_numpy(values),
        torch.from_numpy(scale[:, 0]).float(),
        torch.from_numpy(scale[:, 1]).int(),
        0, -128, 127,
    )  # fmt: skip
    np.testing.assert_array_equal(dequantise(steps, scale), theirs)


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("cut")
    return {d: write_cut_store(root / d, "body", d) for d in ("int8", "float32")}


def test_activations_have_a_zero_point_that_zarr_and_h5py_read(cut: dict[str, Path]) -> None:
    store, exact = FeatureStore.open(cut["int8"]), FeatureStore.open(cut["float32"])
    assert verify(store.path) == []
    assert json.loads((store.path / "spec.json").read_text())["version"] == 6
    files: list[Any] = [zarr.open_group(store.path, mode="r"), h5py.File(store.path / "index.h5")]
    for m in store.modalities:
        assert store.specs[m].dtype == "int8_affine"
        wanted = exact.gather(m, torch.arange(24))
        assert wanted.min() == 0  # activations behind a ReLU
        ours = store.gather(m, torch.arange(24))
        assert float((ours - wanted).abs().max()) <= float(wanted.max()) / 255 * 0.51
        for file in files:
            start = int(file[f"clips/start_{m}"][3])
            rows = slice(start, start + store.specs[m].tokens)
            scale, zero = file[f"{m}/scale"][rows].astype(np.float32).T[..., None]
            np.testing.assert_array_equal((file[f"{m}/tokens"][rows] - zero) * scale, ours[3])
    for batch in FeatureLoader(store, range(24), 7).epoch(0):
        for m, tokens in batch.tokens_on(torch.device("cpu")).items():
            assert torch.equal(tokens, store.gather(m, batch.clip_index))


def test_every_store_command_takes_zero_points(cut: dict[str, Path], tmp_path: Path) -> None:
    convert(cut["float32"], tmp_path / "c", "int8")
    assert all("provenance" in line for line in diff(cut["int8"], tmp_path / "c"))
    parts = [FeatureStore.open(at) for at in split(cut["int8"], tmp_path / "parts", "split")]
    joined, store = JoinedStore(parts), FeatureStore.open(cut["int8"])
    place = torch.tensor([joined.clip_ids.tolist().index(i) for i in store.clip_ids.tolist()])
    copy = FeatureStore.open(stage(cut["int8"], tmp_path / "local"))
    convert(cut["int8"], tmp_path / "wide", "float32")
    for layout in ("npy", "pt"):
        export(cut["int8"], tmp_path / layout, layout)
    wide = FeatureStore.open(tmp_path / "wide")
    for m in store.modalities:
        wanted = store.gather(m, torch.arange(24))
        assert torch.equal(joined.gather(m, place), wanted)
        assert torch.equal(copy.gather(m, torch.arange(24)), wanted)
        assert torch.equal(wide.gather(m, torch.arange(24)), wanted)
        np.testing.assert_array_equal(np.load(tmp_path / f"npy/{m}/c003.npy"), wanted[3])
        assert torch.equal(torch.load(tmp_path / f"pt/{m}/c003.pt"), wanted[3])


def test_activations_in_int8_of_format_version_4_are_read(
    cut: dict[str, Path], tmp_path: Path
) -> None:
    """They have a scale alone; converting them to int8 adds the zero point."""
    with tarfile.open(Path(__file__).parents[1] / "fixtures/cut/bd0e97a_int8.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    assert json.loads((tmp_path / "cut/spec.json").read_text())["version"] == 4
    assert verify(tmp_path / "cut") == []
    convert(tmp_path / "cut", tmp_path / "new", "int8")
    old, new = FeatureStore.open(tmp_path / "cut"), FeatureStore.open(tmp_path / "new")
    exact = FeatureStore.open(cut["float32"])
    assert new.specs["rgb"].dtype == "int8_affine"
    for m in old.modalities:
        wanted = exact.gather(m, torch.arange(24))
        for store, steps in ((old, 127), (new, 84)):
            found = store.gather(m, torch.arange(24))
            assert float((found - wanted).abs().max()) <= float(wanted.max()) / steps * 0.51
