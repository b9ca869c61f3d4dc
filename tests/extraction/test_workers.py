"""Batches that are computed at once: their order, their number, and that neither shows."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from support.media_files import write_video
from support.patience import PATIENCE_S

from karmma_pipeline import config, jobs
from karmma_pipeline.extraction import pipeline
from karmma_pipeline.extraction.inference.batching import ForwardWorkers, worker_count
from karmma_pipeline.extraction.inference.networks import Computed, Networks
from karmma_pipeline.extraction.inference.runner import ComputeConfig
from karmma_pipeline.extraction.pipeline import extract
from karmma_pipeline.extraction.recipe import ExtractRecipe


def make_recipe(folder: Path, **changes: Any) -> ExtractRecipe:
    tree = {
        "manifest": str(folder / "m.csv"),
        "out": str(folder / "out"),
        "sets": {
            "one": {"rgb": {"name": "s3d", "weights": "random:0", "frames": 8, "size": 32}},
            "two": {"rgb": {"name": "r3d_18", "weights": "random:0", "frames": 8, "size": 32}},
        },
        "store": {"clips_per_shard": 4},
        "decode": {"workers": 1},
        "batch_size": 2,
        "precision": "float32",
        "memory_format": "channels_last",
        **changes,
    }
    return config.build(ExtractRecipe, tree, "test")


WITH_BOXES = {
    "one": {
        "rgb": {"name": "s3d", "weights": "random:0", "frames": 8, "size": 32},
        "boxes": {"name": "boxes", "frames": 4},
    }
}


class Slow:
    """Networks that compute a batch when they are told to."""

    def __init__(self, batches: int) -> None:
        self.go = [threading.Event() for _ in range(batches)]
        self.begun = [threading.Event() for _ in range(batches)]
        self.threads: list[int] = []

    def serve(self, passes: int) -> None:
        self.passes = passes

    def compute(self, number: int) -> Computed:
        self.threads.append(torch.get_num_threads())
        self.begun[number].set()
        assert self.go[number].wait(PATIENCE_S)
        if number == 3:
            raise OSError("a worker broke")
        return Computed(number)  # type: ignore[arg-type]


def test_batches_run_beside_one_another_on_one_thread_each_and_come_back_in_order() -> None:
    slow = Slow(3)
    with ForwardWorkers(slow, 2) as workers:  # type: ignore[arg-type]
        assert workers.idle == 1
        for number in range(3):
            assert not workers.full
            workers.put(number)  # type: ignore[arg-type]
        assert workers.full
        assert all(slow.begun[n].wait(PATIENCE_S) for n in (0, 1))
        slow.go[1].set()  # the second is done first
        assert slow.begun[2].wait(PATIENCE_S)
        assert workers.idle == 0
        slow.go[0].set()
        slow.go[2].set()
        numbers: list[Any] = [workers.take().batch for _ in range(3)]
        assert numbers == [0, 1, 2]
    assert slow.threads == [1, 1, 1]
    assert slow.passes == 2


def test_an_error_in_a_worker_arrives_and_what_was_not_begun_is_dropped() -> None:
    slow = Slow(5)
    with ForwardWorkers(slow, 1) as workers:  # type: ignore[arg-type]
        for number in (3, 4):
            workers.put(number)  # type: ignore[arg-type]
            slow.go[number].set()
        with pytest.raises(OSError, match="a worker broke"):
            workers.take()
    assert len(slow.threads) <= 2


@pytest.mark.parametrize(("clip_gb", "wanted"), [(0.1, 4), (0.5, 2), (9.0, 1)])
def test_there_are_as_many_workers_as_cpus_and_memory_allow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clip_gb: float, wanted: int
) -> None:
    """Batches of two clips; the network with the largest memory use counts."""
    networks = Networks(make_recipe(tmp_path, memory_gb=2.5, sets=WITH_BOXES))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(jobs, "cpu_count", lambda: 4)
    for network, gb in zip(networks.all.values(), (clip_gb, 1e-9), strict=True):
        network.use(ComputeConfig(batch_size=2))
        monkeypatch.setattr(network, "clip_bytes", lambda _, gb=gb: int(gb * 1e9))
    assert worker_count(networks) == wanted


def test_memory_is_that_of_a_whole_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    networks = Networks(make_recipe(tmp_path, memory_gb=0.02, sets=WITH_BOXES))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(jobs, "cpu_count", lambda: 4)
    assert worker_count(networks) == 4
    for network in networks.all.values():
        network.use(ComputeConfig(batch_size=64))
    assert worker_count(networks) == 1


@pytest.mark.slow
def test_the_number_of_workers_does_not_change_a_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = ["clip_id,video,start,stop,verb,split"]
    for number in range(3):
        write_video(tmp_path / f"v{number}.mp4", sound=False)
        rows += [f"c{number}{i},v{number}.mp4,{i / 2},{i / 2 + 1},x,train" for i in range(3)]
    (tmp_path / "m.csv").write_text("\n".join(rows) + "\n")
    found = []
    for count in (1, 3):
        monkeypatch.setattr(pipeline, "worker_count", lambda _, count=count: count)
        out = tmp_path / f"out{count}"
        report = extract(make_recipe(tmp_path, out=str(out)))
        assert report.facts()["lanes"] == count
        shards = [p for name in ("one", "two") for p in (out / name).glob("rgb/tokens/c/*/*")]
        found.append({p.relative_to(out): p.read_bytes() for p in shards})
    assert len(found[0]) == 6
    assert found[0] == found[1]
