"""Sensors of numbers, live: resampled and cut into windows as those of files, and absent alone."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from support.live import Signals, offline, tiny_recognizer

from karmma_pipeline.errors import ConfigError
from karmma_pipeline.recognition.recognizer import Recognizer
from karmma_pipeline.recognition.stream import Stream

HZ = 100.0
IMU = {"channels": 3, "source_hz": HZ, "rate_hz": 20, "windows": 4, "window": 8}


@pytest.fixture(scope="module")
def recognizer() -> Recognizer:
    return tiny_recognizer(sensors={"imu": IMU})


def series(seconds: float = 6.0) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return times [S] and noise [S, 3] that a lower rate cannot hold all of."""
    times = np.arange(round(seconds * HZ)) / HZ
    return times, np.random.default_rng(0).standard_normal((len(times), 3)).cumsum(axis=0) / 5


def whole(times: Any, values: Any) -> Signals:
    return Signals([], [], np.zeros(0, np.float32), 16_000, 0.0, {"imu": (times, values)})


def said(stream: Stream, now_s: float) -> Any:
    prediction = stream.step(now_s)
    assert prediction is not None
    return prediction


def same(live: Any, offline: Any) -> None:
    assert live.mask["imu"]
    for head, logits in offline.logits.items():
        np.testing.assert_array_equal(live.logits[head], logits)


@pytest.mark.parametrize("block", [1, 7, 100])
def test_a_window_is_that_of_the_series_as_far_as_it_has_come(
    recognizer: Recognizer, block: int
) -> None:
    times, values = series()
    stream, sent = recognizer.stream(window_s=2, hop_s=0.5), 0
    for now_s in np.arange(2.1, 5.6, 0.5):
        while sent < len(times) and times[sent] < now_s:
            part = slice(sent, min(sent + block, int(np.searchsorted(times, now_s))))
            rows = (times[part], values[part]) if block > 1 else (times[sent], values[sent])
            stream.push("imu", *rows)
            sent = part.stop
        live = said(stream, float(now_s))
        start_s, here = live.clip.start_s, times < now_s
        same(
            live,
            offline(recognizer, whole(times[here], values[here]), start_s, start_s + 2, ["imu"]),
        )
    assert stream.skipped == 0


def test_a_window_is_that_of_the_whole_series_once_its_filter_has_seen_what_follows(
    recognizer: Recognizer,
) -> None:
    times, values = series()
    stream = recognizer.stream(window_s=2, hop_s=0.5, tolerance_s=1.2, deadline_s=2)
    order = np.random.default_rng(1).permutation(int(5.2 * HZ))
    for n in order.tolist():  # in any order
        stream.push("imu", times[n], values[n])
    live = said(stream, 5.2)
    assert live.clip.start_s == 2.0
    same(live, offline(recognizer, whole(times, values), 2.0, 4.0, ["imu"]))


def fed(recognizer: Recognizer, keep: Any, **settings: Any) -> Any:
    """Return what is said at 2.1 s of the samples that are kept."""
    times, values = series()
    stream = recognizer.stream(window_s=2, **settings)
    chosen = keep(times) & (times < 2.1)
    stream.push("imu", times[chosen], values[chosen])
    return said(stream, 2.1)


@pytest.mark.parametrize(
    ("keep", "settings", "reason"),
    [
        (lambda t: t < 0, {}, "no_data"),
        (lambda t: t < 1.5, {}, "stale"),
        (lambda t: t < 1.5, {"deadline_s": {"imu": 2}}, "gap"),
        (lambda t: (t < 0.9) | (t > 1.2), {}, "gap"),  # 0.3 s: more than max_gap_s bridges
        (lambda t: (t * 100).round() % 4 == 0, {}, "gap"),  # three of four are missing
        (lambda t: t == t[150], {"deadline_s": 5}, "gap"),
        (lambda t: t >= 0, {"limits": {"imu": (-0.01, 0.01)}}, "out_of_range"),
        (lambda t: t >= 0, {"limits": {"imu": (-1e3, 1e3)}}, None),
        (lambda t: (t < 0.9) | (t > 1.1), {}, None),
        (lambda t: t >= 0, {}, None),
    ],
)
def test_a_sensor_that_fails_is_absent_with_a_reason(
    recognizer: Recognizer, keep: Any, settings: dict[str, Any], reason: str | None
) -> None:
    reasons = dict(fed(recognizer, keep, **settings).reasons)
    others = dict.fromkeys(("rgb", "flow", "audio"), "no_data")
    assert reasons == others | ({} if reason is None else {"imu": reason})


def test_a_window_shorter_than_the_sensors_own_is_too_short(recognizer: Recognizer) -> None:
    times, values = series()
    stream = recognizer.stream(window_s=0.3)
    stream.push("imu", times, values)
    assert said(stream, 1.0).reasons["imu"] == "too_short"


def test_bad_samples_cost_themselves_alone(recognizer: Recognizer) -> None:
    times, values = series()
    clean, stream = recognizer.stream(), recognizer.stream()
    for one in (clean, stream):
        one.push("imu", times[:210], values[:210])
        said(one, 2.1)
    zeros = np.zeros(3)
    stream.push("imu", 2.105, np.array([0.0, np.nan, 0.0]))
    stream.push("imu", np.nan, zeros)
    stream.push("imu", times[100], zeros)  # of a moment that is known already
    stream.push("imu", -5.0, zeros)
    stream.push("imu", 1e9, zeros)
    for one in (clean, stream):
        one.push("imu", times[210:260], values[210:260])
    stream.push("imu", 3.0, zeros)
    expected, live = said(clean, 2.6), said(stream, 2.6)
    same(live, expected)
    assert (clean.ignored["imu"], stream.ignored["imu"]) == (0, 6)


@pytest.mark.parametrize("sensor", ["rgb", "audio", "imu"])
def test_one_time_stamp_gone_astray_before_the_first_step_pushes_nothing_out(
    recognizer: Recognizer, sensor: str
) -> None:
    """Until somebody asks, nothing says what the time is."""
    stream = recognizer.stream(window_s=1)
    values: dict[str, Any] = {
        "rgb": np.zeros((20, 24, 3), np.uint8),
        "audio": np.zeros(640, np.float32),
        "imu": np.zeros(3),
    }
    hz = {"rgb": 25, "audio": 25, "imu": 100}[sensor]
    for n in range(round(1.1 * hz)):
        stream.push(sensor, n / hz, values[sensor])
        if n == hz // 2:
            stream.push(sensor, 1e6, values[sensor])
    assert sensor not in said(stream, 1.1).reasons
    assert stream.ignored[sensor] == 1


def test_what_is_kept_is_a_window_and_what_its_filter_needs(recognizer: Recognizer) -> None:
    stream = recognizer.stream()
    for second in range(60):
        times = second + np.arange(100) / HZ
        stream.push("imu", times, np.ones((100, 3)))
        stream.step(second + 1.0)
    assert len(stream._samples["imu"]._times) <= (2 + 1 + 0.1 + 0.5 + 1.2 + 1) * HZ


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda r: r.stream().push("gaze", 0, np.zeros(2)), "sensors are rgb, audio and imu"),
        (lambda r: r.stream().push("imu", 0, np.zeros(2)), r"expected \[3\] values"),
        (lambda r: r.stream().push("imu", np.zeros(4), np.zeros((5, 3))), r"\(5, 3\) for \(4,\)"),
        (lambda r: r.stream().push("imu", 0, ["x", "y", "z"]), "expected numbers"),
        (lambda r: r.stream().push("audio", np.zeros(4), np.zeros(4)), "a single time"),
        (lambda r: r.stream(limits={"gaze": (0, 1)}), "limits: 'gaze'.* the model has imu"),
        (lambda r: r.stream(limits={"imu": (1, 0)}), "write the lowest value first"),
        (lambda r: r.stream(deadline_s={"gaze": 1}), "sensors are rgb, audio and imu"),
    ],
)
def test_what_makes_no_sense_is_said(recognizer: Recognizer, call: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        call(recognizer)
