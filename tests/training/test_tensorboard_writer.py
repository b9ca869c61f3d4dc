"""TensorBoard's own reader sees each epoch once, whatever happened to the training."""

from pathlib import Path

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
