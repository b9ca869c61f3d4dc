import csv
from pathlib import Path

from karmma_pipeline.extract.decode import Decoded
from karmma_pipeline.extract.media_facts import NOTES, TABLE, note, write_table


def decoded(clip_id: str, rate: int) -> Decoded:
    clip = Decoded(clip_id)
    clip.audio_rate = rate
    clip.decoders["audio"] = "pyav"
    return clip


def test_every_clip_has_its_last_note_whatever_a_killed_run_left(tmp_path: Path) -> None:
    note(tmp_path, 1, [decoded("c", 8000), decoded("a,b", 16000)])
    with (tmp_path / NOTES / "1.jsonl").open("a") as file:
        file.write('\n{"clip_id": "d", "audio_ra')
    note(tmp_path, 1, [decoded("d", 44100)])
    note(tmp_path, 0, [decoded("c", 48000), decoded("gone", 1)])
    note(tmp_path, 1, [decoded("c", 22050)])
    write_table(tmp_path, ["a,b", "c", "d", "e"])
    with (tmp_path / TABLE).open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["clip_id"], row["audio_rate_hz"]) for row in rows] == [
        ("a,b", "16000"),
        ("c", "22050"),
        ("d", "44100"),
    ]
    assert {row["audio_decoder"] for row in rows} == {"pyav"}
