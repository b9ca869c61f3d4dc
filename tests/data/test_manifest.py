from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from karmma_pipeline.data.manifest import (
    Clip,
    FileSource,
    FrameSource,
    PictureNames,
    parse_time,
    read_manifest,
)
from karmma_pipeline.errors import ManifestError

HEADER = "clip_id,video,start,stop,verb,noun,split\n"


def read(tmp_path: Path, text: str) -> tuple[Clip, ...]:
    path = tmp_path / "m.csv"
    path.write_text(text)
    return read_manifest(path).clips


@given(hours=st.integers(0, 99), minutes=st.integers(0, 59), millis=st.integers(0, 59_999))
def test_a_clock_reads_the_same_with_two_and_three_decimals(
    hours: int, minutes: int, millis: int
) -> None:
    seconds = f"{millis // 1000:02d}.{millis % 1000:03d}"
    wanted = hours * 3600 + minutes * 60 + millis / 1000
    assert parse_time(f"{hours:02d}:{minutes:02d}:{seconds}") == pytest.approx(wanted, abs=1e-9)
    if millis % 10 == 0:
        assert parse_time(f"{hours:02d}:{minutes:02d}:{seconds[:-1]}") == pytest.approx(wanted)


@pytest.mark.parametrize("text", ["-1", "nan", "inf", "1:2:3:4", "a", "1:99x", f"{10**400}:00:00"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r".*"):
        parse_time(text)


def test_a_manifest_becomes_clips_with_class_ids_over_all_splits(tmp_path: Path) -> None:
    text = HEADER + "a,v/x.mp4,1.5,00:00:03.25,open,door,train\nb,/abs/y.mp4,,,cut,10,val\n"
    path = tmp_path / "m.csv"
    path.write_text("\ufeff" + text)  # as spreadsheets save it
    manifest = read_manifest(path)
    assert manifest.heads == {"verb": ("cut", "open"), "noun": ("10", "door")}
    first, second = manifest.clips
    assert (first.start_s, first.stop_s) == (1.5, 3.25)
    assert first.media["rgb"] == FileSource(tmp_path / "v/x.mp4")
    assert first.labels == {"verb": 1, "noun": 1}
    assert (second.start_s, second.stop_s) == (0.0, None)
    assert second.media["audio"] == FileSource(Path("/abs/y.mp4"))


def test_numbered_classes_keep_their_order(tmp_path: Path) -> None:
    rows = "".join(f"c{i},x.mp4,0,1,{i}\n" for i in (10, 9, 0))
    (tmp_path / "m.csv").write_text("clip_id,video,start,stop,verb\n" + rows)
    assert read_manifest(tmp_path / "m.csv").heads["verb"] == ("0", "9", "10")


def test_separate_and_missing_audio(tmp_path: Path) -> None:
    text = "clip_id,video,audio,start,stop\na,x.mp4,x.wav,0,1\nb,x.mp4,,0,1\n"
    first, second = read(tmp_path, text)
    assert first.media["audio"] == FileSource(tmp_path / "x.wav")
    assert set(second.media) == {"rgb", "flow"}


def test_frames_flow_pictures_and_streams(tmp_path: Path) -> None:
    text = "clip_id,video,video_stream,audio_stream,frames,fps,flow,verb\n"
    text += "a,x.mkv,2,5,,,,go\nb,x.mkv,,,x.tar,25,flow/x,go\nc,,,,x,12.5,f.mp4,go\n"
    path = tmp_path / "m.csv"
    path.write_text(text)
    pictures = PictureNames(frame_name="{:04d}.png", flow_names=("u{:d}.png", "v{:d}.png"))
    a, b, c = read_manifest(path, pictures).clips
    assert a.media == {
        "rgb": FileSource(tmp_path / "x.mkv", 2),
        "audio": FileSource(tmp_path / "x.mkv", 5),
    }
    assert b.media["rgb"] == FrameSource(tmp_path / "x.tar", ("{:04d}.png",), 25)
    assert b.media["flow"] == FrameSource(tmp_path / "flow/x", pictures.flow_names, 25)
    assert b.media["audio"] == FileSource(tmp_path / "x.mkv")
    assert c.media["flow"] == FileSource(tmp_path / "f.mp4")
    assert "audio" not in c.media


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", "no column clip_id"),
        ("clip_id,b\n1,2\n", "no column video or frames"),
        (HEADER, "lists no clips"),
        (HEADER + "a,x,2,1,o,d,t\n", r"line 2: stop='1' is not after start='2'"),
        (HEADER + "a,x,z,1,o,d,t\n", r"line 2: start='z'"),
        (HEADER + "../a,x,0,1,o,d,t\n", r"line 2: clip_id='\.\./a'"),
        (
            HEADER + "a,x,0,1,o,d,t\nA,x,0,1,o,d,t\n",
            r"line 3: duplicate clip_id='A', also in line 2",
        ),
        (HEADER + "a,,0,1,o,d,t\n", "line 2: video is empty"),
        ("clip_id,frames\na,f\n", "line 2: fps='': frames needs the pictures' rate"),
        ("clip_id,video,video_stream\na,x,-1\n", "line 2: video_stream='-1'"),
        (HEADER + "a,x,0\n", "line 2: has 3 cells, the first line has 7"),
        ("clip_id,video,verb,verb\na,x,o,d\n", "duplicate column name"),
    ],
)
def test_a_wrong_manifest_names_line_and_column(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ManifestError, match=message) as caught:
        read(tmp_path, text)
    assert "m.csv" in str(caught.value)


def test_all_faulty_lines_are_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"line 2: .*line 4: "):
        read(tmp_path, HEADER + "a,x,2,1,o,d,t\nb,x,0,1,o,d,t\nc,x,q,1,o,d,t\n")


def test_a_missing_or_binary_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"gone\.csv: the manifest cannot be read"):
        read_manifest(tmp_path / "gone.csv")
    (tmp_path / "b.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ManifestError, match="not a UTF-8 CSV"):
        read_manifest(tmp_path / "b.csv")
