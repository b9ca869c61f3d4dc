"""A trained model on raw video says what an evaluation of the cached tokens says."""

import csv
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from click.testing import CliRunner
from support.agreement import agreement
from support.media_files import write_video

from karmma_pipeline import config
from karmma_pipeline.cli import main
from karmma_pipeline.data.manifest import read_manifest
from karmma_pipeline.data.sample.dataset import write_sample
from karmma_pipeline.errors import ConfigError, MediaError
from karmma_pipeline.extraction.media.media_file import MediaFile
from karmma_pipeline.extraction.pipeline import extract
from karmma_pipeline.extraction.recipe import ExtractRecipe
from karmma_pipeline.modalities import subsets
from karmma_pipeline.models.exported import open_model
from karmma_pipeline.models.saved import load_model
from karmma_pipeline.recognition.backbones import recipe_of
from karmma_pipeline.recognition.clips import Spans, wanted_clips
from karmma_pipeline.recognition.output import (
    Guess,
    PredictionWriter,
    Row,
    row_of,
    shown_spans,
    write_timeline,
)
from karmma_pipeline.recognition.overlay import _drawn, _fitting, _font
from karmma_pipeline.recognition.prediction import Dropout, Prediction
from karmma_pipeline.recognition.recognizer import Recognizer
from karmma_pipeline.training.recipe import BaselineRecipe
from karmma_pipeline.training.stages import train_baseline

pytestmark = pytest.mark.slow

S3D = {"name": "s3d", "frames": 8, "size": 32}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with clips, a store of their tokens and a trained model."""
    root = tmp_path_factory.mktemp("recognition")
    write_sample(root / "clips", clips=12, seed=3)
    choices = {
        "rgb": S3D | {"weights": "random:1"},
        "flow": S3D | {"weights": "random:1"},  # the same network, set up once
        "audio": {"name": "resnet18", "weights": "random:3", "image": [32, 32]},
    }
    tree: dict[str, Any] = {
        "manifest": str(root / "clips/manifest.csv"),
        "out": str(root / "features"),
        "sets": {"small": choices},
        "batch_size": 4,
        "audio": {"front_end": "vggish", "window_s": 0.5},
    }
    extract(config.build(ExtractRecipe, tree, "test"))
    tree = {
        "store": str(root / "features/small"),
        "out": str(root / "run"),
        "epochs": 1,
        "val_split": "train",
        "size": {"dim": 32, "attention_heads": 2, "ffn_width": 32, "head_width": 32},
    }
    train_baseline(config.build(BaselineRecipe, tree, "test"))
    return root


@pytest.fixture(scope="module")
def recognizer(root: Path) -> Recognizer:
    return Recognizer.load(root / "run", "cpu")


@pytest.fixture(scope="module")
def seen(root: Path, recognizer: Recognizer) -> list[Prediction]:
    """Return what is said of every clip of the manifest."""
    clips = read_manifest(root / "clips/manifest.csv").clips
    return list(recognizer.predict(clips, workers=1))


def test_raw_video_and_cached_tokens_give_the_same_answers_on_every_subset(root: Path) -> None:
    """`support.agreement` prints the same of hundreds of clips."""
    features, manifest = root / "features/small", root / "clips/manifest.csv"
    found = agreement(root / "run/best", features, manifest, most=12, workers=0)
    assert [one.subset for one in found] == list(subsets(("rgb", "flow", "audio")))
    for one in found:
        assert one.rounded <= 1e-4, one.sentence()
        assert one.unrounded >= one.rounded, one.sentence()
        assert not one.turned, one.sentence()
        assert one.close < one.clips, one.sentence()


def test_a_window_that_is_a_clip_is_that_clip(
    root: Path, recognizer: Recognizer, seen: list[Prediction]
) -> None:
    clip = seen[1].clip
    length = (clip.stop_s or 0) - clip.start_s
    spans = Spans(clip.start_s, clip.stop_s, window_s=length)
    (window,) = recognizer.predict(wanted_clips([clip.media["rgb"].path], spans).clips, workers=0)
    for head, said in window.logits.items():
        np.testing.assert_allclose(said, seen[1].logits[head], atol=1e-4)


def test_live_windows_of_a_files_signals_are_those_of_the_file(
    root: Path, recognizer: Recognizer, tmp_path: Path
) -> None:
    path = write_video(tmp_path / "moving.mp4", seconds=4, click_s=1.5, pan_px_s=20)
    file = MediaFile(path)
    frames = dict(file.decode(np.arange(len(file.frame_starts))))
    rate = recognizer.decode_settings.audio.sample_rate
    zero_s, stop_s = file.sound_span(rate)
    sound = file.sound(zero_s, stop_s, rate)
    stream, sent = recognizer.stream(window_s=2, hop_s=0.5), [0, 0]
    for window in recognizer.video(path, window_s=2, hop_s=0.5, workers=0):
        now_s = (window.clip.stop_s or 0.0) + 0.1
        while sent[0] < len(frames) and file.frame_starts[sent[0]] <= now_s:
            stream.push("rgb", file.frame_starts[sent[0]], frames[sent[0]])
            sent[0] += 1
        while sent[1] < len(sound) and zero_s + sent[1] / rate <= now_s:
            stream.push("audio", zero_s + sent[1] / rate, sound[sent[1] : sent[1] + 800])
            sent[1] += 800
        live = stream.step(now_s)
        assert live is not None
        assert (live.clip.start_s, live.mask) == (window.clip.start_s, window.mask)
        for head, said in live.logits.items():
            # Windows of a file are computed together, and on some processors a sum's last bit then
            # turns the float16 to which a token is rounded.
            np.testing.assert_allclose(said, window.logits[head], atol=2e-4)


@pytest.mark.parametrize("span", [(np.nan, None), (np.inf, None), (0.0, np.nan), (0.0, np.inf)])
def test_a_span_has_finite_ends(span: tuple[float, float | None]) -> None:
    with pytest.raises(ConfigError, match=r"^--start"):
        Spans(*span)


def starts(video: Path, *spans: Any) -> list[float]:
    return [clip.start_s for clip in wanted_clips([video], Spans(*spans)).clips]


def test_windows_cover_the_video_and_end_with_it(root: Path) -> None:
    video = next((root / "clips/videos").glob("*.mp4"))
    (end,) = wanted_clips([video], Spans()).ends.values()
    assert starts(video, 0.0, None, 2.0, 0.5)[:3] == [0.0, 0.5, 1.0]
    assert starts(video, 0.0, None, 2.0, 0.5)[-1] == pytest.approx(end - 2.0, abs=0.06)
    assert starts(video, 1.0, 2.0, 5.0) == [1.0]  # the part is shorter than a window
    assert starts(video, 0.5, 2.5, 1.0) == [0.5, 1.5]
    assert starts(video, 0.5, 2.7, 1.0) == pytest.approx([0.5, 1.5, 1.7])
    assert starts(video) == [0.0]
    short = [wanted_clips([video], spans).clips for spans in (Spans(1, 2, 5), Spans(window_s=99))]
    assert [[clip.stop_s for clip in clips] for clips in short] == [[2.0], [None]]


def test_a_video_without_sound_is_answered_without_it(
    root: Path, recognizer: Recognizer, tmp_path: Path
) -> None:
    silent = write_video(tmp_path / "silent.mp4", sound=False)
    (one,) = recognizer.video(silent, workers=0)
    assert len(one.top("verb", 3)) == 3
    assert dict(one.reasons) == {"audio": "no_stream"}
    assert one.probabilities["verb"].sum() == pytest.approx(1)


def test_the_same_seed_drops_the_same_and_without_leaves_it_out(
    root: Path, recognizer: Recognizer
) -> None:
    clips = read_manifest(root / "clips/manifest.csv").clips

    def masks(dropout: Dropout) -> list[list[bool]]:
        return [[*one.mask.values()] for one in recognizer.predict(clips, dropout, workers=0)]

    some = Dropout(("flow",), 0.5, seed=1)
    dropped = masks(some)
    assert dropped == masks(some)
    assert not any(flow for _, flow, _ in dropped)
    assert all(any(mask) for mask in dropped)
    assert {rgb for rgb, _, _ in dropped} == {True, False}


def test_a_clip_of_which_nothing_is_left_gets_no_class(
    recognizer: Recognizer, seen: list[Prediction], tmp_path: Path
) -> None:
    everything = Dropout(("rgb", "flow", "audio"))
    (nothing,) = recognizer.predict([seen[0].clip], everything, workers=0)
    row = row_of(nothing, 5, {})
    with PredictionWriter(tmp_path, ["verb", "noun"], truth=False) as writer:
        writer.write(row)
    (written,) = rows(tmp_path)
    assert written["verb"] == written["action"] == "no modality"
    assert written["verb_probability"] == ""
    assert written["absent"] == "rgb: dropped; flow: dropped; audio: dropped"
    assert "no modality" in row.sentence()


def run(*arguments: object, code: int = 0) -> str:
    """Run the command and return what it says."""
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exit_code == code, result.output
    return result.output


def rows(out: Path) -> list[dict[str, str]]:
    with (out / "predictions.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def out(root: Path) -> Path:
    """Return what the command writes of windows of one video."""
    out = root / "answers"
    video = sorted((root / "clips/videos").glob("*.mp4"))[0]
    wanted = ("--window", 2, "--hop", 0.5, "--out", out, "--video")
    (root / "said.txt").write_text(run("predict", root / "run/best", video, *wanted))
    return out


def test_predictions_are_printed_on_lines_without_the_bar(root: Path, out: Path) -> None:
    lines = re.split(r"[\r\n]", (root / "said.txt").read_text())
    assert any("predict:" in line for line in lines)  # the bar
    assert sum(line.startswith("v0000.mp4 ") for line in lines) == len(rows(out))


def test_the_command_writes_tables_a_page_and_the_video(root: Path, out: Path) -> None:
    table = rows(out)
    assert [float(row["start_s"]) for row in table[:2]] == [0.0, 0.5]
    lines = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    heads = load_model(root / "run/best")[1].heads
    for row, line in zip(table, lines, strict=True):
        assert row["verb"] == line["top"]["verb"][0]["class"] in heads["verb"]
        assert row["action"] == f"{row['verb']} {row['noun']}"
        both = float(row["verb_probability"]) * float(row["noun_probability"])
        assert float(row["action_probability"]) == pytest.approx(both, abs=1e-3)
        of_verb = [guess["probability"] for guess in line["top"]["verb"]]
        assert of_verb == sorted(of_verb, reverse=True)
    page = (out / "timeline.html").read_text()
    assert table[0]["verb"] in page
    assert "http://" not in page  # nothing is fetched
    assert "https://" not in page


def test_the_video_keeps_its_pictures_their_times_and_its_sound(root: Path, out: Path) -> None:
    source = sorted((root / "clips/videos").glob("*.mp4"))[0]
    with av.open(source) as one, av.open(next(out.glob("*.mp4"))) as other:
        before = [(f.time, f.height) for f in one.decode(video=0)]
        after = [(f.time, f.height) for f in other.decode(video=0)]
        assert bool(one.streams.audio) == bool(other.streams.audio)
    assert [t for t, _ in after] == pytest.approx([t for t, _ in before], abs=0.002)
    assert after[0][1] > before[0][1]  # the answers stand below the picture


@pytest.mark.slow
def test_a_video_beside_the_answers_is_never_replaced_and_sound_has_none(
    root: Path, tmp_path: Path
) -> None:
    source = sorted((root / "clips/videos").glob("*.mp4"))[0]
    video, sound = tmp_path / "kitchen.mp4", tmp_path / "sound.mp4"
    video.write_bytes(source.read_bytes())
    with av.open(source) as one, av.open(sound, "w") as other:
        copy = other.add_stream_from_template(one.streams.audio[0])
        for packet in one.demux(audio=0):
            packet.stream = copy
            other.mux(packet)
    run("predict", root / "run", video, "--out", tmp_path, "--video")
    assert video.read_bytes() == source.read_bytes()
    with av.open(tmp_path / "kitchen.predictions.mp4") as file:
        assert file.streams.video
    told = run("predict", root / "run", sound, "--out", tmp_path / "out", "--video")
    assert f"note: no overlay for {sound}: it has no video stream" in told
    assert not [*(tmp_path / "out").glob("*.mp4")]


def test_long_names_of_classes_are_shortened_in_their_middle() -> None:
    font = _font(16)
    shown = _fitting("noun: " + "washing " * 20 + "(true: cup)", font, 300)
    assert font.getlength(shown) <= 300
    assert (shown[:5], shown[-11:]) == ("noun:", "(true: cup)")
    assert _fitting("noun: cup", font, 300) == "noun: cup"


def test_hours_of_windows_are_drawn_as_stretches_and_gaps_show_what_was_said_last(
    tmp_path: Path,
) -> None:
    def row(start_s: float, verb: str, *seen: str) -> Row:
        absent = {m: "no_stream" for m in ("rgb", "audio") if m not in seen}
        top = {"verb": (Guess(verb, 0.9), Guess("other", 0.1))}
        return Row(str(start_s), Path("v.mp4"), start_s, start_s + 2, seen, absent, top).shortened()

    many = [row(i, "take" if i < 5000 else "put", "rgb") for i in range(10_000)]
    write_timeline(tmp_path / "page.html", many, "student")
    page = (tmp_path / "page.html").read_text()
    assert (page.count("<title>take"), page.count("<title>put"), page.count("<title>no_s")) == (
        1,
        1,
        1,
    )
    assert "other" not in page
    some, frame = [row(0, "take", "rgb"), row(6, "put", "rgb")], np.zeros((240, 320, 3), np.uint8)
    spans = shown_spans(some)
    first, gap, last = (_drawn(frame, some, spans, at_s) for at_s in (1.0, 4.0, 7.0))
    assert (gap == first).all()
    assert (gap != last).any()


def test_rows_with_labels_show_the_truth(root: Path, tmp_path: Path) -> None:
    run("predict", root / "run", root / "clips/manifest.csv", "--out", tmp_path)
    manifest = read_manifest(root / "clips/manifest.csv")
    for row, clip in zip(rows(tmp_path), manifest.clips, strict=True):
        verb, noun = (manifest.heads[h][clip.labels[h]] for h in ("verb", "noun"))
        assert (row["verb_true"], row["action_true"]) == (verb, f"{verb} {noun}")


def test_rows_without_labels_are_answered(root: Path, tmp_path: Path) -> None:
    video = next((root / "clips/videos").glob("*.mp4"))
    table = tmp_path / "new.csv"
    table.write_text(f"clip_id,video,start,stop\na,{video},0.5,1.5\n")
    wanted = wanted_clips([table], Spans())
    assert not any(wanted.truth.values())
    assert [clip.stop_s for clip in wanted.clips] == [1.5]


def test_a_report_shows_clips_as_videos_while_their_media_are_there(
    root: Path, tmp_path: Path
) -> None:
    out = tmp_path / "report"
    switches = [word for key in ("split=", "costs=false", "draws=0") for word in ("--set", key)]
    words = ["evaluate", root / "run", "--out", out, "--gallery", 2, *switches]
    (rule,) = [line for line in run(*words).splitlines() if line.startswith("gallery: ")]
    videos = sorted(path.name for path in (out / "gallery").iterdir())
    counts = {
        kind: sum(kind in name for name in videos) for kind in ("correct", "wrong", "rescued")
    }
    assert [f"{count} of" in rule for count in counts.values()] == [True] * 3
    page = (out / "index.html").read_text()
    assert rule.removeprefix("gallery: ") in page
    for name in videos:
        assert f'src="gallery/{name}#t=0.01"' in page
        with av.open(out / "gallery" / name) as video:
            assert next(video.decode(video=0)).height > 0
    assert "gallery" not in (out / "results.json").read_text()

    media, away = root / "clips/videos", root / "clips/away"
    media.rename(away)
    try:
        told = run(*words, code=1)
        assert "no longer exists" in told.splitlines()[-1]
        assert (out / "index.html").is_file()
    finally:
        away.rename(media)


def test_of_several_files_those_that_cannot_be_read_are_named_after_the_others(
    root: Path, tmp_path: Path
) -> None:
    good = [write_video(tmp_path / f"{name}.mp4", seconds=1) for name in ("first", "last")]
    text, rotten, out = tmp_path / "text.mp4", tmp_path / "rotten.mp4", tmp_path / "out"
    text.write_text("no video")
    data = bytearray(good[0].read_bytes())
    media = slice(data.index(b"mdat") + 8, data.rindex(b"moov") - 8)
    data[media] = np.random.default_rng(0).bytes(media.stop - media.start)
    rotten.write_bytes(data)  # opens, and no frame of it can be decoded
    files = [good[0], text, rotten, good[1]]
    told = run("predict", root / "run", *files, "--out", out, "--video", code=1).splitlines()
    assert [(row["source"], bool(row["seen"])) for row in rows(out)] == [
        (str(path), path in good) for path in files if path != text
    ]
    assert {path.name for path in out.glob("*.mp4")} == {"000_first.mp4", "001_last.mp4"}
    assert told[-1].startswith("Error: 2 files could not be read: ")
    assert f"{text}: decode_error" in told[-1]
    assert f"{rotten}: decode_error" in told[-1]
    assert not any(str(path) in told[-1] for path in good)

    told = run("predict", root / "run", text, "--out", tmp_path / "none", code=1).splitlines()
    assert told[-1].startswith(f"Error: {text}: decode_error: ")
    words = (good[0], tmp_path / "a.mp4", tmp_path / "b.mp4", "--out", tmp_path / "none")
    assert f"{words[1]}, {words[2]}: no such file." in run("predict", root / "run", *words, code=1)
    assert not (tmp_path / "none").exists()


def test_too_short_a_file_is_refused_alone_and_left_out_of_several(tmp_path: Path) -> None:
    short, long = (write_video(tmp_path / f"{s}.mp4", seconds=s, sound=False) for s in (1, 3))
    wanted = wanted_clips([short, long], Spans(start_s=2))
    assert [clip.media["rgb"].path for clip in wanted.clips] == [long]
    assert (wanted.count, [*wanted.faults]) == (1, [short])
    with pytest.raises(ConfigError, match=r"--start 2: .*1.mp4 ends at 1.00 s"):
        wanted_clips([short], Spans(start_s=2))


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["nowhere", "{video}"], 1, "no trained model found"),
        (["{store}", "{video}"], 1, "small: is a feature store; give a run"),
        (["{run}", "nowhere.mp4"], 1, "no such file"),
        (["{run}", "{store}"], 2, "is a feature store; use `karmma evaluate`"),
        (["{run}", "{run}"], 2, "is a folder; give videos"),
        (["{run}", "{card}"], 1, "model.json"),
        (["{run}", "{video}", "--hop", "1"], 2, "needs --window"),
        (["{run}", "{video}", "--window", "0.001"], 2, "must be at least 0.01"),
        (
            ["nowhere", "{video}", "--drop", "2"],
            2,
            "--drop 2.0: must be a probability between 0 and 1",
        ),
        (["{run}", "{video}", "--start", "99"], 2, "ends at"),
        (["{run}", "{video}", "--without", "imu"], 2, "Error: --without 'imu': the model takes"),
        (["{run}", "{video}", "--weights", "rgb"], 2, "write MODALITY=FILE"),
        (["{run}", "{video}", "--weights", "imu=random:1"], 2, "no backbone for this modality"),
    ],
)
def test_bad_input_is_one_sentence(
    root: Path, tmp_path: Path, arguments: list[str], code: int, says: str
) -> None:
    places = {
        "run": root / "run",
        "store": root / "features/small",
        "video": next((root / "clips/videos").glob("*.mp4")),
        "card": root / "run/best/model.json",
    }
    told = run("predict", *(a.format(**places) for a in arguments), "--out", tmp_path, code=code)
    assert says in told
    assert [line for line in told.splitlines() if line.startswith("Error: ")] == [
        told.splitlines()[-1]
    ]


def test_spans_that_make_no_sense_and_imported_features_are_refused(
    root: Path, recognizer: Recognizer
) -> None:
    with pytest.raises(ConfigError, match="must be at least"):
        Spans(window_s=0)
    with pytest.raises(ConfigError, match="stop after it"):
        Spans(2, 1)
    with pytest.raises(ConfigError, match="rows of a manifest have their own"):
        wanted_clips([root / "clips/manifest.csv"], Spans(window_s=2))
    with pytest.raises(MediaError, match="no such file"):
        wanted_clips([root / "nowhere.mp4"], Spans())
    with pytest.raises(ConfigError, match="the model takes rgb, flow, audio"):
        next(recognizer.predict([], Dropout(("imu",)), workers=0))
    other = recognizer.card.model_copy(deep=True)
    other.provenance["rgb"]["weights_sha256"] = "0"
    with pytest.raises(ConfigError, match=r"rgb\.weights_sha256 was 0.* in training, now "):
        Recognizer(recognizer.model, other, recognizer.networks)
    imported = recognizer.card.model_copy(update={"provenance": {"rgb": {}}})
    model = open_model(root / "run")
    with pytest.raises(ConfigError, match="imported features"):
        recipe_of(replace(model, card=imported), {}, "cpu")
