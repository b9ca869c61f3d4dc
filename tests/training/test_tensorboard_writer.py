"""TensorBoard's own reader sees each epoch once, whatever happened to the training."""

import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from karmma_pipeline.training.state import TensorboardWriter


def test_a_run_that_goes_on_replaces_the_points_that_it_makes_again(tmp_path: Path) -> None:
    with TensorboardWriter(tmp_path, 1) as killed:
        for epoch in (1, 2):
            killed.write({"val_loss": 10.0 * epoch, "val_top1": 50.0}, epoch)
    (events,) = tmp_path.iterdir()
    events.rename(tmp_path / "events.out.tfevents.1.host.1")
    with TensorboardWriter(tmp_path, 2) as resumed:
        for epoch in (2, 3):
            resumed.write({"val_loss": epoch}, epoch)
    reader = EventAccumulator(str(tmp_path)).Reload()
    points = [(point.step, point.value) for point in reader.Scalars("val_loss")]
    assert points == [(1, 10.0), (2, 2.0), (3, 3.0)]
    assert reader.Tags()["scalars"] == ["val_loss", "val_top1"]


def test_a_node_whose_clock_is_behind_adds_its_points_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with TensorboardWriter(tmp_path, 1) as first:
        for epoch in (1, 2):
            first.write({"val_loss": 10.0 * epoch, "val_top1": None, "device": "cpu"}, epoch)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now - 86_400)
    for start in (3, 4):
        with TensorboardWriter(tmp_path, start) as behind:
            behind.write({"val_loss": float(start)}, start)
    reader = EventAccumulator(str(tmp_path)).Reload()
    points = [(point.step, point.value) for point in reader.Scalars("val_loss")]
    assert points == [(1, 10.0), (2, 20.0), (3, 3.0), (4, 4.0)]
    assert reader.Tags()["scalars"] == ["val_loss"]
