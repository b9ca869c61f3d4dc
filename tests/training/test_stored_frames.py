"""More frames in a store than a network takes: training takes other ones of them each time."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.cut_store import FRAMES, choices, decoded, write_cut_store
from support.training import baseline_recipe, results, says, stopped_and_resumed

from karmma_pipeline.data.loading.loader import Batch, FeatureLoader
from karmma_pipeline.models.backbones.suffix import Suffix
from karmma_pipeline.store import FeatureStore
from karmma_pipeline.training.clips import drawn_frames
from karmma_pipeline.training.stages import train_baseline
from karmma_pipeline.views import frame_windows, middle_frames

CLIPS = np.arange(24)
TAKEN = 2
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cut_store(tmp_path_factory.mktemp("more") / "s", "input", frames=TAKEN)


def test_windows_are_evenly_spaced_and_the_middle_one_of_three_has_the_frames_of_fewer_parts() -> (
    None
):
    assert frame_windows(6, 2).tolist() == [[0, 3], [1, 4], [2, 5]]
    assert frame_windows(5, 3).tolist() == [[0, 1, 2], [1, 2, 3], [2, 3, 4]]
    assert frame_windows(4, 4).tolist() == [[0, 1, 2, 3]]
    for T in (1, 2, 5, 32):
        centres = (np.arange(3 * T) + 0.5) / (3 * T)
        np.testing.assert_allclose(centres[middle_frames(3 * T, T)], (np.arange(T) + 0.5) / T)
    for stored, taken in ((7, 3), (8, 3), (64, 32), (40, 32), (5, 1)):
        windows = frame_windows(stored, taken)
        assert windows.min() == 0
        assert windows.max() == stored - 1
        middle = np.arange(stored)[middle_frames(stored, taken)].tolist()
        assert middle == windows[(len(windows) - 1) // 2].tolist()


def windows_of(batches: list[Batch]) -> dict[int, int]:
    """Return which of the two windows each clip was seen in, found by its pictures."""
    rgb, flow = decoded()["rgb"].flatten(2), decoded()["flow"][:, :, :2].flatten(2)
    found: dict[int, int] = {}
    for batch in batches:
        tokens = batch.tokens_on(CPU)
        for row, clip in enumerate(batch.clip_index.tolist()):
            (window,) = (w for w in (0, 1) if torch.equal(tokens["rgb"][row], rgb[clip, w::2]))
            assert torch.equal(tokens["flow"][row], flow[clip, window::2])
            found[clip] = window
    return found


def test_what_an_epoch_takes_is_decided_by_seed_epoch_and_clip_alone(store: Path) -> None:
    source = FeatureStore.open(store)

    def loader(size: int, seed: int = 0, **how: Any) -> FeatureLoader:
        frames = drawn_frames(seed, source, CLIPS)
        return FeatureLoader(source, CLIPS, size, seed=seed, shuffle=True, frames=frames, **how)

    first = windows_of(list(loader(24).epoch(0)))
    assert len(first) == 24
    assert 5 < sum(first.values()) < 19
    assert windows_of(list(loader(5, threads=0).epoch(0))) == first
    ranks = [loader(8, rank=rank, world_size=2) for rank in (0, 1)]
    assert windows_of([batch for one in ranks for batch in one.epoch(0)]) == first
    later = windows_of(list(loader(6).epoch(0, start_batch=2)))
    assert later == {clip: first[clip] for clip in later}
    assert windows_of(list(loader(24).epoch(1))) != first
    assert windows_of(list(loader(24, seed=1).epoch(0))) != first
    (whole,) = loader(24).epoch(0)
    part = whole.rows(slice(3, 7))
    assert torch.equal(part.tokens_on(CPU)["rgb"], whole.tokens_on(CPU)["rgb"][3:7])


def test_a_network_is_evaluated_on_the_middle_frames(store: Path) -> None:
    source = FeatureStore.open(store)
    assert source.shape("rgb") == (FRAMES, 3 * 64)
    assert '"version": 5' in (store / "spec.json").read_text()
    stored = source.gather("rgb", torch.arange(4))
    suffix = Suffix(choices("input", TAKEN)["rgb"])
    with torch.inference_mode():
        assert torch.equal(suffix(stored), suffix(stored[:, 0::2]))
        assert not torch.equal(suffix(stored), suffix(stored[:, 1::2]))
    assert drawn_frames(0, FeatureStore.open(write_plain(store.parent)), CLIPS) is None


def write_plain(root: Path) -> Path:
    return write_cut_store(root / "plain", "input")


def test_a_training_takes_other_frames_each_time_and_goes_on_exactly(
    store: Path, tmp_path: Path
) -> None:
    how: dict[str, Any] = {"epochs": 2, "batch_size": 8}
    whole, parts = (
        baseline_recipe(store, tmp_path / name, suffix={"lr": 1e-3}, **how)
        for name in ("whole", "parts")
    )
    train_baseline(whole)
    stopped_and_resumed(train_baseline, parts, (4,), "run the same command again")
    assert results(tmp_path / "whole") == results(tmp_path / "parts")
    still = {"lr": 1e-3, "jitter": False}
    train_baseline(baseline_recipe(store, tmp_path / "still", suffix=still, **how))
    assert results(tmp_path / "still") != results(tmp_path / "whole")
    twice = [says(tmp_path / "whole", store) for _ in range(2)]
    assert torch.equal(*twice)
