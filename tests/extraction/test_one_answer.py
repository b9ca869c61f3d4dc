"""What ``karmma plan`` says of a file is what becomes of it: files that headers do not tell of."""

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.here_pool import HerePool
from support.media_files import remux, write_sound, write_video

from karmma_pipeline import config
from karmma_pipeline.extraction.decode.worker import decode_clips
from karmma_pipeline.extraction.estimate import survey as planned
from karmma_pipeline.extraction.recipe import ExtractRecipe, read_clips
from karmma_pipeline.extraction.types import NATURAL, DecodeSettings
from karmma_pipeline.modalities import Reason

SETS = {
    "one": {
        "rgb": {"name": "s3d", "weights": "random:0", "frames": 8, "size": 32},
        "audio": {"name": "resnet18", "weights": "random:0", "image": [32, 32]},
    }
}
CENC = {"encryption_scheme": "cenc-aes-ctr", "encryption_key": "0" * 32, "encryption_kid": "1" * 32}
PIECES = {"movflags": "frag_keyframe+empty_moov", "frag_duration": "200000"}
PICTURES = ("front.mp4", "v.mp4", "pieces.mp4", "v.mkv", "v.ts", "v.flv", "v.asf", "v.nut", "v.mpg")
SPANS = ((0, 1), (1.2, 1.9))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seconds of pictures and sound in many containers."""
    folder = tmp_path_factory.mktemp("whole")
    first = write_video(folder / "v.mp4", pan_px_s=40, click_s=0.5)
    write_video(folder / "front.mp4", pan_px_s=40, index_first=True)
    remux(first, folder / "pieces.mp4", PIECES)
    for name in ("v.mkv", "v.ts", "v.flv", "v.asf", "v.nut"):
        remux(first, folder / name)
    write_video(
        folder / "v.mpg", codec="mpeg2video", times=(np.arange(50) / 25).tolist(), sound=False
    )
    for name, codec in (("s.aac", "aac"), ("s.mp3", "libmp3lame"), ("s.wav", "pcm_s16le")):
        write_sound(folder / name, codec)
    return folder


def survey_of(paths: Sequence[Path], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Return how plan and extraction judge two clips of each file, by clip and modality."""
    monkeypatch.setattr(planned, "open_pool", lambda settings, *_: HerePool(settings))
    monkeypatch.setattr(
        planned, "check_sources", lambda some, check, probe: {k: check(s) for k, s in some.items()}
    )
    rows = [f"{p.name}.{a},{p},{a},{b},x,train\n" for p in paths for a, b in SPANS]
    target = paths[0].parent / "m.csv"
    target.write_text("clip_id,video,start,stop,verb,split\n" + "".join(rows))
    tree = {"manifest": str(target), "out": str(target.parent / "out"), "sets": SETS}
    recipe = config.build(ExtractRecipe, tree, "test")
    manifest, settings = read_clips(recipe), DecodeSettings.of(recipe)
    seen = planned.Survey(recipe, manifest)
    foretold, extracted = {}, {}
    for clip in manifest.clips:
        (decoded,) = decode_clips([clip], settings)
        for spec in settings.inputs:
            name = f"{clip.clip_id} {spec.modality}"
            foretold[name] = seen.outcomes[clip.clip_id, spec.modality][0]
            extracted[name] = decoded.reasons.get(spec, Reason.PRESENT)
    return {"facts": seen.facts(), "foretold": foretold, "extracted": extracted}


def assert_one_answer(found: dict[str, Any]) -> None:
    extracted = found["extracted"]
    assert found["foretold"] == extracted
    muted = sum(reason == Reason.NO_STREAM for reason in extracted.values())
    assert sum(found["facts"]["no_stream"].values()) == muted
    lost = {n.split()[0] for n, reason in extracted.items() if reason not in NATURAL}
    assert found["facts"]["clips_lost_to_faults"] == len(lost)
    assert {clip for clips in found["facts"]["lost"].values() for clip in clips} == lost


def test_an_encrypted_file_is_lost_and_both_say_why(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [
        remux(folder / "v.mp4", tmp_path / "whole.mp4", CENC),
        remux(folder / "v.mp4", tmp_path / "pieces.mp4", CENC | PIECES),
        remux(folder / "v.mp4", tmp_path / "sound.mp4", CENC, lambda kind, _: kind == "audio"),
    ]
    found = survey_of(paths, monkeypatch)
    assert_one_answer(found)
    extracted = [
        r for n, r in found["extracted"].items() if not n.startswith("sound") or "aud" in n
    ]
    assert set(extracted) == {Reason.DECODE_ERROR}
    named = found["facts"]["files"]["faulty"]["damaged"]
    assert set(named.values()) == {"encrypted: decrypt it, or get a copy without DRM"}


@pytest.mark.parametrize(
    "name", ["v.mp4", "v.mov", "pieces.mp4", "v.mkv", "v.ts", "v.flv", "v.nut"]
)
def test_a_track_without_samples_or_with_few_is_what_extraction_makes_of_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def without(kind: str, from_number: int) -> Path:
        path = tmp_path / f"{kind}{from_number}{name}"
        options = PIECES if name == "pieces.mp4" else {}
        return remux(
            folder / "v.mp4", path, options, lambda of, number: of != kind or number < from_number
        )

    paths = [without(kind, count) for kind in ("video", "audio") for count in (0, 7, 20)]
    paths.append(remux(folder / "v.mp4", tmp_path / f"late{name}", {}, lambda of, n: n > 15))
    found = survey_of(paths, monkeypatch)
    assert_one_answer(found)
    # A recorder that is muted opens a track and writes nothing into it.
    assert found["extracted"][f"audio0{name}.0 audio"] == Reason.NO_STREAM
    assert found["extracted"][f"audio0{name}.0 rgb"] == Reason.PRESENT


@pytest.mark.slow
@pytest.mark.parametrize("name", [*PICTURES, "s.aac", "s.mp3", "s.wav"])
def test_what_is_cut_or_never_came_is_judged_alike(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    data = (folder / name).read_bytes()
    paths = []
    for end in (len(data) // 2, len(data) * 9 // 10, len(data) - 189, len(data) - 50, len(data)):
        for kind, rest in (("cut", 0), ("zeros", len(data) - end)):
            paths.append(tmp_path / f"{kind}{end}{name}")
            paths[-1].write_bytes(data[:end] + bytes(rest))
    found = survey_of(paths, monkeypatch)
    assert_one_answer(found)
    assert found["extracted"][f"cut{len(data) // 2}{name}.1.2 rgb"] != Reason.PRESENT


def test_a_transport_stream_that_is_cut_in_its_last_packet(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = (folder / "v.ts").read_bytes()
    for cut in (1, 50, 187, 188, 3 * 188 + 7):
        (tmp_path / f"c{cut}.ts").write_bytes(data[:-cut])
    found = survey_of(sorted(tmp_path.glob("*.ts")), monkeypatch)
    assert_one_answer(found)
    assert found["extracted"]["c1.ts.0 rgb"] == Reason.PRESENT
    truncated = found["facts"]["files"]["faulty"]["truncated"]
    assert {Path(path).name for path in truncated} == {f"c{c}.ts" for c in (1, 50, 187, 571)}


def test_clips_beyond_what_is_tried_are_judged_by_what_was_measured(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planned, "TRIED", 1)
    found = survey_of([folder / "v.ts", folder / "s.aac"], monkeypatch)
    assert_one_answer(found)
    assert (found["facts"]["decoded"], found["facts"]["lost"]) == (1, {})


def test_sound_whose_stated_size_is_zero_is_there(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = bytearray((folder / "s.wav").read_bytes())
    at = data.index(b"data")
    data[at + 4 : at + 8] = struct.pack("<I", 0)
    (tmp_path / "s.wav").write_bytes(data)
    found = survey_of([tmp_path / "s.wav"], monkeypatch)
    assert_one_answer(found)
    assert found["extracted"]["s.wav.0 audio"] == Reason.PRESENT
