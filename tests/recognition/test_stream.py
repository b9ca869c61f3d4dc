"""Live sensors get the answers that files get, and their failures cost only themselves."""

from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soxr
import torch
from support import chaos
from support.live import Signals, offline, tiny_recognizer

from karmma_pipeline.errors import ConfigError
from karmma_pipeline.extraction.decode import flow
from karmma_pipeline.extraction.inference import batching
from karmma_pipeline.recognition import sensors
from karmma_pipeline.recognition import stream as stream_module
from karmma_pipeline.recognition.recognizer import Recognizer

HZ = 16_000


@pytest.fixture(scope="module")
def recognizer() -> Recognizer:
    return tiny_recognizer()


def signals(seconds: float = 6.0) -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(0)
    times = np.arange(round(seconds * 25)) / 25
    sound = (rng.random(round(seconds * HZ), np.float32) - 0.5).astype(np.float32)
    return times, rng.integers(0, 256, (len(times), 20, 24, 3), np.uint8), sound


def feed(stream: Any, low_s: float, high_s: float, which: str = "rgb audio") -> None:
    times, pictures, sound = signals()
    if "rgb" in which:
        for t, picture in zip(times, pictures, strict=True):
            if low_s <= t < high_s:
                stream.push("rgb", t, picture)
    if "audio" in which:
        for first in range(round(low_s * HZ), round(high_s * HZ), HZ // 50):
            stream.push("audio", first / HZ, sound[first : first + HZ // 50])


def said(stream: Any, now_s: float) -> Any:
    prediction = stream.step(now_s)
    assert prediction is not None
    return prediction


def test_chaos_costs_no_answer_and_changes_none() -> None:
    outcome = chaos.run(200, 40, 1)
    assert outcome.farthest <= 1e-5
    assert outcome.compared >= 25
    assert set(outcome.reasons) >= {"stale", "gap", "dropped"}
    assert len(outcome.masks) >= 12  # of 15 subsets, and nothing at all
    assert all(outcome.ignored.values())


def test_sound_of_another_rate_is_resampled_as_a_whole_track_is(recognizer: Recognizer) -> None:
    times, pictures, _ = signals()
    own = np.sin(np.arange(6 * 44_100) / 20).astype(np.float32)
    stream = recognizer.stream(audio_hz=44_100)
    feed(stream, 0, 5.1, "rgb")
    for first in range(0, round(5.1 * 44_100), 1024):
        stream.push("audio", first / 44_100, own[first : first + 1024])
    track = soxr.resample(own, 44_100, HZ, quality="HQ")
    whole = Signals(times, pictures, track, HZ, 0.0)
    live = said(stream, 5.1)
    expected = offline(recognizer, whole, 3.0, 5.0, recognizer.modalities)
    for head, logits in live.logits.items():
        np.testing.assert_allclose(logits, expected.logits[head], atol=1e-5)


def test_the_jitter_of_a_clock_leaves_sound_whole_and_a_late_chunk_is_a_hole() -> None:
    rate, rng = 16_000, np.random.default_rng(0)
    track = rng.standard_normal(2 * rate).astype(np.float32)
    microphone = sensors.Microphone(rate, keep_s=10, tolerance_s=0.1)
    for n, chunk in enumerate(np.split(track, 20)):
        microphone.push(n / 10 + (rng.uniform(-0.01, 0.01) if n else 0), chunk)
    microphone.push(2.2, track[:rate])
    view = microphone.view(0, 3.2, 3.2)
    assert view is not None
    np.testing.assert_array_equal(view.sound(0, 2, rate), track)
    assert not view.sound(2.03, 2.17, rate).any()
    np.testing.assert_array_equal(view.sound(2.2, 3.2, rate), track[:rate])


def test_a_dead_sensor_is_absent_from_its_deadline_on(recognizer: Recognizer) -> None:
    stream = recognizer.stream(deadline_s={"rgb": 1.0, "audio": 0.3}, share=0.5)
    assert said(stream, 2.1).reasons == dict.fromkeys(recognizer.modalities, "no_data")
    feed(stream, 0, 3.0)
    assert said(stream, 3.1).reasons == {}
    late = said(stream, 3.6)
    assert late.reasons == {"audio": "stale"}
    assert said(stream, 4.1).reasons == dict.fromkeys(recognizer.modalities, "stale")
    feed(stream, 3.6, 5.6, "rgb")
    assert said(stream, 5.6).reasons == {"audio": "stale"}  # though its sound is long forgotten
    assert stream.skipped == 3


def test_a_sensor_that_covers_too_little_is_a_gap(recognizer: Recognizer) -> None:
    stream = recognizer.stream(share=0.9)
    feed(stream, 0, 1.0, "audio")
    feed(stream, 0, 2.1, "rgb")
    feed(stream, 1.4, 2.1, "audio")
    assert said(stream, 2.1).reasons == {"audio": "gap"}


def test_one_picture_for_ever_is_frozen_if_asked(recognizer: Recognizer) -> None:
    picture = np.full((20, 24, 3), 7, np.uint8)
    for frozen_s, expected in ((None, {}), (1.0, {"rgb": "frozen", "flow": "frozen"})):
        stream = recognizer.stream(frozen_s=frozen_s)
        for n in range(21):
            stream.push("rgb", n / 10, picture)
        reasons = dict(said(stream, 2.1).reasons)
        assert reasons == {**expected, "audio": "no_data"}


def test_a_slow_machine_skips_windows_and_counts_them(recognizer: Recognizer) -> None:
    stream = recognizer.stream(hop_s=0.1)
    assert said(stream, 2.13).clip.start_s == 0.0
    assert stream.step(2.15) is None
    assert stream.skipped == 0
    assert said(stream, 3.1).clip.start_s == pytest.approx(1.0)
    assert stream.skipped == 9
    assert stream.lag_s == pytest.approx(0.1)


@pytest.mark.parametrize("takes_s", [0.1, 0.7, 1.3, 5.0])
def test_a_window_waits_for_no_longer_than_a_hop_however_long_answers_take(
    recognizer: Recognizer, takes_s: float
) -> None:
    hop_s, tolerance_s, poll_s = 0.5, 0.1, 0.01
    stream = recognizer.stream(2.0, hop_s, tolerance_s=tolerance_s)
    now_s, places = 2.0 + tolerance_s, list[int]()
    while len(places) < 20:
        prediction = stream.step(now_s)
        if prediction is None:
            now_s += poll_s
            continue
        places.append(round((prediction.clip.start_s or 0.0) / hop_s))
        assert tolerance_s - 1e-6 <= stream.lag_s < tolerance_s + hop_s + poll_s
        now_s += takes_s
    assert stream.skipped == places[-1] + 1 - len(places)
    assert (stream.skipped == 0) == (takes_s < hop_s)


@pytest.mark.parametrize("takes_s", [0.1, 0.7, 1.3, 1.6, 1.85, 5.0])
def test_no_answer_is_later_than_a_window_unless_it_takes_that_long(
    recognizer: Recognizer, monkeypatch: pytest.MonkeyPatch, takes_s: float
) -> None:
    window_s, hop_s, tolerance_s, poll_s = 2.0, 0.5, 0.1, 0.01
    clock, real = [0.0], recognizer.answer

    def answer(*arguments: Any) -> Any:
        clock[0] += takes_s
        return real(*arguments)

    monkeypatch.setattr(recognizer, "answer", answer)
    monkeypatch.setattr(stream_module, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    stream = recognizer.stream(window_s, hop_s, tolerance_s=tolerance_s)
    stream.warm_up()
    clock[0] = window_s + tolerance_s + 0.37
    late_s, places = list[float](), list[int]()
    while len(places) < 20:
        prediction = stream.step(clock[0])
        if prediction is None:
            clock[0] += poll_s
            continue
        late_s.append(clock[0] - (prediction.clip.stop_s or 0.0))
        places.append(round((prediction.clip.start_s or 0.0) / hop_s))
    if takes_s + tolerance_s + poll_s <= window_s:
        assert max(late_s) <= window_s
    else:  # no window is let go where that helps nothing
        assert max(late_s) <= takes_s + tolerance_s + hop_s + poll_s
    assert stream.skipped == places[-1] + 1 - len(places)
    assert max(np.diff(places)) * hop_s <= takes_s + hop_s + 1e-6


def test_absent_modalities_cost_no_pass_and_pairs_are_measured_once(
    recognizer: Recognizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs: list[int] = []
    passes: list[int] = []

    def counted(real: Any, calls: list[int]) -> Any:
        def call(*arguments: Any) -> Any:
            calls.append(len(arguments[-1]))
            return real(*arguments)

        return call

    monkeypatch.setattr(sensors, "dis_flow", counted(flow.dis_flow, pairs))
    for network in recognizer.networks.all.values():
        monkeypatch.setattr(network, "tokens", counted(network.tokens, passes))
    stream = recognizer.stream(window_s=2, hop_s=0.5)
    feed(stream, 0, 2.1, "rgb")
    said(stream, 2.1)
    assert (len(pairs), len(passes)) == (4, 2)
    feed(stream, 2.1, 2.6, "rgb")
    said(stream, 2.6)
    assert len(pairs) == 5  # three of its four moments are those of the window before
    stream.switch("flow", on=False)
    feed(stream, 2.6, 3.1, "rgb")
    assert said(stream, 3.1).reasons == {"flow": "dropped", "audio": "no_data"}
    assert (len(pairs), len(passes)) == (5, 5)


@pytest.mark.parametrize(("shared_bytes", "threads"), [(4_000_000, 1), (0, 2)])
def test_small_networks_have_one_thread_and_large_ones_all(
    monkeypatch: pytest.MonkeyPatch, shared_bytes: int, threads: int
) -> None:
    """Threads wait for one another after every operation, which takes long on a busy machine."""
    monkeypatch.setattr(batching, "_SHARED_BYTES", shared_bytes)
    recognizer, had = tiny_recognizer(), list[int]()

    def seen(real: Any, clips: Any) -> Any:
        had.append(torch.get_num_threads())
        return real(clips)

    for network in recognizer.networks.all.values():
        monkeypatch.setattr(network, "tokens", partial(seen, network.tokens))
    with batching.threads_of_pass(2):
        stream = recognizer.stream(window_s=2, hop_s=0.5)
        had.clear()
        feed(stream, 0, 2.1)
        said(stream, 2.1)
        assert had == [threads] * 3
        assert torch.get_num_threads() == 2


def test_buffers_hold_no_more_than_a_window(recognizer: Recognizer) -> None:
    stream = recognizer.stream()
    feed(stream, 0, 6.0)
    said(stream, 5.6)
    assert len(stream._camera._shots) <= 2.5 * 25 + 1
    assert sum(len(p.samples) for p in stream._microphone._pieces) <= 4 * HZ


def test_a_clock_that_goes_back_begins_anew(recognizer: Recognizer) -> None:
    stream = recognizer.stream()
    feed(stream, 3.0, 6.0)
    said(stream, 5.6)
    assert stream.step(5.1) is None
    feed(stream, 0.0, 2.1)
    assert said(stream, 2.1).reasons == dict.fromkeys(recognizer.modalities, "no_data")
    feed(stream, 0.5, 2.6)
    assert said(stream, 2.6).reasons == {}


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda r: r.stream(window_s=0), "^window_s=0: must be"),
        (lambda r: r.stream(hop_s=float("nan")), "hop_s=nan"),
        (lambda r: r.stream(deadline_s={"imu": 1}), "no sensor 'imu'"),
        (lambda r: r.stream(share=2), "share=2"),
        (lambda r: r.stream(tolerance_s=-1), "tolerance_s=-1"),
        (lambda r: r.stream().push("imu", 0, np.zeros(3)), "sensors are rgb and audio"),
        (lambda r: r.stream().push("rgb", 0, np.zeros((4, 4), np.uint8)), r"\[H, W, 3\]"),
        (lambda r: r.stream().push("rgb", 0, np.zeros((4, 4, 1), np.uint8)), r"\(4, 4, 1\)"),
        (lambda r: r.stream().push("audio", 0, np.zeros(3, np.int16)), r"float32 array \[S\]"),
        (lambda r: r.stream().push("audio", 0, np.zeros((3, 2), np.float32)), "mono"),
        (lambda r: r.stream().switch("imu", on=True), "the model takes rgb, flow, audio"),
        (lambda r: r.stream().step(float("nan")), "seconds on the sensors' clock"),
    ],
)
def test_what_makes_no_sense_is_said(recognizer: Recognizer, call: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        call(recognizer)
