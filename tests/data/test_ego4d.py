"""Ego4D and Ego-Exo4D in the shape of their published JSON."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from support.epic import complaint, touch

from karmma_pipeline import config
from karmma_pipeline.data.datasets import read_dataset
from karmma_pipeline.data.datasets.ego4d import Ego4dLta
from karmma_pipeline.data.datasets.ego_exo4d import EgoExo4dKeysteps
from karmma_pipeline.data.manifest import Manifest
from karmma_pipeline.data.sources import FileSource
from karmma_pipeline.errors import ManifestError
from karmma_pipeline.extraction.recipe import ExtractRecipe, read_clips

ACTION = {
    "video_uid": "v-1",
    "clip_uid": "c-1",
    "clip_parent_start_sec": 300.0,
    "action_idx": 4,
    "action_clip_start_sec": 7.5,
    "action_clip_end_sec": 15.5,
    "verb_label": 1,
    "noun_label": 0,
}
MUTE = {**ACTION, "video_uid": "v-2", "clip_uid": "c-2"}


def write_ego4d(root: Path, *rows: Any) -> None:
    folder = root / "annotations"
    folder.mkdir(parents=True, exist_ok=True)
    taxonomy = {"verbs": ["arrange", "cut_(trim)"], "nouns": ["apple"]}
    (folder / "fho_lta_taxonomy.json").write_text(json.dumps(taxonomy))
    table = {"version": "v2", "split": "train", "clips": list(rows)}
    (folder / "fho_lta_train.json").write_text(json.dumps(table))
    videos = [
        {"video_uid": "v-1", "video_metadata": {"audio_base_denominator": 48000}},
        {"video_uid": "v-2", "video_metadata": {"audio_base_denominator": None}},
        {"video_uid": "v-3", "is_stereo": True},
    ]
    (root / "ego4d.json").write_text(json.dumps({"videos": videos}))


def ego4d(root: Path, **changes: Any) -> Manifest:
    values = {"root": root, "splits": ("train",), **changes}
    return read_dataset(Ego4dLta(kind="ego4d_fho_lta", **values))


def test_actions_lie_in_their_clip_file_or_later_in_the_whole_video(tmp_path: Path) -> None:
    write_ego4d(tmp_path, ACTION, MUTE)
    touch(tmp_path, "clips/c-1.mp4", "full_scale/v-2.mp4")
    manifest = ego4d(tmp_path)
    assert manifest.heads == {"verb": ("arrange", "cut_(trim)"), "noun": ("apple",)}
    one, two = manifest.clips
    assert (one.clip_id, one.start_s, one.stop_s, one.group) == ("c-1_4", 7.5, 15.5, "v-1")
    assert one.labels == {"verb": 1, "noun": 0}
    assert one.media["rgb"] == FileSource(tmp_path / "clips/c-1.mp4")
    assert (two.start_s, two.stop_s) == (307.5, 315.5)
    assert two.media["rgb"] == FileSource(tmp_path / "full_scale/v-2.mp4")


def test_a_video_that_was_recorded_mute_has_no_audio(tmp_path: Path) -> None:
    write_ego4d(tmp_path, ACTION, MUTE)
    assert ["audio" in clip.media for clip in ego4d(tmp_path).clips] == [True, False]


def test_of_side_by_side_stereo_the_left_half_is_taken_and_told(tmp_path: Path) -> None:
    write_ego4d(tmp_path, ACTION, {**ACTION, "video_uid": "v-3", "clip_uid": "c-3"})
    touch(tmp_path, "clips/c-1.mp4", "full_scale/v-3.mp4")
    manifest = ego4d(tmp_path)
    halves = [media.left_half for clip in manifest.clips for media in clip.media.values()
              if isinstance(media, FileSource)]  # fmt: skip
    assert halves == [False] * 3 + [True] * 3
    assert "clips in side-by-side stereo, of which the left half is used: 1" in manifest.notes


@pytest.mark.parametrize(
    ("videos", "message"),
    [
        (7, r"ego4d\.json: has no list 'videos'"),
        ([{"video_uid": "v", "is_stereo": "no"}], r"entry 1: is_stereo='no': must be a JSON true"),
    ],
)
def test_a_wrong_list_of_videos_is_named(tmp_path: Path, videos: Any, message: str) -> None:
    write_ego4d(tmp_path, ACTION)
    (tmp_path / "ego4d.json").write_text(json.dumps({"videos": videos}))
    assert re.search(message, complaint(lambda: ego4d(tmp_path)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clip_uid": "../x"}, r"fho_lta_train\.json: clips entry 1: clip_uid='\.\./x'"),
        ({"verb_label": 2}, r"verb_label=2: the taxonomy has 2 classes"),
        ({"verb_label": True}, r"verb_label=True: must be a JSON whole number"),
        ({"action_clip_end_sec": 7}, r"action_clip_end_sec=7\.0: is not after 7\.5"),
        ({"action_clip_start_sec": float("inf")}, r"action_clip_start_sec=inf"),
        ({"action_clip_start_sec": 10**400}, r"action_clip_start_sec=inf"),
        ({"action_idx": None}, r"action_idx is missing"),
    ],
)
def test_wrong_actions_are_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    write_ego4d(tmp_path, {**ACTION, **change})
    assert re.search(message, complaint(lambda: ego4d(tmp_path)))


def test_odd_entries_of_an_official_list_are_left_out_by_name_up_to_max_failures(
    tmp_path: Path,
) -> None:
    odd = [
        {**ACTION, "action_idx": 90, "action_clip_end_sec": 7.5},  # of no length
        {**ACTION, "action_idx": 91, "action_clip_start_sec": -0.02},
        {**ACTION, "action_idx": 92, "clip_uid": None},
        {**ACTION, "action_idx": 0},  # twice
        "no action",
    ]
    write_ego4d(tmp_path, *({**ACTION, "action_idx": i} for i in range(45)), *odd)
    dataset = {"kind": "ego4d_fho_lta", "root": str(tmp_path), "splits": ["train"]}
    sets = {"one": {"rgb": {"name": "s3d", "weights": "random:0"}}}
    tree = {"dataset": dataset, "out": str(tmp_path / "out"), "sets": sets}
    manifest = read_clips(config.build(ExtractRecipe, {**tree, "max_failures": 0.1}, "test"))
    assert len(manifest.clips) == 45
    said = "\n".join(manifest.notes)
    assert "invalid entries: 5 of 50; skipped:" in said
    for message in (
        "fho_lta_train.json: clips entry 46: action_clip_end_sec=7.5: is not after 7.5",
        "entry 47: action_clip_start_sec=-0.02: must be a number >= 0",
        "entry 48: clip_uid is missing",
        "entry 49: duplicate clip_id='c-1_0'",
        "entry 50: is not a JSON object: 'no action'",
    ):
        assert message in said
    with pytest.raises(ManifestError, match=r"invalid entries: 5 of 50, more than max_failures"):
        read_clips(config.build(ExtractRecipe, {**tree, "max_failures": 0.09}, "test"))


def test_one_odd_segment_costs_itself_alone(tmp_path: Path) -> None:
    write_keysteps(tmp_path, segments=[SEGMENT, {**SEGMENT, "end_time": 0.5}, SEGMENT])
    manifest = keysteps(tmp_path)
    assert [clip.clip_id for clip in manifest.clips] == ["lab_covid_07_6.0", "lab_covid_07_6.2"]
    assert len(manifest.left_out) == 1


SEGMENT = {"start_time": 0.85598, "end_time": 33.20377, "step_unique_id": 843}
WORDS = {"843": "Unbox package", "818": "Check the date", "901": "Check the date"}


def write_keysteps(root: Path, **take: Any) -> None:
    values = {"take_uid": "77", "take_name": "lab_covid_07_6", "segments": [SEGMENT], **take}
    (root / "annotations").mkdir()
    table = {"annotations": {"77": values}, "vocabulary": WORDS, "taxonomy": {}}
    (root / "annotations/keystep_train.json").write_text(json.dumps(table))


def keysteps(root: Path, **changes: Any) -> Manifest:
    values = {"root": root, "splits": ("train",), **changes}
    return read_dataset(EgoExo4dKeysteps(kind="ego_exo4d_keysteps", **values))


def test_keysteps_are_seen_by_the_wearers_camera(tmp_path: Path) -> None:
    write_keysteps(tmp_path)
    folder = "takes/lab_covid_07_6/frame_aligned_videos"
    touch(tmp_path, f"{folder}/aria02_214-1.mp4", f"{folder}/cam01.mp4")
    touch(tmp_path, f"{folder}/aria02_1201-1.mp4")
    manifest = keysteps(tmp_path)
    names = ("Check the date (818)", "Unbox package", "Check the date (901)")
    assert manifest.heads == {"keystep": names}
    (clip,) = manifest.clips
    assert (clip.clip_id, clip.labels) == ("lab_covid_07_6.0", {"keystep": 1})
    assert (clip.start_s, clip.stop_s) == (0.85598, 33.20377)
    assert clip.media["rgb"] == FileSource(tmp_path / folder / "aria02_214-1.mp4")
    touch(tmp_path, f"{folder}/downscaled/448/aria02_214-1.mp4")
    small = keysteps(tmp_path).clips[0].media["rgb"]
    assert small == FileSource(tmp_path / folder / "downscaled/448/aria02_214-1.mp4")


@pytest.mark.parametrize(
    ("take", "message"),
    [
        ({"take_name": "a/b"}, r"keystep_train\.json: take '77': take_name='a/b'"),
        ({"segments": [SEGMENT, {**SEGMENT, "step_unique_id": 5}]}, r"segments entry 2: step_uni"),
        ({"segments": [{**SEGMENT, "end_time": 0.5}]}, r"segments entry 1: end_time=0\.5"),
        ({"segments": [3]}, r"segments entry 1: is not a JSON object"),
    ],
)
def test_wrong_takes_are_named(tmp_path: Path, take: dict[str, Any], message: str) -> None:
    write_keysteps(tmp_path, **take)
    assert re.search(message, complaint(lambda: keysteps(tmp_path)))
