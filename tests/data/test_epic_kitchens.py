import re
from pathlib import Path
from typing import Any

import h5py
import pytest
from support.epic import HEADER, VAL, complaint, touch, write_annotations

from karmma_pipeline.data.datasets import read_dataset
from karmma_pipeline.data.datasets.epic_kitchens import EpicKitchens
from karmma_pipeline.data.manifest import Clip, Manifest
from karmma_pipeline.data.sources import FileSource, FrameSource, SoundArray
from karmma_pipeline.errors import ManifestError


def epic(folder: Path, **changes: Any) -> Manifest:
    if not (folder / "annotations").is_dir():
        write_annotations(folder / "annotations")
    (folder / "EPIC").mkdir(exist_ok=True)
    values = {"root": folder / "EPIC", "annotations": folder / "annotations", **changes}
    return read_dataset(EpicKitchens(kind="epic_kitchens_100", **values))


def by_id(manifest: Manifest) -> dict[str, Clip]:
    return {clip.clip_id: clip for clip in manifest.clips}


def test_official_tables_become_clips_with_the_published_classes(tmp_path: Path) -> None:
    manifest = epic(tmp_path)
    assert manifest.heads == {"verb": ("put", "open", "take"), "noun": ("pan", "lid", "door")}
    clips = by_id(manifest)
    assert list(clips) == ["P01_01_0", "P01_01_10", "P02_103_1", "P03_02_7", "P03_02_8"]
    first = clips["P01_01_0"]
    assert (first.start_s, first.stop_s) == (0.14, 3.37)
    assert first.labels == {"verb": 1, "noun": 2}
    assert (first.split, first.group) == ("train", "P01")
    assert clips["P01_01_10"].stop_s == 6.17  # .170 is not 170 hundredths
    assert clips["P02_103_1"].start_s == 60.0


def test_a_clip_that_ends_after_its_video_is_cut_there_and_told(tmp_path: Path) -> None:
    manifest = epic(tmp_path)
    assert by_id(manifest)["P03_02_8"].stop_s == 10.007
    assert "clips that extend past the end of their video and are cut there: 1" in manifest.notes


def test_the_test_split_has_no_labels(tmp_path: Path) -> None:
    manifest = epic(tmp_path, splits={"test": Path("EPIC_100_test_timestamps.csv")})
    assert manifest.clips[0].labels == {"verb": -1, "noun": -1}
    assert "test: 1 clip of EPIC_100_test_timestamps.csv, without labels" in manifest.notes


def test_classes_are_read_as_numbers_and_unknown_ones_are_told(tmp_path: Path) -> None:
    cells = {"1.0": 1, "-1": -1, "-1.0": -1, "NA": -1, "nan": -1, "": -1}
    rows = "".join(
        f"P01_01_{n},P01,P01_01,,00:00:01,00:00:02,60.0,120.0,x,x,{cell},y,0,['y'],[0]\n"
        for n, cell in enumerate(cells)
    )
    write_annotations(tmp_path / "annotations")
    (tmp_path / "annotations/t.csv").write_text(HEADER + rows)
    manifest = epic(tmp_path, splits={"train": Path("t.csv")})
    assert [clip.labels["verb"] for clip in manifest.clips] == list(cells.values())
    assert "clips whose verb or noun class is not given: 5" in manifest.notes


def test_published_groups_are_kept_for_evaluation(tmp_path: Path) -> None:
    groups = epic(tmp_path).groups
    assert groups.unseen == ("P03",)
    assert groups.tail == {"verb": (1,), "noun": (1, 2)}


@pytest.mark.parametrize(
    "place",
    ["P01/videos/P01_01.MP4", "videos/train/P01/P01_01.MP4", "P01/P01_01.mp4", "P01_01.MP4"],
)
def test_videos_are_found_in_any_layout_and_serve_all_modalities(
    tmp_path: Path, place: str
) -> None:
    touch(tmp_path / "EPIC", place)
    media = by_id(epic(tmp_path))["P01_01_0"].media
    assert media == dict.fromkeys(("rgb", "flow", "audio"), FileSource(tmp_path / "EPIC" / place))


@pytest.mark.parametrize(
    "place",
    [
        "P01/{}_frames/P01_01.tar",
        "frames_rgb_flow/{}/train/P01/P01_01.tar",
        "P01/{}_frames/P01_01",
        "frames_rgb_flow/{}/train/P01/P01_01",
    ],
)
def test_released_frames_are_addressed_by_their_numbers(tmp_path: Path, place: str) -> None:
    root = tmp_path / "EPIC"
    for kind, name in (("rgb", "frame_0000000001.jpg"), ("flow", "u/frame_0000000001.jpg")):
        path = place.format(kind)
        touch(root, path if path.endswith(".tar") else f"{path}/{name}")
    media = by_id(epic(tmp_path))["P01_01_10"].media
    rgb, flow = media["rgb"], media["flow"]
    assert rgb == FrameSource(
        root / place.format("rgb"), ("frame_{:010d}.jpg",), 60, span=(262, 370)
    )
    # every second frame has flow: the frames 261, 263, ... 369 are its numbers 131 to 185
    assert isinstance(flow, FrameSource)
    assert (flow.span, flow.fps, flow.stride, flow.dilation) == ((131, 185), 60, 2, 3)
    assert flow.bound_px == 8
    assert flow.names == ("u/frame_{:010d}.jpg", "v/frame_{:010d}.jpg")


def test_the_extension_has_a_grid_of_50_hz_and_flow_of_every_frame(tmp_path: Path) -> None:
    touch(tmp_path / "EPIC", "P02/rgb_frames/P02_103.tar", "P02/flow_frames/P02_103.tar")
    media = by_id(epic(tmp_path))["P02_103_1"].media
    for source in (media["rgb"], media["flow"]):
        assert isinstance(source, FrameSource)
        assert (source.fps, source.span, source.stride, source.dilation) == (50, (3000, 3100), 1, 1)


def test_frames_after_the_end_of_the_video_are_not_asked_for(tmp_path: Path) -> None:
    touch(tmp_path / "EPIC", "P03/rgb_frames/P03_02.tar")
    rgb = by_id(epic(tmp_path))["P03_02_8"].media["rgb"]
    assert isinstance(rgb, FrameSource)
    assert rgb.span == (540, 600)  # 10.007 s at 60 Hz; the table says 601


def test_videos_come_before_frames_unless_the_recipe_wants_frames(tmp_path: Path) -> None:
    root = tmp_path / "EPIC"
    touch(root, "P01/videos/P01_01.MP4", "P01/rgb_frames/P01_01.tar", "P01/flow_frames/P01_01.tar")
    media = by_id(epic(tmp_path))["P01_01_0"].media
    assert isinstance(media["rgb"], FileSource)
    assert isinstance(media["flow"], FrameSource)  # released flow before computed flow
    wanted = {"rgb": "frames", "flow": "computed", "audio": "none"}
    media = by_id(epic(tmp_path, media=wanted))["P01_01_0"].media
    assert isinstance(media["rgb"], FrameSource)
    assert media["flow"] == media["rgb"]
    assert "audio" not in media


def test_sound_comes_from_the_array_where_there_is_no_video(tmp_path: Path) -> None:
    root = tmp_path / "EPIC"
    touch(root, "P01/rgb_frames/P01_01.tar", "P03/videos/P03_02.MP4")
    with h5py.File(root / "EPIC-KITCHENS-100_audio.hdf5", "w") as file:
        file["P01_01"] = [0.0]
    clips = by_id(epic(tmp_path))
    array = root / "EPIC-KITCHENS-100_audio.hdf5"
    assert clips["P01_01_0"].media["audio"] == SoundArray(array, "P01_01", 24_000)
    assert clips["P03_02_7"].media["audio"] == FileSource(root / "P03/videos/P03_02.MP4")
    assert clips["P02_103_1"].media["audio"] == FileSource(root / "P02/videos/P02_103.MP4")
    array.write_bytes(b"no array")
    with pytest.raises(ManifestError, match=r"audio\.hdf5: truncated or not an HDF5 file"):
        epic(tmp_path)


def test_what_was_found_is_said_and_mixtures_are_warned_of(tmp_path: Path) -> None:
    touch(tmp_path / "EPIC", "P01/videos/P01_01.MP4", "P02/rgb_frames/P02_103.tar")
    text = "\n".join(epic(tmp_path).notes)
    assert "rgb: 1 of 3 videos as video files (such as" in text
    assert "1 of 3 videos as frames in a tar" in text
    assert "1 of 3 videos missing" in text
    assert "rgb: sources of several kinds are mixed" in text


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("P03_02_7,P03", "P03_02_7,P04", r"line 2: participant_id='P04': video_id='P03_02'"),
        ("P03_02_8,", "P03_02_7,", r"line 3: duplicate clip_id='P03_02_7', also in .*line 2"),
        ("00:00:01.89", "00:00:xx", r"line 2: stop_timestamp='00:00:xx'"),
        ("00:00:01.89", "", r"line 2: stop_timestamp is empty"),
        ("00:00:01.89", "00:00:00.00", r"line 2: stop_timestamp='00:00:00.00' is not after"),
        (",1,113,", ",114,113,", r"line 2: stop_frame='113'"),
        ("take,2,pan", "take,3,pan", r"line 2: verb_class=3: the last class is 2"),
        ("take,2,pan", "take,-2,pan", r"line 2: verb_class='-2'"),
        ("take,2,pan", "take,2.5,pan", r"line 2: verb_class='2.5'"),
        (",00:00:00.00,", ",,", r"line 2: start_timestamp is empty"),
        (",00:00:00.00,", ",00:60:00,", r"line 2: start_timestamp='00:60:00'"),
        ("P03,P03_02,", "P03,../../02,", r"line 2: video_id='../../02'"),
        ("P03_02_8,P03,P03_02", "P03_02_8,P03", r"line 3: 14 cells, but 15 columns"),
        ("start_frame", "start", r"no column start_frame"),
        ("verb_class", "verbs", r"has only one of verb_class and noun_class"),
    ],
)
def test_a_wrong_table_names_file_line_and_column(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    folder = write_annotations(tmp_path / "annotations")
    text = (HEADER + VAL).replace(old, new, 1)
    (folder / "EPIC_100_validation.csv").write_text(text)
    said = complaint(lambda: epic(tmp_path))
    assert re.search(message, said)
    assert "annotations" in said


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "verb_classes",
            "id,key\n0,put\n2,take\n",
            r"verb_classes\.csv: line 3: id='2': must",
        ),
        (
            "noun_classes",
            "id,key\n0,a\n1,a\n",
            r"noun_classes\.csv: the class list .* duplicate keys",
        ),
        ("tail_verbs", "verb\n7\n", r"tail_verbs\.csv: line 2: verb=7"),
        ("video_info", "video_id,duration\nP01_01,long\n", r"video_info\.csv: line 2: duration="),
        ("train", HEADER, r"train\.csv: the file lists no clips"),
    ],
)
def test_wrong_lists_are_named_too(tmp_path: Path, name: str, text: str, message: str) -> None:
    folder = write_annotations(tmp_path / "annotations")
    (folder / f"EPIC_100_{name}.csv").write_text(text)
    assert re.search(message, complaint(lambda: epic(tmp_path)))


@pytest.mark.parametrize("name", ["P01_01.Mp4", "p01_01.mp4", "P01_01.MOV", "P01_01.mkv"])
def test_a_video_is_found_in_upper_and_lower_case_and_with_another_ending(
    tmp_path: Path, name: str
) -> None:
    touch(tmp_path / "EPIC", f"P01/videos/{name}")
    media = by_id(epic(tmp_path))["P01_01_0"].media
    assert media["rgb"] == media["audio"] == FileSource(tmp_path / "EPIC/P01/videos" / name)


def test_a_folder_is_no_video_and_pictures_are_looked_for_by_any_name(tmp_path: Path) -> None:
    root = tmp_path / "EPIC"
    touch(root, "P01/videos/P01_01.MP4/0.MP4", "P02/rgb_frames/P02_103/img_00002.png")
    touch(root, "P03/rgb_frames/P03_02/P03_02/frame_0000000002.jpg")
    manifest = epic(tmp_path)
    clips = by_id(manifest)
    assert clips["P01_01_0"].media["rgb"] == FileSource(root / "P01/videos/P01_01.MP4")
    assert "it is a folder, not a file" in "\n".join(manifest.notes)
    assert clips["P02_103_1"].media["rgb"].path == root / "P02/rgb_frames/P02_103"
    assert clips["P03_02_7"].media["rgb"].path == root / "P03/rgb_frames/P03_02"


def test_a_folder_that_is_not_there_is_an_error_at_once(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"dataset\.root=nowhere: no such folder in /"):
        epic(tmp_path, root="nowhere")
    for key in ("flow_root", "audio_array"):
        with pytest.raises(ManifestError, match=rf"dataset\.media\.{key}=gone: does not exist"):
            epic(tmp_path, media={key: "gone"})
