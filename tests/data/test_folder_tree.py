import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from support.epic import touch

from karmma_pipeline import files
from karmma_pipeline.cli import main
from karmma_pipeline.data.datasets import read_dataset
from karmma_pipeline.data.datasets.folder_tree import FolderTree
from karmma_pipeline.data.manifest import Manifest
from karmma_pipeline.data.sources import FileSource
from karmma_pipeline.errors import ManifestError


def read(root: Path, **changes: Any) -> Manifest:
    return read_dataset(FolderTree(kind="folder_tree", root=root, **changes))


def test_a_class_per_folder_below_split_folders(tmp_path: Path) -> None:
    touch(tmp_path, "train/jump/a.mp4", "train/jump/notes.txt", "validation/run/b.AVI", "test/")
    manifest = read(tmp_path, head="verb")
    assert manifest.heads == {"verb": ("jump", "run")}
    rows = [(c.clip_id, c.labels["verb"], c.split) for c in manifest.clips]
    assert rows == [("train.jump.a", 0, "train"), ("validation.run.b", 1, "val")]
    assert manifest.clips[0].media["audio"] == FileSource(tmp_path / "train/jump/a.mp4")


def test_a_drawn_split_stays_when_videos_are_added_and_follows_its_shares(tmp_path: Path) -> None:
    touch(tmp_path, *(f"c{i % 3}/{i:04d}.mp4" for i in range(600)))
    before = {c.clip_id: c.split for c in read(tmp_path).clips}
    share = sum(split == "val" for split in before.values()) / len(before)
    assert 0.14 < share < 0.26  # 0.2, four standard deviations wide
    touch(tmp_path, *(f"new/{i}.mp4" for i in range(50)))
    after = {c.clip_id: c.split for c in read(tmp_path).clips}
    assert before.items() <= after.items()
    other = {c.clip_id: c.split for c in read(tmp_path, seed=1).clips}
    assert any(after[i] != other[i] for i in after)


def test_names_that_are_no_ids_get_one_each(tmp_path: Path) -> None:
    names = ["a/x y.mp4", "a/x_y.mp4", "a/x/y.mp4", "a/x.y.mp4", "a/é.mp4", "a/ü.mp4", "a/x_Y.mp4"]
    touch(tmp_path, *names)
    clips = read(tmp_path).clips
    assert len({c.clip_id.casefold() for c in clips}) == len(names)
    assert {str(c.media["rgb"].path.relative_to(tmp_path)) for c in clips} == set(names)


@given(st.lists(st.text("aB .-_/é", min_size=1, max_size=150), min_size=1, max_size=3))
def test_any_path_gives_a_safe_id(parts: list[str]) -> None:
    from karmma_pipeline.data.datasets.folder_tree import _clip_id

    files.check_name(_clip_id("/".join(parts) + ".mp4", alone=True))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["train/a/x.mp4", "walk/y.mp4"], "has the split folder 'train' next to the folder 'walk'"),
        (["a/x.txt", "b.mp4"], "no videos in class folders"),
        ([], "no such folder"),
    ],
)
def test_a_tree_of_another_shape_is_refused(tmp_path: Path, names: list[str], message: str) -> None:
    touch(tmp_path / "root", *names) if names else None
    with pytest.raises(ManifestError, match=message):
        read(tmp_path / "root")


def test_every_ending_of_a_video_is_one_and_other_files_are_told(tmp_path: Path) -> None:
    endings = ["mp4", "MOV", "wmv", "flv", "mts", "m2ts", "vob", "TS", "ogv", "mpg", "3gp", "webm"]
    touch(tmp_path, *(f"a/{number}.{ending}" for number, ending in enumerate(endings)))
    touch(tmp_path, "a/readme.txt", "a/notes.txt", "b/only.txt", "b/.hidden", "c/")
    manifest = read_dataset(FolderTree(kind="folder_tree", root=tmp_path))
    assert len(manifest.clips) == len(endings)
    assert manifest.heads == {"action": ("a",)}
    said = "\n".join(manifest.notes)
    assert "folders without videos, ignored: b, c" in said
    assert "files with the extension .txt are ignored: 3 (such as a/notes.txt)" in said


def test_a_recipe_that_names_a_data_set_is_planned(tmp_path: Path) -> None:
    touch(tmp_path / "videos", "a/1.mp4", "b/2.mp4")
    dataset = {"kind": "folder_tree", "root": str(tmp_path / "videos")}
    sets = {"one": {"rgb": {"name": "s3d", "weights": "random:0"}}}
    recipe = {"dataset": dataset, "out": str(tmp_path / "out"), "sets": sets}
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))
    arguments = ["plan", str(tmp_path / "r.yaml"), "--no-probe", "--no-calibrate"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0
    assert "heads      action: 2 classes (a, b)" in result.output
