"""Extraction end to end on small files: presence, reasons, kills, parts."""

import csv
import signal
import threading
from collections.abc import Sequence
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from support.forks import in_fork
from support.media_files import Maker, write_video
from support.misbehave import misbehave
from support.nth_call import kill_at_call
from support.patience import PATIENCE_S, wait_for

from karmma_pipeline import config
from karmma_pipeline.data.manifest import Clip
from karmma_pipeline.data.sources import FileSource
from karmma_pipeline.errors import StoppedError, StoreError, TooManyFailuresError
from karmma_pipeline.extraction.decode import pool
from karmma_pipeline.extraction.decode.pool import DecodePool
from karmma_pipeline.extraction.pipeline import extract
from karmma_pipeline.extraction.recipe import ExtractRecipe
from karmma_pipeline.extraction.types import BatchPlan, DecodeSettings
from karmma_pipeline.jobs import Part, StopFlag
from karmma_pipeline.modalities import Reason
from karmma_pipeline.models.backbones import Backbone
from karmma_pipeline.store import FeatureStore, verify

TINY: dict[str, Any] = {
    "sampling": {"mode": "uniform"},
    # vggish: librosa, for the others, takes seconds to load in each process
    "audio": {"front_end": "vggish", "n_fft": 512, "win_length": 400, "mels": 32},
    "sets": {
        "teacher": {
            "rgb": {"name": "s3d", "weights": "random:0", "frames": 8, "size": 32},
            "flow": {"name": "s3d", "weights": "random:1", "frames": 8, "size": 32},
            "audio": {"name": "resnet18", "weights": "random:2", "image": [32, 32]},
        },
        "student": {
            "rgb": {"name": "s3d", "weights": "random:0", "frames": 8, "size": 32},
            "audio": {"name": "resnet18", "weights": "random:3", "image": [32, 32]},
        },
    },
    "store": {"clips_per_shard": 4},
    "decode": {"workers": 1},
    "batch_size": 2,
    "precision": "float32",
    "layout": "contiguous",
}

ONLY_RGB = {"teacher": {"rgb": TINY["sets"]["teacher"]["rgb"]}}


def make_recipe(folder: Path, out: str = "out", **changes: Any) -> ExtractRecipe:
    tree = {**TINY, "manifest": str(folder / "m.csv"), "out": str(folder / out), **changes}
    return config.build(ExtractRecipe, tree, "test")


def write_rows(folder: Path, rows: list[str]) -> None:
    text = "clip_id,video,start,stop,verb,split\n" + "\n".join(rows) + "\n"
    (folder / "m.csv").write_text(text)


def tree(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_every_fault_costs_its_clip_and_is_named(make_video: Maker, tmp_path: Path) -> None:
    make_video("fine.mp4")
    make_video("mute.mp4", sound=False)
    make_video("radio.mp4", video=False)
    (tmp_path / "page.mp4").write_text("<html>")
    write_rows(
        tmp_path,
        [
            "a,fine.mp4,0,1,x,train",
            "b,mute.mp4,0,1,x,train",
            "c,radio.mp4,0,1,y,train",
            "d,page.mp4,0,1,y,val",
            "e,gone.mp4,0,1,y,val",
            "f,fine.mp4,1,,y,val",
            "g,fine.mp4,50,51,y,val",
        ],
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("karmma_pipeline.extraction.recipe.FEW_CLIPS", 0)
        with pytest.raises(TooManyFailuresError, match=r"failures\.csv: 3 of 7 clips"):
            extract(make_recipe(tmp_path))
    store = FeatureStore.open(tmp_path / "out/teacher")
    assert store.modalities == ("rgb", "flow", "audio")
    names = [[Reason(r).name.lower() for r in row] for row in store.reasons]
    assert names == [
        ["present"] * 3,
        ["present", "present", "no_stream"],
        ["no_stream", "no_stream", "present"],
        ["decode_error"] * 3,
        ["file_missing"] * 3,
        ["present"] * 3,
        ["out_of_range"] * 3,
    ]
    with (tmp_path / "out/failures.csv").open() as file:
        table = list(csv.DictReader(file))
    assert {(r["clip_id"], r["reason"]) for r in table if r["modality"] == "audio"} == {
        ("b", "no_stream"),
        ("d", "decode_error"),
        ("e", "file_missing"),
        ("g", "out_of_range"),
    }
    assert all(row["hint"] for row in table)
    with (tmp_path / "out/media.csv").open() as file:
        media = {row["clip_id"]: row for row in csv.DictReader(file)}
    assert list(media) == list("abcdefg")
    assert {i for i, row in media.items() if row["audio_rate_hz"]} == {"a", "c", "f"}
    assert media["a"]["rgb_decoder"] == "pyav"
    assert media["d"]["rgb_decoder"] == ""
    report = extract(make_recipe(tmp_path, max_failures=0.5))  # nothing is done again
    assert report.clips == 0
    assert report.complete
    assert verify(tmp_path / "out/student") == []
    times = store.times("rgb")
    np.testing.assert_allclose(times[0, 0], (np.arange(8) + 0.5) / 8)
    np.testing.assert_allclose(times[5, 0], 1 + (np.arange(8) + 0.5) / 8, atol=0.02)
    assert (np.abs(times[[0, 5], 0] - times[[0, 5], 1]) < 1 / 25 + 1e-3).all()


@pytest.mark.slow
def test_one_decode_serves_all_sets_and_equal_networks_give_equal_tokens(
    make_video: Maker, tmp_path: Path
) -> None:
    make_video("fine.mp4")
    write_rows(tmp_path, ["a,fine.mp4,0,1,x,train"])
    assert len(DecodeSettings.of(make_recipe(tmp_path)).inputs) == 3
    extract(make_recipe(tmp_path))
    one, other = (FeatureStore.open(tmp_path / "out" / n) for n in ("teacher", "student"))
    index = torch.tensor([0])
    assert torch.equal(one.gather("rgb", index), other.gather("rgb", index))
    assert not torch.equal(one.gather("audio", index), other.gather("audio", index))


@pytest.mark.slow
def test_another_recipe_in_the_same_folder_is_refused_by_name(
    make_video: Maker, tmp_path: Path
) -> None:
    make_video("fine.mp4")
    write_rows(tmp_path, ["a,fine.mp4,0,1,x,train"])
    extract(make_recipe(tmp_path, sets=ONLY_RGB))
    with pytest.raises(StoreError, match=r"rgb\.provenance\.sampling\.mode was 'uniform', now"):
        extract(make_recipe(tmp_path, sets=ONLY_RGB, sampling={"mode": "fps"}))


def many_clips(folder: Path, count: int = 8) -> None:
    for number in range(count // 2):
        write_video(folder / f"v{number}.mp4", sound=number != 1)
    rows = [f"c{i},v{i // 2}.mp4,{i % 2},{i % 2 + 1},x,train" for i in range(count)]
    write_rows(folder, rows)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set and the stores of an extraction that nothing disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    many_clips(folder)
    extract(make_recipe(folder))
    return folder


def check_same_stores(found: Path, undisturbed: Path) -> None:
    for name in ("teacher", "student"):
        ours = {k: v for k, v in tree(found / name).items() if ".tmp" not in k}
        assert ours == tree(undisturbed / "out" / name)
    assert (found / "media.csv").read_text() == (undisturbed / "out/media.csv").read_text()


@pytest.mark.slow
def test_killed_and_stopped_parts_in_any_order_make_the_same_store(
    undisturbed: Path, tmp_path: Path
) -> None:
    recipe = make_recipe(undisturbed, out=str(tmp_path))
    stop = StopFlag()
    stop.request()
    with pytest.raises(StoppedError, match="run the same command again"):
        extract(recipe, Part(1, 2), stop)

    def killed() -> None:
        kill_at_call(tmp_path, 6, "write */journal")  # the sixth clip of two stores
        extract(recipe, Part(0, 2))

    assert in_fork(killed) == -signal.SIGKILL
    for index in (1, 0):
        assert extract(recipe, Part(index, 2)).complete == (index == 0)
    check_same_stores(tmp_path, undisturbed)


def plans_of(*batches: Sequence[Clip]) -> list[BatchPlan]:
    return [BatchPlan(0, clips, ["teacher"], last=False) for clips in batches]


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DecodeSettings:
    monkeypatch.setattr(pool, "decode_clips", misbehave)
    monkeypatch.setattr(pool, "_START_S", PATIENCE_S)
    write_rows(tmp_path, ["a,x.mp4,0,1,x,train"])
    return DecodeSettings.of(make_recipe(tmp_path, sets=ONLY_RGB))


def clips_named(folder: Path, *names: str) -> list[Clip]:
    return [Clip(name, {"rgb": FileSource(folder / "x.mp4")}, 0, 1, {}) for name in names]


@pytest.mark.slow
def test_a_decoder_that_misbehaves_costs_only_its_clip(
    settings: DecodeSettings, tmp_path: Path
) -> None:
    names = ["a", "hang", "b", "die", "c", "memory", "d", "raise", "e", "grow", "loop", "f"]
    clips = clips_named(tmp_path, *names)
    with DecodePool(settings, 1, 2.0, StopFlag(), memory_gb=0.6, ahead=8, stall_s=1.0) as workers:
        batches = list(workers.batches(plans_of(clips[:4], clips[4:8], clips[8:])))
    found = {d.clip_id: set(d.reasons.values()) for _, batch in batches for d in batch}
    assert list(found) == names
    assert found["hang"] == {Reason.TIMEOUT}
    assert found["die"] == {Reason.CRASHED}
    assert found["memory"] == {Reason.OUT_OF_MEMORY}
    assert found["raise"] == {Reason.DECODE_ERROR}
    assert found["grow"] == {Reason.OUT_OF_MEMORY}
    assert found["loop"] == {Reason.TIMEOUT}
    details = {d.clip_id: set(d.details.values()) for _, batch in batches for d in batch}
    assert details["hang"] == {"its decode process stalled for 1 s"}
    assert details["loop"] == {"a clip took more than 2 s of CPU time"}
    assert details["grow"] == {"its decode process used more than 0.6 GB"}
    (died,), (raised,) = details["die"], details["raise"]
    assert died.startswith("its decode process ")
    assert "Error: " in raised
    assert not any(found[name] for name in "abcdef")


@pytest.mark.slow
def test_what_one_decoder_dies_of_costs_nothing_that_another_reads(
    settings: DecodeSettings, tmp_path: Path
) -> None:
    settings = DecodeSettings.of(make_recipe(tmp_path))
    media = dict.fromkeys(("rgb", "flow", "audio"), FileSource(tmp_path / "x.mp4"))
    clips = [Clip(name, media, 0, 1, {}) for name in ("a", "picture_die", "b")]
    with DecodePool(settings, 1, PATIENCE_S, StopFlag()) as workers:
        found = [d for _, batch in workers.batches(plans_of(clips)) for d in batch]
    assert [d.clip_id for d in found] == ["a", "picture_die", "b"]
    lost = {spec.modality: reason for spec, reason in found[1].reasons.items()}
    assert lost == dict.fromkeys(("rgb", "flow"), Reason.CRASHED)
    assert not found[0].reasons
    assert not found[2].reasons
    tries = {p.name.split(".")[2] for p in tmp_path.glob("picture_die.*")}
    assert tries == {"rgb+flow+audio", "rgb+flow", "audio"}


@pytest.mark.slow
def test_signals_to_decoders_and_their_death_between_tasks_cost_nothing(
    settings: DecodeSettings, tmp_path: Path
) -> None:
    me = psutil.Process()
    with DecodePool(settings, 1, timeout_s=PATIENCE_S, stop=StopFlag()) as workers:

        def until_idle() -> None:
            assert not wait(set(workers._open), PATIENCE_S).not_done

        batches = workers.batches(plans_of(*(clips_named(tmp_path, name) for name in "abcdefgh")))
        found = [next(batches)]
        until_idle()
        (process,) = (c for c in me.children() if "--multiprocessing-fork" in c.cmdline())
        process.send_signal(signal.SIGTERM)
        found.append(next(batches))
        until_idle()
        assert process.is_running()  # it has decoded another clip since
        assert process.status() != psutil.STATUS_ZOMBIE
        process.kill()
        wait_for(lambda: not workers._pool.active)
        found += batches
    assert [d.clip_id for _, batch in found for d in batch] == list("abcdefgh")
    assert not any(d.reasons for _, batch in found for d in batch)


@pytest.mark.slow
def test_a_stop_does_not_wait_for_a_decoder_that_hangs(
    settings: DecodeSettings, tmp_path: Path
) -> None:
    stop = StopFlag()

    def stop_when_it_hangs() -> None:
        wait_for(lambda: list(tmp_path.glob("hangs.*")))
        stop.request()

    threading.Thread(target=stop_when_it_hangs).start()
    with (
        DecodePool(settings, 1, timeout_s=1e6, stop=stop) as workers,
        pytest.raises(StoppedError, match="run the same command again"),
    ):
        list(workers.batches(plans_of(clips_named(tmp_path, "hang"))))


@pytest.mark.slow
def test_sets_that_choose_the_same_network_run_it_once(
    tmp_path: Path, make_video: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_video("x.mp4")
    write_rows(tmp_path, ["a,x.mp4,0,1,x,train", "b,x.mp4,1,2,x,val"])
    recipe = make_recipe(tmp_path)
    same = recipe.sets["teacher"]["rgb"]
    recipe = recipe.model_copy(update={"sets": {"one": {"rgb": same}, "two": {"rgb": same}}})
    runs: list[int] = []
    original = Backbone.forward

    def spy(self: Backbone, x: torch.Tensor) -> torch.Tensor:
        runs.append(len(x))
        return original(self, x)

    monkeypatch.setattr(Backbone, "forward", spy)
    extract(recipe)
    assert runs == [2]
    one, two = (FeatureStore.open(recipe.out / name) for name in ("one", "two"))
    torch.testing.assert_close(
        one.gather("rgb", torch.arange(2)), two.gather("rgb", torch.arange(2))
    )
