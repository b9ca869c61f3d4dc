from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from karmma_pipeline.data.annotations import parse_time
from karmma_pipeline.data.manifest import Clip, Manifest, PictureNames, read_manifest
from karmma_pipeline.data.sources import FileSource, FrameSource
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
        ("clip_id,frames\na,f\n", "line 2: fps='': frames needs the frame rate"),
        ("clip_id,video,video_stream\na,x,-1\n", "line 2: video_stream='-1'"),
        (HEADER + "a,x,0\n", "line 2: 3 cells, but 7 columns"),
        ("clip_id,video,verb,verb\na,x,o,d\n", "duplicate column name"),
        (HEADER + "a,https://x.org/v.mp4,0,1,o,d,t\n", "line 2: video='https:.*': a URL; download"),
        (HEADER + f"a,v{'9' * 260}.mp4,0,1,o,d,t\n", "line 2: video='v9+': not a path"),
        (HEADER + f"a,{'long/' * 900}v.mp4,0,1,o,d,t\n", "line 2: video='long/.*': not a path"),
    ],
)
def test_a_wrong_manifest_names_line_and_column(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ManifestError, match=message) as caught:
        read(tmp_path, text)
    assert "m.csv" in str(caught.value)


def test_all_faulty_lines_are_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"line 2: .*line 4: "):
        read(tmp_path, HEADER + "a,x,2,1,o,d,t\nb,x,0,1,o,d,t\nc,x,q,1,o,d,t\n")


def test_splits_that_look_alike_are_named_and_a_home_folder_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    rows = ("a,~/v.mp4,train", "b,~x/v.mp4,Train", "c,v.mp4,val", "d,v.mp4,")
    (tmp_path / "m.csv").write_text("\n".join(("clip_id,video,split", *rows)))
    manifest = read_manifest(tmp_path / "m.csv")
    assert manifest.notes == ("distinct splits with similar names: 'Train' and 'train'",)
    paths = [clip.media["rgb"].path.relative_to(tmp_path) for clip in manifest.clips[:2]]
    assert paths == [Path("home/v.mp4"), Path("~x/v.mp4")]


def test_a_missing_or_binary_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"gone\.csv: the manifest cannot be read"):
        read_manifest(tmp_path / "gone.csv")
    (tmp_path / "b.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ManifestError, match="not a UTF-8 CSV"):
        read_manifest(tmp_path / "b.csv")


def heads_of(tmp_path: Path, column: str, cells: list[str], **options: Any) -> Manifest:
    """Read a list with one label column."""
    rows = "".join(f"c{i},v.mp4,{cell}\n" for i, cell in enumerate(cells))
    (tmp_path / "m.csv").write_text(f"clip_id,video,{column}\n{rows}")
    return read_manifest(tmp_path / "m.csv", **options)


@pytest.mark.parametrize(
    ("columns", "found", "meant"),
    [
        ("clip_id,video,start,end,verb", "end", "stop"),
        ("clip_id,video,start_time,stop,verb", "start_time", "start"),
        ("clip_id,video,Start,Stop,verb", "Start", "start"),
        ("clip_id,video,start,stop_s,verb", "stop_s", "stop"),
        ("clip_id,video,strat,stop,verb", "strat", "start"),
        ("clip_id,filename,start,stop,verb", "filename", "video"),
        ("clip_id,Video,start,stop,verb", "Video", "video"),
        ("clip_id,video,start,stop,subset", "subset", "split"),
        ("clip_id,video,start,stop,participant_id", "participant_id", "group"),
        ("clip_id,video,video stream,stop,verb", "video stream", "video_stream"),
        ("clip_id,video,start_ms,stop_ms,verb", "start_ms", "start"),
        ("clip_id,video,start,endMsec,verb", "endMsec", "stop"),
        ("clip_id,video,start,action_end_timestamp_ns,verb", "action_end_timestamp_ns", "stop"),
        ("clip_id,video,t0,stop,verb", "t0", "start"),
    ],
)
def test_a_reserved_column_by_another_name_is_refused_with_the_right_one(
    tmp_path: Path, columns: str, found: str, meant: str
) -> None:
    message = rf"m\.csv: unknown column '{found}'; did you mean {meant}[ ?]"
    with pytest.raises(ManifestError, match=message):
        read(tmp_path, f"{columns}\na,v.mp4,0,1,x\n")


def test_an_odd_column_is_named_as_a_recipe_can_have_it(tmp_path: Path) -> None:
    odd = "vid}\x1cstream"  # breaks a line
    with pytest.raises(ManifestError, match="unknown column") as caught:
        read(tmp_path, f"clip_id,video,{odd}\na,v.mp4,1\n")
    (line,) = str(caught.value).splitlines()
    recipe = yaml.safe_load(line[line.index("dataset: ") :].removesuffix("."))
    assert recipe["dataset"]["heads"] == [odd]


def test_times_in_other_units_are_to_be_written_in_seconds(tmp_path: Path) -> None:
    with pytest.raises(
        ManifestError, match=r"'start_frame'; .*Convert it to seconds and rename it"
    ):
        read(tmp_path, "clip_id,video,start_frame,stop,verb\na,v.mp4,0,1,x\n")


def test_how_long_a_clip_is_does_not_pass_for_a_label(tmp_path: Path) -> None:
    text = "clip_id,video,start,duration_s,verb\na,v.mp4,1,2,x\n"
    with pytest.raises(ManifestError, match=r"'duration_s', but no column stop.*start plus length"):
        read(tmp_path, text)
    (clip,) = read(tmp_path, text.replace("verb", "stop").replace("x", "3"))
    assert clip.stop_s == 3


@pytest.mark.parametrize("head", ["state", "step", "scene", "tool", "action", "phase", "object"])
def test_heads_that_look_a_little_like_reserved_columns_are_heads(
    tmp_path: Path, head: str
) -> None:
    assert heads_of(tmp_path, head, ["x"]).heads == {head: ("x",)}


@pytest.mark.parametrize("name", ["action", "Action"])
def test_a_head_beside_others_is_not_called_as_their_composite(tmp_path: Path, name: str) -> None:
    """Training would call the composite's accuracy so, and a report the head's."""
    (tmp_path / "m.csv").write_text(f"clip_id,video,verb,{name}\na,v.mp4,open,open door\n")
    with pytest.raises(ManifestError, match=r"composite; rename .*heads: \[verb\]\}"):
        read_manifest(tmp_path / "m.csv")
    assert read_manifest(tmp_path / "m.csv", heads=("verb",)).heads == {"verb": ("open",)}
    assert read_manifest(tmp_path / "m.csv", heads=(name,)).heads == {name: ("open door",)}


def test_a_head_of_any_name_can_be_asked_for(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text("clip_id,video,set,remark,verb\na,v.mp4,1,so long,open\n")
    manifest = read_manifest(tmp_path / "m.csv", heads=("verb", "set"))
    assert manifest.heads == {"verb": ("open",), "set": ("1",)}
    assert manifest.notes == ("ignored columns: remark",)
    with pytest.raises(ManifestError, match=r"dataset\.heads: 'verbs' is not a column; did you"):
        read_manifest(tmp_path / "m.csv", heads=("verbs",))
    with pytest.raises(ManifestError, match=r"dataset\.heads: 'video' is reserved"):
        read_manifest(tmp_path / "m.csv", heads=("video",))
    (tmp_path / "m.csv").write_text("clip_id,video,start,end,verb\na,v.mp4,1,2,open\n")
    with pytest.raises(
        ManifestError, match=r"unknown column 'end'; did you mean stop \(seconds\)\?"
    ):
        read_manifest(tmp_path / "m.csv", heads=("verb",))


@pytest.mark.parametrize(
    ("head", "better"),
    [("verb class", "verb_class"), ("Tätigkeit", "Tatigkeit"), ("verb/noun", "verb_noun")],
)
def test_a_head_that_a_store_cannot_name_is_refused_with_a_name(
    tmp_path: Path, head: str, better: str
) -> None:
    with pytest.raises(
        ManifestError, match=rf"column '{head}': .* rename the column to '{better}'\."
    ):
        heads_of(tmp_path, head, ["x"])


@pytest.mark.parametrize("name", ["", "Unnamed: 0"])
def test_the_index_of_a_table_is_no_head_and_is_said(tmp_path: Path, name: str) -> None:
    path = tmp_path / "m.csv"
    path.write_text(f"{name},clip_id,video,verb\n0,a,v.mp4,open\n1,b,v.mp4,open\n")
    manifest = read_manifest(path)
    assert manifest.heads == {"verb": ("open",)}
    assert manifest.notes == (f"ignored columns: {name or '(column 1)'}",)


@pytest.mark.parametrize(
    ("cells", "names", "labels", "note"),
    [
        (["0.0", "1.0", "10.0", "2.0"], ("0", "1", "2", "10"), [0, 1, 3, 2], None),
        (["3", "-1", "12", "3"], ("3", "12"), [0, -1, 1, 0], "1 of 4 clips without a class (-1)"),
        (
            ["1.0", "", "nan", "-1.0"],
            ("1",),
            [0, -1, -1, -1],
            "3 of 4 clips without a class (-1",
        ),
        (
            ["cut", "NA", "None", "10"],
            ("10", "cut"),
            [1, -1, -1, 0],
            "2 of 4 clips without a",
        ),
        (["-2", "-1", "0", "1"], ("-2", "-1", "0", "1"), [0, 1, 2, 3], None),  # a scale
        (["007", "10", "9", "9"], ("007", "9", "10"), [0, 2, 1, 1], None),
        (["0.5", "1.0", "0.25", "1.0"], ("0.25", "0.5", "1"), [1, 2, 0, 2], None),
        (["none", "open", "none", "open"], ("none", "open"), [0, 1, 0, 1], None),
        (
            ["put\xa0in", "put in"],
            ("put in", "put\xa0in"),
            [1, 0],
            "distinct classes with similar names",
        ),
        (
            ["put\u200b", "put"],
            ("put", "put\u200b"),
            [1, 0],
            r"distinct classes with similar names: 'put' and 'put\u200b'",
        ),
        (
            ["é", "e\u0301", "a"],
            ("a", "e\u0301", "é"),
            [2, 1, 0],
            "distinct classes with similar names",
        ),
    ],
)
def test_labels_are_read_as_people_mean_them(
    tmp_path: Path, cells: list[str], names: tuple[str, ...], labels: list[int], note: str | None
) -> None:
    manifest = heads_of(tmp_path, "verb", cells)
    assert manifest.heads["verb"] == names
    assert [clip.labels["verb"] for clip in manifest.clips] == labels
    assert len(manifest.notes) == (note is not None)
    assert all(said.startswith(f"verb: {note}") for said in manifest.notes)


def test_a_column_with_a_class_per_clip_is_no_head_unless_it_is_asked_for(tmp_path: Path) -> None:
    cells = [f"remark {i}" for i in range(11)] + ["same"] * 9
    message = r"column 'remark' has 12 classes in 20 clips.*heads: \[verb\]\}"
    with pytest.raises(ManifestError, match=message):
        heads_of(tmp_path, "remark", cells)
    assert len(heads_of(tmp_path, "remark", cells, heads=("remark",)).heads["remark"]) == 12
    assert len(heads_of(tmp_path, "verb", cells[1:]).heads["verb"]) == 11  # so few may well have
    assert len(heads_of(tmp_path, "verb", cells + ["same"] * 4).heads["verb"]) == 12


def test_what_spreadsheets_write_is_read(tmp_path: Path) -> None:
    plain = "clip_id,video,start,stop,verb\na,v.mp4,0,1.5,cut\nb,v.mp4,1,2,put\n"
    wanted = read(tmp_path, plain)
    lines = plain.splitlines()
    for text in (
        "".join(f"{line},,,\n" for line in lines) + ",,,,,,,\n" * 3,  # cells that were used once
        "\n".join(lines) + "\n,,,,,,\n",
        plain.replace(",", ";"),
        plain.replace(",", "\t").replace("\n", "\r\n"),
        plain.replace("\n", "\r"),
        f"\ufeff{plain}   \n",
        plain.replace(",", ", ").replace("v.mp4", '"v.mp4"'),
    ):
        (tmp_path / "m.csv").write_bytes(text.encode())
        assert read_manifest(tmp_path / "m.csv").clips == wanted, text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('a,v.mp4,0,1,"cut\nb,v.mp4,0,1,put\n', "line 2: verb: a quote is not closed"),
        ('a,v.mp4,0,1,x\nb,"v".mp4,0,1,x\n', "line 3: video: a quote is not closed, or is closed"),
        (
            "a,v.mp4,0,1,x\n" * 3 + 'b,"v.mp4,0,1,x\n' + "c,v,0,1,x\n" * 40_000,
            "line 5: video: a qu",
        ),
        ("a,v.mp4,00:01:75,90,x\n", r"line 2: start='00:01:75': .* minutes and seconds below 60"),
        ("a,v.mp4,0,01:60:00,x\n", r"line 2: stop='01:60:00'"),
        ("a,v.mp4,1_0,20,x\n", r"line 2: start='1_0'"),
        ("a,v.mp4,\uff11,20,x\n", "line 2: start='\uff11'"),
        ("a,v.mp4,infinity,20,x\n", r"line 2: start='infinity'"),
        ('a,v.mp4,"1,5",20,x\n', r"line 2: start='1,5'"),
    ],
)
def test_a_fault_of_the_table_is_named_where_it_is(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ManifestError, match=rf"m\.csv: {message}"):
        read(tmp_path, f"clip_id,video,start,stop,verb\n{text}")


def test_a_cell_of_another_encoding_is_named(tmp_path: Path) -> None:
    head = b"clip_id,video,verb\na,v.mp4,x\n"
    (tmp_path / "m.csv").write_bytes(head + "b,v.mp4,öffnen\n".encode("latin-1"))
    with pytest.raises(ManifestError, match=r"m\.csv: line 3: .*cell 3 is not UTF-8.*CSV UTF-8"):
        read_manifest(tmp_path / "m.csv")
    (tmp_path / "m.csv").write_bytes(head.decode().encode("utf-16"))
    with pytest.raises(ManifestError, match=r"not a UTF-8 CSV file \(UTF-16\)"):
        read_manifest(tmp_path / "m.csv")
    (tmp_path / "m.csv").write_bytes(head.decode().encode("utf-16-le"))
    with pytest.raises(ManifestError, match=r"not a UTF-8 CSV file \(it contains NUL bytes\)"):
        read_manifest(tmp_path / "m.csv")


def test_a_table_with_other_separators_is_told_them(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"'clip_id\|video', separated by commas, semicolons"):
        read(tmp_path, "clip_id|video\na|v.mp4\n")
    with pytest.raises(ManifestError, match=r"rename 'Clip_ID' to clip_id"):
        read(tmp_path, "Clip_ID,Video\na,v.mp4\n")
