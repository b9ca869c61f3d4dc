"""`karmma live`: a video plays into a stream; the terminal and a page show what is recognised."""

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from support.live import tiny_recognizer, tiny_run
from support.media_files import write_video

from karmma_pipeline.cli import main
from karmma_pipeline.errors import ConfigError
from karmma_pipeline.jobs import StopFlag
from karmma_pipeline.recognition import latency
from karmma_pipeline.recognition.live import Failures, at_its_rate
from karmma_pipeline.recognition.page import LivePage

IMU = {"channels": 3, "source_hz": 100, "rate_hz": 20, "windows": 2, "window": 8}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("live")
    tiny_run(root / "run")
    write_video(root / "video.mp4", seconds=5)
    return root


def live(root: Path, *options: object, code: int = 0) -> list[str]:
    result = CliRunner().invoke(main, ["live", str(root / "run"), *map(str, options)])
    assert result.exit_code == code, result.output
    return result.stdout.splitlines()


def test_a_video_is_answered_window_by_window(root: Path) -> None:
    video = root / "video.mp4"
    said = live(root, "--source", video, "--fast", "--window", 2, "--hop", 1, "--without", "flow")
    spans = [line.split(" s:")[0] for line in said[:-1]]
    assert spans == [f"video.mp4 {n}.00-{n + 2}.00" for n in range(len(spans))]
    assert len(spans) >= 3
    assert all("no flow: dropped" in line for line in said[:-1])
    assert said[-1] == "windows skipped: 0"


def test_chaos_is_the_same_for_the_same_seed(root: Path) -> None:
    options = ("--source", root / "video.mp4", "--fast", "--hop", 0.5, "--chaos", 0.6)
    first = live(root, *options, "--seed", 3)
    assert first == live(root, *options, "--seed", 3)
    assert any("stale" in line or "gap" in line or "no_data" in line for line in first)
    assert first != live(root, *options, "--seed", 4)


def test_what_plays_at_its_rate_is_answered_to_its_end() -> None:
    stream = tiny_recognizer().stream(window_s=0.3, hop_s=0.1, tolerance_s=0.0)
    frames = [(n / 50, "rgb", n / 50, np.full((20, 24, 3), n, np.uint8)) for n in range(25)]
    shown: list[Any] = []
    answers = [*at_its_rate(stream, iter(frames), Failures(0, 0), shown.append, StopFlag())]
    assert len(shown) == 25
    starts = [answer.prediction.clip.start_s for answer in answers]
    assert all(answer.late_s > 0 for answer in answers)
    assert starts == sorted(set(starts))
    assert len(answers) + stream.skipped >= 2  # however slow the machine is


def test_a_sources_fault_ends_what_plays_at_its_rate() -> None:
    def faulty() -> Iterator[Any]:
        yield 0.0, "rgb", 0.0, np.zeros((20, 24, 3), np.uint8)
        raise ValueError("broken")

    stream = tiny_recognizer().stream(window_s=0.3, hop_s=0.1)
    with pytest.raises(ValueError, match="broken"):
        list(at_its_rate(stream, faulty(), Failures(0, 0), lambda picture: None, StopFlag()))


def test_a_warm_stream_has_had_a_pass_of_every_network_and_holds_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recognizer = tiny_recognizer(sensors={"imu": IMU})
    seen: list[Any] = []
    real = recognizer.answer

    def answer(*arguments: Any) -> Any:
        seen.append(real(*arguments))
        return seen[-1]

    monkeypatch.setattr(recognizer, "answer", answer)
    stream = recognizer.stream(window_s=1)
    stream.warm_up()
    assert [one.mask for one in seen] == [dict.fromkeys(recognizer.modalities, True)]
    cold = stream.step(1.1)
    assert cold is not None
    assert set(cold.reasons.values()) == {"no_data"}


def test_a_window_that_a_sensor_does_not_fit_into_is_not_measured() -> None:
    some = latency.latencies(tiny_recognizer(sensors={"imu": IMU}), 0.3, 0.1, StopFlag())
    with pytest.raises(ConfigError, match=r"--window 0.3: a modality is absent: imu \(too_short\)"):
        next(some)


def test_measuring_times_every_subset_and_plays_hops_until_one_is_missed(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latency, "_LEAST", 2)
    monkeypatch.setattr(latency, "_SECONDS", 0.0)
    outcomes = iter([3, 0, 0, 1])

    def play(stream: Any, stop: Any) -> latency.Played:
        return latency.Played(stream.settings.hop_s, 10, next(outcomes), 0.1)

    monkeypatch.setattr(latency, "_play", play)
    said = live(root, "--measure", "--window", 1)
    assert [line.split(":")[0] for line in said[:7]] == [
        *("rgb+flow+audio", "rgb+flow", "rgb+audio", "flow+audio", "rgb", "flow", "audio")
    ]
    assert all("(2 predictions)" in line for line in said[:7])
    hops = [float(line.split()[1]) for line in said[7:11]]
    assert hops[1] > hops[0]
    assert hops[2:] == pytest.approx([hops[1] / 2, hops[1] / 4], rel=0.01)
    assert said[11].startswith(f"smallest hop sustained in real time: {hops[2]:g} s")
    assert len(said) == 12


def test_an_answer_that_takes_longer_than_its_window_is_said_to(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = latency.Latency(("rgb",), 12, 2.3, 2.5)
    monkeypatch.setattr(latency, "latencies", lambda *_: iter([slow]))
    monkeypatch.setattr(latency, "play_hops", lambda *_: iter([latency.Played(2.5, 10, 0, 2.6)]))
    assert "2.5 s late, more than the window of 2 s" in live(root, "--measure", "--window", 2)[-1]


def test_what_is_played_to_measure_is_answered_or_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(latency, "_LEAST_PLAYED", 3)
    monkeypatch.setattr(latency, "_PLAYED_S", 0.3)
    played = latency._play(tiny_recognizer().stream(window_s=0.3, hop_s=0.1), StopFlag())
    assert played.answered >= 1
    assert played.answered + played.skipped >= 3
    assert played.late_s > 0


def ask(address: str, body: bytes | None = None, **headers: str) -> tuple[int, bytes]:
    try:
        request = urllib.request.Request(address, body, headers)  # noqa: S310
        with urllib.request.urlopen(request, timeout=60) as response:  # noqa: S310
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        error.close()
        return error.code, b""


def test_the_page_shows_answers_and_switches_to_who_knows_its_token() -> None:
    switched: list[tuple[str, bool]] = []
    with LivePage(lambda modality, on: switched.append((modality, on))) as page:
        page.show_picture(np.zeros((40, 1300, 3), np.uint8))
        page.show({"said": "take cup"})
        assert b"EventSource" in ask(page.address)[1]
        assert ask(page.address + "picture?1")[1].startswith(b"\xff\xd8")
        with urllib.request.urlopen(page.address + "answers", timeout=60) as events:  # noqa: S310
            assert json.loads(events.readline().removeprefix(b"data: ")) == {"said": "take cup"}
        off = b'{"modality": "rgb", "on": false}'
        assert ask(page.address + "switch", off)[0] == 200
        assert switched == [("rgb", False)]
        stranger = page.address.replace(page.token, "x" * 22)
        assert [ask(stranger + place)[0] for place in ("", "answers", "picture")] == [404] * 3
        assert ask(stranger + "switch", off)[0] == 404
        assert ask(page.address, Host="evil.example")[0] == 404
        assert ask(page.address + "switch", b"[]")[0] == 400
        assert ask(page.address + "other")[0] == 404
        assert switched == [("rgb", False)]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ((), "give either --source VIDEO or --camera NUMBER"),
        (("--source", "a.mp4", "--camera", "0"), "give either"),
        (("--source", "nowhere.mp4"), "no such file"),
        (("--source", "{run}/model.json"), "model.json"),
        (("--source", "{run}"), "run: is a folder; give a video"),
        (("--camera", "77"), "--camera 77: no such camera"),
        (("--camera", "-1"), "-1 is not in the range"),  # OpenCV crashes
        (("--camera", "0", "--fast"), "only for --source"),
        (("--camera", "0", "--measure"), "omit --source and --camera"),
        (("--source", "{video}", "--hop", "0"), "Error: --hop 0.0: must be"),
        (("--measure", "--window", "1e300"), "Error: --window 1e+300: must be from 0.001 to 3600"),
        (("--source", "{video}", "--deadline", "0"), "Error: --deadline 0.0: must be"),
        (("--source", "{video}", "--chaos", "0.5", "--seed", "-1"), "-1 is not in the range"),
        (("--source", "{video}", "--chaos", "2"), "--chaos 2.0"),
        (("--source", "{video}", "--without", "imu"), "Error: --without 'imu': the model takes"),
    ],
)
def test_bad_input_is_one_sentence(root: Path, options: tuple[str, ...], says: str) -> None:
    places = {"run": root / "run", "video": root / "video.mp4"}
    result = CliRunner().invoke(
        main, ["live", str(root / "run"), *(o.format(**places) for o in options)]
    )
    assert result.exit_code in {1, 2}
    assert says in result.output
    assert result.output.splitlines()[-1].startswith("Error: ")
