"""What failures.csv and media.csv say: of damaged files, of killed runs, of older versions."""

import csv
from pathlib import Path

import pytest
from click.testing import CliRunner
from support.media_files import Maker
from support.tiny_store import write_store

from karmma_pipeline.cli import main
from karmma_pipeline.extraction.tables import (
    FAILURES,
    MEDIA,
    NOTES,
    count_failed,
    note_media,
    one_line,
    write_tables,
)
from karmma_pipeline.extraction.types import DecodedClip, InputSpec
from karmma_pipeline.modalities import Reason
from karmma_pipeline.store import Catalog

RGB = InputSpec("rgb", 8, None, (32, 32), per_frame=True)

RECIPE = """
manifest: m.csv
out: out
sets:
  one:
    rgb: {name: s3d, weights: random:0, frames: 8, size: 32}
    audio: {name: resnet18, weights: random:0, image: [32, 32]}
decode: {workers: 1}
batch_size: 2
precision: float32
max_failures: 1.0
"""


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def decoded(clip_id: str, rate: int) -> DecodedClip:
    clip = DecodedClip(clip_id)
    clip.audio_rate = rate
    clip.decoders["audio"] = "pyav"
    return clip


def failed(clip_id: str, reason: Reason, detail: str) -> DecodedClip:
    return DecodedClip(clip_id, reasons={RGB: reason}, details={RGB: detail})


def test_every_clip_has_its_last_note_whatever_a_killed_run_left(tmp_path: Path) -> None:
    store = Catalog(write_store(tmp_path / "s", clips=4))
    note_media(tmp_path, 1, [decoded("c002", 8000), decoded("c001", 16000)])
    with (tmp_path / NOTES / "1.jsonl").open("a") as file:
        file.write('\n{"clip_id": "c003", "audio_ra')
    note_media(tmp_path, 1, [decoded("c003", 44100)])
    note_media(tmp_path, 0, [decoded("c002", 48000), decoded("gone", 1)])
    note_media(tmp_path, 1, [decoded("c002", 22050)])
    write_tables(tmp_path, [store])
    rows = table(tmp_path / MEDIA)
    assert [(row["clip_id"], row["audio_rate_hz"]) for row in rows] == [
        ("c001", "16000"),
        ("c002", "22050"),
        ("c003", "44100"),
    ]
    assert {row["audio_decoder"] for row in rows} == {"pyav"}


def test_a_detail_stands_beside_the_reason_that_it_belongs_to(tmp_path: Path) -> None:
    absent = [("c001", "rgb"), ("c002", "rgb")]
    store = Catalog(write_store(tmp_path / "s", clips=4, absent=absent))
    note_media(tmp_path, 0, [failed("c001", Reason.BAD_VALUE, "first\n  second")])
    note_media(tmp_path, 0, [failed("c002", Reason.TIMEOUT, "of another set")])
    note_media(tmp_path, 0, [decoded("c001", 1)])  # read again for a set that lacked it
    assert write_tables(tmp_path, [store]) == 2
    rows = [row for row in table(tmp_path / FAILURES) if row["modality"] == "rgb"]
    assert list(rows[0]) == ["clip_id", "modality", "stage", "reason", "hint", "detail"]
    assert [(row["clip_id"], row["detail"]) for row in rows] == [
        ("c001", "first second"),
        ("c002", ""),
    ]
    assert "detail" not in (tmp_path / MEDIA).read_text()
    assert "faults" not in (tmp_path / MEDIA).read_text()


def test_a_long_detail_keeps_its_path_and_what_was_wrong() -> None:
    line = one_line("/data/" + "x" * 900 + "/v.mp4: frame 3 is damaged")
    assert len(line) <= 300
    assert line.startswith("/data/x")
    assert line.endswith("/v.mp4: frame 3 is damaged")


def test_tables_of_older_versions_are_counted(tmp_path: Path) -> None:
    assert count_failed(tmp_path) == 0
    (tmp_path / FAILURES).write_text(
        "clip_id,modality,stage,reason,hint\na,rgb,decode,time_off,\nb,audio,open,no_stream,\n"
        "c,audio,decode,refused,\nc,rgb,decode,unsafe_file,\n"
    )
    assert count_failed(tmp_path) == 2


@pytest.mark.slow
def test_the_command_says_of_each_damaged_file_what_its_decoder_said(
    make_video: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = bytearray(make_video("torn.mp4", sound=False, seconds=8.0).read_bytes())
    middle = len(data) // 2
    data[middle - 1000 : middle + 1000] = bytes(2000)
    (tmp_path / "torn.mp4").write_bytes(data)
    (tmp_path / "page.mp4").write_text("<html>")
    (tmp_path / "list.mp4").write_text("#EXTM3U\nfile:///etc/hostname\n")
    make_video("fine.mp4")
    names = {"a": "torn", "b": "page", "c": "list", "d": "gone", "e": "fine"}
    rows = "".join(f"{i},{name}.mp4,,,x,train\n" for i, name in names.items())
    (tmp_path / "m.csv").write_text("clip_id,video,start,stop,verb,split\n" + rows)
    (tmp_path / "r.yaml").write_text(RECIPE)
    result = CliRunner().invoke(main, ["extract", "r.yaml"])
    assert result.exit_code == 0, result.output
    told = {(r["clip_id"], r["modality"]): r for r in table(tmp_path / "out" / FAILURES)}
    assert {clip: told[clip, "rgb"]["reason"] for clip, _ in told} == {
        "a": "decode_error",
        "b": "decode_error",
        "c": "unsafe_file",
        "d": "file_missing",
    }
    assert "damaged" in told["a", "rgb"]["detail"]
    assert "no audio stream" in told["a", "audio"]["detail"]
    assert "Invalid data found" in told["b", "rgb"]["detail"]
    assert told["c", "rgb"]["detail"].endswith("list.mp4: a playlist, not a video")
    assert told["d", "rgb"]["detail"].endswith("gone.mp4")
    assert all("\n" not in row["detail"] for row in told.values())
