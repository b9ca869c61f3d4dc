"""``karmma plan`` against data sets whose faults and costs are known."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from support.media_files import Maker, write_frames, write_video

from karmma_pipeline import config
from karmma_pipeline.cli import main
from karmma_pipeline.data.manifest import Manifest
from karmma_pipeline.extraction.estimate import cost
from karmma_pipeline.extraction.estimate.report import estimate, tasks, text
from karmma_pipeline.extraction.inference import openvino_engine
from karmma_pipeline.extraction.pipeline import extract
from karmma_pipeline.extraction.progress import ExtractReport
from karmma_pipeline.extraction.recipe import ExtractRecipe
from karmma_pipeline.extraction.types import NATURAL
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

EMPTY = "an empty file: download it again (Invalid data found when processing input)"
NAME = "frame_{:010d}.jpg"
HEADER = "clip_id,video,start,stop,verb,split\n"


def recipe_of(folder: Path, rows: str, **changes: Any) -> ExtractRecipe:
    (folder / "m.csv").write_text(HEADER + rows)
    tree = {"manifest": str(folder / "m.csv"), "out": str(folder / "out"), "sets": SETS, **changes}
    return config.build(ExtractRecipe, tree, "test")


def plan_of(folder: Path, rows: str, *, probe: bool = True, **changes: Any) -> dict[str, Any]:
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
    assert plan["splits"] == {"train": 3, "val": 3}
    assert plan["files"]["faulty"] == {
        "damaged": {str(tmp_path / "empty.mp4"): EMPTY},
        "missing": {str(tmp_path / "gone.mp4"): ""},
    }
    assert plan["lost"] == {
        "out_of_range": {"c": "starts at 9.00 s, but its file ends at 2.00 s"},
        "file_missing": {"e": str(tmp_path / "gone.mp4")},
        "decode_error": {"f": f"{tmp_path / 'empty.mp4'}: {EMPTY}"},
    }
    assert (plan["clips_lost_to_faults"], plan["no_stream"]) == (3, {"audio": 1})
    assert plan["present"] == {"rgb": 3, "audio": 2}
    hours = (1.5 + 1 + 0 + 2 + 1 + 1) / 3600  # b is cut at its file's end, d is a whole file
    assert plan["hours"] == pytest.approx(hours, abs=0.2 / 3600)
    assert not plan["too_many_lost"]
    assert not plan_of(tmp_path, rows, max_failures=0.49)["too_many_lost"]  # a few clips
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("karmma_pipeline.extraction.recipe.FEW_CLIPS", 6)
        assert plan_of(tmp_path, rows, max_failures=0.49)["too_many_lost"]


def test_clips_shorter_than_the_window_are_counted(make_video: Maker, tmp_path: Path) -> None:
    make_video("v.mp4")
    rows = "a,v.mp4,0,0.2,x,\nb,v.mp4,0,0.6,x,\nc,v.mp4,0,1,x,\n"
    short = {"modality": "rgb", "frames": 8, "of": 3}
    (window,) = plan_of(tmp_path, rows)["shorter_than_window"]
    assert window == {**short, "clips": 1}  # 8 frames at the file's 25 Hz: 0.32 s
    sampling = {"mode": "fps", "fps": 10}  # 0.8 s, whatever the file has
    (window,) = plan_of(tmp_path, rows, probe=False, sampling=sampling)["shorter_than_window"]
    assert window == {**short, "clips": 2}


def test_duplicates_and_overlaps_between_splits_are_found(tmp_path: Path) -> None:
    rows = (
        "a,v.mp4,0,2,x,train\nb,v.mp4,0,2,y,train\nc,v.mp4,1.9,3,x,val\nd,v.mp4,3,4,x,train\n"
        "e,w.mp4,0,9,x,train\nf,w.mp4,2,3,x,train\ng,w.mp4,8,9,x,val\nh,u.mp4,0,9,x,val\n"
    )
    plan = plan_of(tmp_path, rows, probe=False)
    assert plan["same_video_and_span"] == [["a", "b"]]
    assert [Path(video).name for video in plan["videos_in_several_splits"]] == ["v.mp4", "w.mp4"]
    assert plan["overlaps_between_splits"] == [["a", "c"], ["e", "g"]]  # e reaches over f to g


def test_views_count_in_disk_and_time_and_not_among_the_clips(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = "a,v.mp4,0,2,x,train\nb,w.mp4,0,2,x,val\n"
    views, shards = {"clips": 2, "crops": 3}, {"store": {"clips_per_shard": 1}}
    report = ExtractReport({}, marks=[(1, 3600.0)])
    monkeypatch.setattr(cost, "extract", lambda recipe, manifest: report)
    monkeypatch.setattr(cost, "perf_counter", lambda: 0.0)
    for name in "vw":
        (tmp_path / f"{name}.mp4").touch()
    plain, viewed = (
        estimate(recipe_of(tmp_path, rows, device="cpu", **shards, **more), probe=False)
        for more in ({}, {"views": views})
    )
    assert viewed["found"] == ["6 views of 2 clips: 12 rows"]
    for key in ("clips", "hours", "splits", "present", "same_video_and_span"):
        assert viewed[key] == plain[key], key
    assert (plain["time"]["hours"], viewed["time"]["hours"]) == (2, 12)
    tokens = [plan["disk"]["token_bytes"]["one"]["rgb"] for plan in (plain, viewed)]
    assert tokens[1] == 6 * tokens[0]


@pytest.fixture(scope="module")
def extracted(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """A plan of many fates, and the folder of the extraction that then ran."""
    folder = tmp_path_factory.mktemp("extracted")
    write_video(folder / "v.mp4")  # two seconds
    write_video(folder / "mute.mp4", sound=False)
    write_video(folder / "cut.mp4", seconds=4.0, index_first=True, pan_px_s=9)
    data = (folder / "cut.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(data[: len(data) * 2 // 3])
    write_frames(folder / "pictures", range(2, 27))
    rows = "".join(f"c{i},{'v' if i % 2 else 'mute'}.mp4,,,0,1,x,\n" for i in range(4))
    rows += "in,v.mp4,,,1,2.4,x,\nfar,v.mp4,,,1,2.9,x,\nlate,v.mp4,,,9,10,x,\n"
    rows += "before,cut.mp4,,,0,0.5,x,\nafter,cut.mp4,,,3.5,3.9,x,\nnone,gone.mp4,,,0,1,x,\n"
    rows += "shown,,pictures,25,0,1,x,\nover,,pictures,25,0,3,x,\n"
    (folder / "m.csv").write_text("clip_id,video,frames,fps,start,stop,verb,split\n" + rows)
    pictures = {"kind": "csv", "path": str(folder / "m.csv"), "pictures": {"frame_name": NAME}}
    tree = {"dataset": pictures, "out": str(folder / "out"), "sets": SETS, "max_failures": 1.0}
    tree |= {"store": {"clips_per_shard": 5}, "batch_size": 4, **QUICK}
    recipe = config.build(ExtractRecipe, tree, "test")
    plan = estimate(recipe, calibrate=False)
    assert not recipe.out.exists()
    extract(recipe)
    return plan, recipe.out / "one"


def test_what_is_planned_to_be_there_is_there(extracted: tuple[dict[str, Any], Path]) -> None:
    plan, folder = extracted
    store = FeatureStore.open(folder)
    there = np.asarray(store.reasons) == Reason.PRESENT
    names = dict(zip(store.clip_ids.astype(str).tolist(), there.tolist(), strict=True))
    assert names["far"] == [False, True]  # sound is padded
    assert names["before"] == [True, True]  # of a file that is cut after it
    assert names["shown"] == [True, False]
    assert plan["present"] == dict(zip(("rgb", "audio"), there.sum(axis=0).tolist(), strict=True))
    with (folder.parent / "failures.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if Reason[row["reason"].upper()] not in NATURAL]
    lost = {label: [*clips] for label, clips in plan["lost"].items()}
    assert lost == {"out_of_range": ["far", "late", "after", "over"], "file_missing": ["none"]}
    assert {(row["reason"], row["clip_id"], row["detail"]) for row in rows} >= {
        (label, *said) for label, clips in plan["lost"].items() for said in clips.items()
    }
    assert {state: list(paths) for state, paths in plan["files"]["faulty"].items()} == {
        "missing": [str(folder.parent.parent / "gone.mp4")],
        "truncated": [str(folder.parent.parent / "cut.mp4")],
    }
    natural = [*map(int, NATURAL)]
    told = text(plan, config.load(ExtractRecipe, folder.parent / "recipe.yaml"), Path("r.yaml"))
    looked = f"decoded: {plan['decoded']} of 12 ({plan['decoded'] / 12:.1%}); damage inside "
    assert looked + "the other files is only found during extraction" in told
    lost = (~np.isin(np.asarray(store.reasons), natural)).any(axis=1).sum()
    assert plan["clips_lost_to_faults"] == lost == 5


def test_the_disk_that_is_planned_is_what_an_extraction_takes(
    extracted: tuple[dict[str, Any], Path],
) -> None:
    plan, folder = extracted
    for modality, size in plan["disk"]["token_bytes"]["one"].items():
        files = [f for f in (folder / modality / "tokens/c").rglob("0") if f.is_file()]
        assert sum(path.stat().st_size for path in files) == size
    assert plan["disk"]["shards"] == 3


@pytest.mark.slow
def test_the_time_is_measured_and_nothing_stays(make_video: Maker, tmp_path: Path) -> None:
    make_video("v.mp4")
    data = bytearray(write_video(tmp_path / "noise.mp4", pan_px_s=40, sound=False).read_bytes())
    middle = len(data) // 2
    data[middle : middle + 4000] = np.random.default_rng(0).bytes(4000)
    (tmp_path / "noise.mp4").write_bytes(data)
    rows = "".join(f"c{i},v.mp4,0,1,x,\n" for i in range(3)) + "c3,noise.mp4,1.2,1.9,x,\n"
    recipe = recipe_of(tmp_path, rows, decode={"workers": 1}, device="cpu")
    before = set(tmp_path.rglob("*"))
    plan = estimate(recipe, probe=False)
    assert plan["time"]["seconds_per_clip"] > 0
    assert plan["time"]["measured_on_clips"] == 4
    assert plan["decoded"] == 4
    assert {label: [*clips] for label, clips in plan["lost"].items()} == {"decode_error": ["c3"]}
    assert "noise.mp4: frame " in plan["lost"]["decode_error"]["c3"]
    assert plan["present"] == {"rgb": 3, "audio": 3}
    assert plan["time"]["array_tasks"] == 1
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("marks", "clip_s", "said"),
    [
        ([(1, 10.0), (2, 60.0), (4, 120.0), (6, 180.0)], 30.0, "about 2 min"),  # 2 workers
        ([(6, 1200.0)], 200.0, "at most 17 min"),  # one batch: with all that happens only once
    ],
)
def test_the_time_is_that_of_a_stream_at_work(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    marks: list[tuple[int, float]],
    clip_s: float,
    said: str,
) -> None:
    seen: list[Any] = []

    def stand_in(recipe: ExtractRecipe, manifest: Manifest) -> ExtractReport:
        seen.append((recipe.out.parent, recipe.max_failures, len(manifest.clips)))
        recipe.out.mkdir()
        rows = "c1,rgb,decode_error,v.mp4: frame 3 is damaged\nc1,audio,no_stream,v.mp4: no sound\n"
        (recipe.out / "failures.csv").write_text("clip_id,modality,reason,detail\n" + rows)
        return ExtractReport({}, marks=marks)

    monkeypatch.setattr(cost, "extract", stand_in)
    monkeypatch.setattr(cost, "max_workers", lambda device: 2)
    monkeypatch.setattr(cost, "perf_counter", lambda: 0.0)
    (tmp_path / "v.mp4").touch()
    rows = "".join(f"c{i},v.mp4,{i},{i + 1},x,\n" for i in range(6))
    recipe = recipe_of(tmp_path, rows, device="cpu")
    plan = estimate(recipe, probe=False)
    assert plan["time"]["seconds_per_clip"] == clip_s
    # What the few clips that were extracted have shown counts like what files say.
    assert plan["lost"] == {"decode_error": {"c1": "v.mp4: frame 3 is damaged"}}
    assert (plan["present"], plan["no_stream"]) == ({"rgb": 5, "audio": 5}, {"audio": 1})
    assert plan["time"]["hours"] == pytest.approx(5 * clip_s / 3600)
    told = text(plan, recipe, Path("r.yaml"))
    assert "that were decoded" not in told  # all were
    assert "clips lost to decode_error (1): c1 (v.mp4: frame 3 is damaged)" in told
    assert f"{said} on one cpu of this machine" in told
    ((folder, failures, clips),) = seen
    assert (folder.exists(), failures, clips) == (False, 1.0, 6)


def test_array_tasks_follow_hours_and_each_has_a_shard() -> None:
    assert tasks(30.0, shards=100, task_hours=4.0) == 8
    assert tasks(30.0, shards=3, task_hours=4.0) == 3
    assert tasks(0.1, shards=3, task_hours=4.0) == 1


def test_the_command_prints_writes_json_and_ends_with_3_if_too_much_is_lost(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, "a,gone.mp4,0,1,x,train\n")
    config.save(recipe, tmp_path / "r.yaml")
    target = tmp_path / "plan.json"
    arguments = ["plan", str(tmp_path / "r.yaml"), "--no-calibrate", "--json", str(target)]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 3
    assert "missing files (1): " in result.output
    assert "1 of 1 clip will lose a modality" in result.output
    assert "more than max_failures=0.05 allows" in result.output
    assert json.loads(target.read_text())["files"]["faulty"] == {
        "missing": {str(tmp_path / "gone.mp4"): ""}
    }
    allowed = ["--set", "max_failures=1"]
    planned = CliRunner().invoke(main, [*arguments, *allowed])
    refused = CliRunner().invoke(main, ["extract", str(tmp_path / "r.yaml"), *allowed])
    assert planned.exit_code == refused.exit_code == 1
    assert planned.output.splitlines()[-1] == refused.output.splitlines()[-1]
    recipe_of(tmp_path, "a,gone.mp4,0,1,x,train\nb,v.mp4,0,1,x,train\n")
    (tmp_path / "v.mp4").touch()
    assert CliRunner().invoke(main, [*arguments, *allowed, "--no-probe"]).exit_code == 0


@pytest.mark.parametrize(
    "change", [{"weights": "gone.pt"}, {"weights": "random:0", "engine": "openvino"}]
)
def test_what_ends_an_extraction_at_its_start_ends_a_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    monkeypatch.setattr(openvino_engine, "is_installed", lambda: False)
    (tmp_path / "v.mp4").touch()
    sets = {"one": {"rgb": {"name": "s3d", **change}}}
    config.save(recipe_of(tmp_path, "a,v.mp4,0,1,x,\n", sets=sets), tmp_path / "r.yaml")
    ends = [
        CliRunner().invoke(main, [*command, str(tmp_path / "r.yaml")])
        for command in (["plan", "--no-probe"], ["extract"])
    ]
    assert ends[0].exit_code == 1
    assert ends[1].exit_code in {1, 2}
    assert ends[0].output.splitlines()[-1] == ends[1].output.splitlines()[-1]


def test_a_device_that_is_not_here_ends_no_plan(tmp_path: Path) -> None:
    (tmp_path / "v.mp4").touch()
    recipe = recipe_of(tmp_path, "a,v.mp4,0,1,x,\n", device="cuda:77")
    plan = estimate(recipe, probe=False)
    assert plan["problem"] == ""
    assert "unknown: device='cuda:77': not available here" in text(plan, recipe, Path("r.yaml"))


def test_a_list_without_a_single_file_is_one_sentence_and_no_store(tmp_path: Path) -> None:
    rows = "".join(f"c{i},v{i}.mp4,0,1,{i % 9},train\n" for i in range(5_000))
    recipe = recipe_of(tmp_path, rows)
    config.save(recipe, tmp_path / "r.yaml")
    result = CliRunner().invoke(main, ["extract", str(tmp_path / "r.yaml")])
    said = "none of the 5,000 files of 5,000 clips exists, such as "
    assert f"{said}{tmp_path / 'v0.mp4'}; check the paths" in result.output
    assert result.exit_code == 1
    assert not recipe.out.exists()


def test_a_modality_that_no_clip_has_is_refused_with_the_nearest(tmp_path: Path) -> None:
    sets = {"one": {"rbg": {"name": "s3d", "weights": "random:0"}}}
    recipe = recipe_of(tmp_path, "a,v.mp4,0,1,x,train\n", sets=sets)
    config.save(recipe, tmp_path / "r.yaml")
    result = CliRunner().invoke(main, ["plan", str(tmp_path / "r.yaml")])
    assert result.exit_code == 2
    assert "sets.one.rbg: no clip has this modality; did you mean 'rgb'?" in result.output
