from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.media_files import RATE, Maker, read_counter

from karmma_pipeline.extract.faults import MediaFaultError
from karmma_pipeline.extract.media import MediaFile
from karmma_pipeline.modalities import Reason


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 10**6), fps=st.sampled_from([12, 25, 30_000 / 1001, 60_000 / 1001]))
def test_the_frame_at_a_time_is_the_one_shown_then(
    make_video: Maker, seed: int, fps: float
) -> None:
    rng = np.random.default_rng(seed)
    file = MediaFile(make_video(fps=fps, sound=False))
    inside = rng.uniform(0.05, 0.95, 5)  # never on a border between two frames
    numbers = rng.integers(0, round(2 * fps), 5)
    frames, real = file.frames((numbers + inside) / fps)
    assert [read_counter(f) for f in frames] == numbers.tolist()
    np.testing.assert_allclose(real, numbers / fps, atol=1e-3)


def test_at_a_variable_frame_rate_too(make_video: Maker) -> None:
    times = [0, 0.04, 0.08, 1.0, 1.04, 1.9, 1.94]
    frames, real = MediaFile(make_video(times=times)).frames(np.array([0.5, 1.02, 1.5, 1.92]))
    assert [read_counter(f) for f in frames] == [2, 3, 4, 5]
    np.testing.assert_allclose(real, [0.08, 1.0, 1.04, 1.9], atol=1e-3)


def test_times_outside_the_file_get_its_border_frames(make_video: Maker) -> None:
    frames, _ = MediaFile(make_video()).frames(np.array([-1.0, 99.0]))
    assert [read_counter(f) for f in frames] == [0, 49]


def click_at(file: MediaFile, start_s: float, stop_s: float) -> float:
    window = np.abs(file.sound(start_s, stop_s, RATE))
    return start_s + float(np.argmax(window)) / RATE


@pytest.mark.parametrize("delay", [0.0, 0.5])
def test_picture_and_sound_share_a_clock_when_the_picture_starts_late(
    make_video: Maker, delay: float
) -> None:
    file = MediaFile(make_video(click_s=1.2, video_delay_s=delay))
    assert click_at(file, 0.9, 1.6) == pytest.approx(1.2, abs=0.08)
    frames, _ = file.frames(np.array([1.21]))
    assert read_counter(frames[0]) == int((1.21 - delay) * 25)


def test_a_time_on_a_border_is_the_frame_that_starts_then(make_video: Maker) -> None:
    times = np.arange(50) / 25
    frames, _ = MediaFile(make_video()).frames(times)
    assert [read_counter(f) for f in frames] == list(range(50))


def test_sound_past_the_track_is_silence(make_video: Maker) -> None:
    file = MediaFile(make_video(click_s=1.9))
    window = file.sound(1.8, 3.8, RATE)
    assert len(window) == 2 * RATE
    assert window[:RATE].any()
    assert not window[RATE:].any()
    assert not file.sound(50, 51, RATE).any()
    start, stop = file.sound_span(RATE)
    assert start == 0
    assert stop == pytest.approx(2, abs=0.1)


def reasons(path: Path) -> tuple[Reason, Reason]:
    found = []
    for stream in ("video", "audio"):
        try:
            if stream == "video":
                MediaFile(path).frames(np.array([0.5]))
            else:
                MediaFile(path).sound(0.2, 0.8, RATE)
            found.append(Reason.PRESENT)
        except MediaFaultError as fault:
            found.append(fault.reason)
    return found[0], found[1]


def test_each_fault_has_its_reason(make_video: Maker, tmp_path: Path) -> None:
    fine = make_video("fine.mp4")
    assert reasons(fine) == (Reason.PRESENT, Reason.PRESENT)
    assert reasons(make_video("mute.mp4", sound=False)) == (Reason.PRESENT, Reason.NO_STREAM)
    assert reasons(make_video("radio.mp4", video=False)) == (Reason.NO_STREAM, Reason.PRESENT)
    assert reasons(tmp_path / "gone.mp4") == (Reason.FILE_MISSING, Reason.FILE_MISSING)
    broken = (Reason.DECODE_ERROR, Reason.DECODE_ERROR)
    (tmp_path / "empty.mp4").touch()
    assert reasons(tmp_path / "empty.mp4") == broken
    (tmp_path / "page.mp4").write_text("<!doctype html><html><body>404</body></html>")
    assert reasons(tmp_path / "page.mp4") == broken
    (tmp_path / "cut.mp4").write_bytes(fine.read_bytes()[: fine.stat().st_size // 2])
    assert reasons(tmp_path / "cut.mp4") == broken


def test_a_single_frame_is_a_video(make_video: Maker) -> None:
    frames, _ = MediaFile(make_video(times=[0.0])).frames(np.array([0.0, 0.02]))
    assert [read_counter(f) for f in frames] == [0, 0]


@pytest.mark.parametrize(
    "playlist",
    ["ffconcat version 1.0\nfile secret.mp4\n", "#EXTM3U\n#EXT-X-ENDLIST\nsecret.mp4\n"],
)
def test_a_playlist_does_not_open_other_files(
    make_video: Maker, tmp_path: Path, playlist: str
) -> None:
    make_video("secret.mp4")
    (tmp_path / "list.mp4").write_text(playlist)
    assert reasons(tmp_path / "list.mp4") == (Reason.REFUSED, Reason.REFUSED)


@pytest.mark.parametrize("name", ["-rf.mp4", "a:b.mp4", "with space.mp4", "ü.mp4"])
def test_odd_names_are_files(make_video: Maker, name: str) -> None:
    assert reasons(make_video(name)) == (Reason.PRESENT, Reason.PRESENT)
