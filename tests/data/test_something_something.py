import json
import re
from pathlib import Path
from typing import Any

import pytest
from support.epic import complaint

from karmma_pipeline.data.datasets import read_dataset
from karmma_pipeline.data.datasets.something_something import SomethingSomething
from karmma_pipeline.data.manifest import Manifest
from karmma_pipeline.data.sources import BoxSource, FileSource, FrameSource
from karmma_pipeline.errors import ManifestError

LABELS = {"Holding something": "2", "Closing something": "0", "Putting something onto something": 1}
TRAIN = [
    {"id": "78687", "label": "holding potato", "template": "Holding [something]"},
    {"id": "9", "label": "x", "template": "Putting [something] onto [something]"},
]


def write(folder: Path, prefix: str = "something-something-v2-", **changes: Any) -> None:
    tables: dict[str, Any] = {"labels": LABELS, "train": TRAIN, "validation": [], "test": []}
    for name, table in {**tables, **changes}.items():
        (folder / f"{prefix}{name}.json").write_text(json.dumps(table))


def read(folder: Path, **changes: Any) -> Manifest:
    values = {"root": folder, "annotations": folder, "splits": ("train",), **changes}
    return read_dataset(SomethingSomething(kind="something_something_v2", **values))


@pytest.mark.parametrize("prefix", ["something-something-v2-", ""])
def test_classes_are_templates_with_their_published_ids(tmp_path: Path, prefix: str) -> None:
    write(tmp_path, prefix)
    manifest = read(tmp_path)
    names = ("Closing something", "Putting something onto something", "Holding something")
    assert manifest.heads == {"action": names}
    assert [(c.clip_id, c.labels, c.split) for c in manifest.clips] == [
        ("78687", {"action": 2}, "train"),
        ("9", {"action": 1}, "train"),
    ]
    assert all("audio" not in c.media and c.stop_s is None for c in manifest.clips)


def test_the_test_split_has_no_labels(tmp_path: Path) -> None:
    write(tmp_path, test=[{"id": "5"}])
    manifest = read(tmp_path, splits=("test",))
    assert manifest.clips[0].labels == {"action": -1}
    assert "test: 1 clip, without labels" in manifest.notes


def test_videos_come_before_frames_and_missing_ones_have_a_name(tmp_path: Path) -> None:
    write(tmp_path)
    folder = tmp_path / "20bn-something-something-v2"
    (folder / "9").mkdir(parents=True)
    first, second = read(tmp_path).clips
    assert first.media["rgb"] == FileSource(tmp_path / "78687.webm")
    assert second.media["rgb"] == FrameSource(folder / "9", ("img_{:05d}.jpg",), 12.0)
    (folder / "9.mp4").touch()
    assert read(tmp_path).clips[1].media["rgb"] == FileSource(folder / "9.mp4")
    frames = read(tmp_path, prefer="frames", frame_name="{:04d}.jpg", frame_fps=30).clips[1]
    assert frames.media["flow"] == FrameSource(folder / "9", ("{:04d}.jpg",), 30.0)


def test_other_cases_and_names_are_found(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "78687.WEBM").touch()
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos/9.mov").touch()
    first, second = read(tmp_path).clips
    assert first.media["rgb"] == FileSource(tmp_path / "78687.WEBM")
    assert second.media["rgb"] == FileSource(tmp_path / "videos/9.mov")
    frames = read(tmp_path, prefer="frames", frame_name="{video}_{:06d}.jpg").clips[1]
    assert frames.media["rgb"] == FrameSource(tmp_path / "9", ("9_{:06d}.jpg",), 12.0)


def test_boxes_point_at_their_own_bytes(tmp_path: Path) -> None:
    write(tmp_path)
    frame = {"name": "9/0001.jpg", "labels": [{"category": 'a "5": [ trap'}]}
    text = json.dumps({"8": [], "9": [frame], "78687": [frame, frame]})
    path = tmp_path / "part1.json"
    path.write_text(text)
    sources = [clip.media["boxes"] for clip in read(tmp_path, boxes=(path,)).clips]
    for source, wanted in zip(sources, ([frame, frame], [frame]), strict=True):
        assert isinstance(source, BoxSource)
        part = text[slice(*source.span)]
        assert json.JSONDecoder().raw_decode(part)[0] == wanted


def test_a_video_without_boxes_lacks_the_modality(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "b.json").write_text('{"9": []}')
    manifest = read(tmp_path, boxes=(tmp_path / "b.json",))
    assert ["boxes" in clip.media for clip in manifest.clips] == [False, True]
    assert any("boxes: 1 of 2 videos missing" in line for line in manifest.notes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"train": [{"id": "1", "template": "Eating [something]"}]},
            r"train\.json: entry 1: t",
        ),
        ({"train": [{"id": "../1", "template": ""}]}, r"entry 1: id='\.\./1'"),
        ({"train": [{"id": 1, "template": ""}]}, r"entry 1: id=1: must be a JSON string"),
        ({"train": [TRAIN[0], 7]}, r"entry 2: is not a JSON object"),
        ({"train": [TRAIN[0], TRAIN[0]]}, r"entry 2: duplicate clip_id='78687'"),
        ({"train": {}}, r"must be a JSON array"),
        ({"labels": {"a": "0", "b": "2"}}, r"the ids of the 2 templates are not 0, 1, 2"),
        ({"labels": {"a": "x"}}, r"labels\.json: 'a': the id 'x' is not a number"),
    ],
)
def test_wrong_files_are_named_with_their_entry(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    write(tmp_path, **changes)
    assert re.search(message, complaint(lambda: read(tmp_path)))


def test_text_that_is_no_json_is_named_with_line_and_column(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "something-something-v2-train.json").write_text('[\n{"id": }]')
    with pytest.raises(ManifestError, match=r"train\.json: not a JSON file \(.*line 2 column 8"):
        read(tmp_path)
    (tmp_path / "b.json").write_text("{}")
    with pytest.raises(ManifestError, match=r"b\.json: not a Something-Else annotation file"):
        read(tmp_path, boxes=(tmp_path / "b.json",))


def test_a_key_that_stands_twice_is_named(tmp_path: Path) -> None:
    write(tmp_path)
    entry = '{"id": "9", "template": "Holding [something]"}'
    twice = '{"id": "1", "id": "2", "template": "Holding [something]"}'
    (tmp_path / "something-something-v2-train.json").write_text(f"[{entry}, {twice}]")
    manifest = read(tmp_path)
    assert [clip.clip_id for clip in manifest.clips] == ["9"]
    assert manifest.left_out[0].endswith("train.json: entry 2: id appears twice")
    (tmp_path / "something-something-v2-labels.json").write_text('{"a": "0", "b": "1", "a": "1"}')
    with pytest.raises(ManifestError, match="'a' appears twice in the label list"):
        read(tmp_path)
