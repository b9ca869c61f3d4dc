"""``karmma plan`` against data sets whose faults and costs are known."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from support.media_files import Maker

from karmma_pipeline import config
from karmma_pipeline.cli import main
from karmma_pipeline.extraction.estimate import cost
from karmma_pipeline.extraction.estimate.report import Estimate, estimate
from karmma_pipeline.extraction.pipeline import extract
from karmma_pipeline.extraction.recipe import ExtractRecipe
from karmma_pipeline.modalities import Reason
from karmma_pipeline.store import FeatureStore

SETS = {
    "one": {
        "rgb": {"name": "s3d", "weights": "random:0", "frames": 8, "size": 32},
        "audio": {"name": "resnet18", "weights": "random:0", "image": [32, 32]},
    }
}
QUICK = {"decode": {"workers": 1}, "precision": "float32", "layout": "contiguous"}
"""An extraction that tries no other way of computing."""

HEADER = "clip_id,video,start,stop,verb,split\n"


def recipe_of(folder: Path, rows: str, **changes: Any) -> ExtractRecipe:
    (folder / "m.csv").write_text(HEADER + rows)
    tree = {"manifest": str(folder / "m.csv"), "out": str(folder / "out"), "sets": SETS, **changes}
    return config.build(ExtractRecipe, tree, "test")


def plan_of(folder: Path, rows: str, *, probe: bool = True, **changes: Any) -> Estimate:
    return estimate(recipe_of(folder, rows, **changes), probe=probe, calibrate=False)


def test_clips_files_and_faults_are_counted(make_video: Maker, tmp_path: Path) -> None:
    make_video("v.mp4")  # two seconds
    make_video("mute.mp4", sound=False)
    (tmp_path / "empty.mp4").touch()
    rows = (
        "a,v.mp4,0,1.5,x,train\nb,v.mp4,1,2.4,x,train\nc,v.mp4,9,10,x,train\n"
        "d,mute.mp4,,,x,val\ne,gone.mp4,0,1,x,val\nf,empty.mp4,0,1,x,val\n"
    )
    plan = plan_of(tmp_path, rows, max_failures=0.5)
    found = plan.survey
    assert found.splits == {"train": 3, "val": 3}
    assert {state: [p.name for p in paths] for state, paths in found.states.items()} == {
        "missing": ["gone.mp4"],
        "empty": ["empty.mp4"],
    }
    assert (found.starts_after_video_end, found.ends_after_video_end, found.lost) == (
        ["c"],
        ["b"],
        3,
    )
    assert found.present["rgb"].tolist() == [True, True, False, True, False, False]
    assert found.present["audio"].tolist() == [True, True, False, False, False, False]
    assert found.no_stream == {"audio": 1}
    hours = (1.5 + 1 + 0 + 2 + 1 + 1) / 3600  # b is cut at its file's end, d is a whole file
    assert found.hours == pytest.approx(hours, abs=0.2 / 3600)
    assert not plan.too_many_lost
    assert plan_of(tmp_path, rows, max_failures=0.49).too_many_lost


def test_clips_shorter_than_the_window_are_counted(make_video: Maker, tmp_path: Path) -> None:
    make_video("v.mp4")
    rows = "a,v.mp4,0,0.2,x,\nb,v.mp4,0,0.6,x,\nc,v.mp4,0,1,x,\n"
    (window,) = plan_of(tmp_path, rows).survey.windows  # 8 frames at the file's 25 Hz: 0.32 s
    assert (window.modality, window.frames, window.short, window.of) == ("rgb", 8, 1, 3)
    sampling = {"mode": "fps", "fps": 10}  # 0.8 s, whatever the file has
    (window,) = plan_of(tmp_path, rows, probe=False, sampling=sampling).survey.windows
    assert (window.seconds, window.short, window.of) == (0.8, 2, 3)


def test_duplicates_and_overlaps_between_splits_are_found(tmp_path: Path) -> None:
    rows = (
        "a,v.mp4,0,2,x,train\nb,v.mp4,0,2,y,train\nc,v.mp4,1.9,3,x,val\nd,v.mp4,3,4,x,train\n"
        "e,w.mp4,0,9,x,train\nf,w.mp4,2,3,x,train\ng,w.mp4,8,9,x,val\nh,u.mp4,0,9,x,val\n"
    )
    found = plan_of(tmp_path, rows, probe=False).survey
    assert found.duplicates == [("a", "b")]
    assert [Path(video).name for video in found.shared_videos] == ["v.mp4", "w.mp4"]
    assert found.split_leaks == [("a", "c"), ("e", "g")]  # e reaches over f to g


def test_the_disk_that_is_planned_is_what_an_extraction_takes(
    make_video: Maker, tmp_path: Path
) -> None:
    make_video("v.mp4")
    make_video("mute.mp4", sound=False)
    rows = "".join(f"c{i},{'v' if i % 2 else 'mute'}.mp4,0,1,x,\n" for i in range(5))
    recipe = recipe_of(tmp_path, rows, store={"clips_per_shard": 2}, batch_size=2, **QUICK)
    plan = estimate(recipe, calibrate=False)
    assert not recipe.out.exists()
    extract(recipe)
    for modality, size in plan.disk.tokens["one"].items():
        files = list((recipe.out / "one" / modality / "tokens/c").rglob("0"))
        assert sum(path.stat().st_size for path in files if path.is_file()) == size
    assert plan.disk.shards == 3


def test_the_time_is_measured_and_nothing_stays(make_video: Maker, tmp_path: Path) -> None:
    make_video("v.mp4")
    rows = "".join(f"c{i},v.mp4,0,1,x,\n" for i in range(3))
    recipe = recipe_of(tmp_path, rows, decode={"workers": 1}, device="cpu")
    before = set(tmp_path.rglob("*"))
    plan = estimate(recipe, probe=False)
    assert plan.time.clip_s is not None
    assert plan.time.clip_s > 0
    assert plan.time.clips == 3
    assert plan.tasks == 1
    assert set(tmp_path.rglob("*")) == before


def test_array_tasks_follow_hours_and_each_has_a_shard() -> None:
    assert cost.tasks(30.0, shards=100, task_hours=4.0) == 8
    assert cost.tasks(30.0, shards=3, task_hours=4.0) == 3
    assert cost.tasks(0.1, shards=3, task_hours=4.0) == 1


def test_the_command_prints_writes_json_and_ends_with_3_if_too_much_is_lost(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, "a,gone.mp4,0,1,x,train\n")
    config.save(recipe, tmp_path / "r.yaml")
    target = tmp_path / "plan.json"
    arguments = ["plan", str(tmp_path / "r.yaml"), "--no-calibrate", "--json", str(target)]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 3
    assert "1 missing: " in result.output
    assert "lost to faults: 1 of 1 (100.0%), more than max_failures=0.05" in result.output
    assert json.loads(target.read_text())["files"]["faulty"] == {
        "missing": {str(tmp_path / "gone.mp4"): ""}
    }
    allowed = [*arguments, "--set", "max_failures=1"]
    assert CliRunner().invoke(main, allowed).exit_code == 0


def test_a_modality_that_no_clip_has_is_refused_with_the_nearest(tmp_path: Path) -> None:
    sets = {"one": {"rbg": {"name": "s3d", "weights": "random:0"}}}
    recipe = recipe_of(tmp_path, "a,v.mp4,0,1,x,train\n", sets=sets)
    config.save(recipe, tmp_path / "r.yaml")
    result = CliRunner().invoke(main, ["plan", str(tmp_path / "r.yaml")])
    assert result.exit_code == 2
    assert "sets.one.rbg: no clip has this modality; did you mean 'rgb'?" in result.output


def test_a_clip_that_stops_too_far_after_its_file_is_counted_as_extraction_will(
    make_video: Maker, tmp_path: Path
) -> None:
    make_video("v.mp4")  # two seconds
    rows = "a,v.mp4,1,2.4,x,train\nb,v.mp4,1,2.9,x,train\n"
    plan = plan_of(tmp_path, rows, max_failures=0.4)
    found = plan.survey
    assert (found.ends_after_video_end, found.beyond_tolerance, found.lost) == (["a"], ["b"], 1)
    assert found.present["rgb"].tolist() == [True, False]
    assert found.present["audio"].tolist() == [True, True]
    assert "stop more than 0.5 s after their file's end, 1: b" in plan.text(Path("r.yaml"))
    assert plan.too_many_lost
    recipe = recipe_of(tmp_path, rows, max_failures=1.0, batch_size=2, **QUICK)
    extract(recipe)
    store = FeatureStore.open(tmp_path / "out/one")
    assert (np.asarray(store.reasons) == Reason.PRESENT).tolist() == [[True, True], [False, True]]
