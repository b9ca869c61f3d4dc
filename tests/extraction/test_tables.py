import csv
from pathlib import Path

from karmma_pipeline.extraction.parts import MEDIA_NOTES, MEDIA_TABLE, note_media, write_media_table
from karmma_pipeline.extraction.types import DecodedClip


def decoded(clip_id: str, rate: int) -> DecodedClip:
    clip = DecodedClip(clip_id)
    clip.audio_rate = rate
    clip.decoders["audio"] = "pyav"
    return clip


def test_every_clip_has_its_last_note_whatever_a_killed_run_left(tmp_path: Path) -> None:
    note_media(tmp_path, 1, [decoded("c", 8000), decoded("a,b", 16000)])
    with (tmp_path / MEDIA_NOTES / "1.jsonl").open("a") as file:
        file.write('\n{"clip_id": "d", "audio_ra')
    note_media(tmp_path, 1, [decoded("d", 44100)])
    note_media(tmp_path, 0, [decoded("c", 48000), decoded("gone", 1)])
    note_media(tmp_path, 1, [decoded("c", 22050)])
    write_media_table(tmp_path, ["a,b", "c", "d", "e"])
    with (tmp_path / MEDIA_TABLE).open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["clip_id"], row["audio_rate_hz"]) for row in rows] == [
        ("a,b", "16000"),
        ("c", "22050"),
        ("d", "44100"),
    ]
    assert {row["audio_decoder"] for row in rows} == {"pyav"}
