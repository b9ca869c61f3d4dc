import ctypes
import gc
import wave
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.lanes import slow_unless
from support.media_files import (
    LONG_RATE,
    RATE,
    Maker,
    long_video,
    over_report,
    read_counter,
    read_long_counter,
)

from karmma_pipeline.extraction.media.interface import MediaFaultError
from karmma_pipeline.extraction.media.media_file import MediaFile
from karmma_pipeline.extraction.types import Decoder
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


@pytest.mark.parametrize("name", ["-rf.ts", "a:b.ts", "with space.mp4", "ü.mp4", "%03d.mp4"])
def test_odd_names_are_files(make_video: Maker, name: str) -> None:
    file = MediaFile(make_video(name, sound=False))
    frames, _ = file.frames(np.array([0.5]))
    assert read_counter(frames[0]) == 12


@pytest.mark.parametrize("decoder", ["decord", "pyav"])
def test_the_left_view_of_stereo_pictures_is_half_as_wide(
    make_video: Maker, decoder: Decoder
) -> None:
    path, time = make_video(sound=False), np.array([0.5])
    both = MediaFile(path, decoder=decoder).frames(time)[0]
    left = MediaFile(path, decoder=decoder, left_half=True).frames(time)[0]
    assert both.shape[2] == 96
    np.testing.assert_array_equal(left, both[:, :, :48])


@pytest.mark.parametrize("audio_delay_s", [0.0, 0.5])
def test_sound_that_starts_late_stays_late(make_video: Maker, audio_delay_s: float) -> None:
    file = MediaFile(make_video(click_s=0.7, audio_delay_s=audio_delay_s))
    wanted = 0.7 + audio_delay_s
    assert click_at(file, wanted - 0.4, wanted + 0.4) == pytest.approx(wanted, abs=0.08)
    assert file.sound_span(RATE)[0] == pytest.approx(audio_delay_s, abs=0.07)


def test_the_level_of_sound_is_that_of_the_file(tmp_path: Path) -> None:
    t = np.arange(2 * 44_100) / 44_100
    left = (0.5 * np.sin(2 * np.pi * 1000 * t) * 32767).astype(np.int16)
    with wave.open(str(tmp_path / "tone.wav"), "wb") as file:
        file.setnchannels(2)
        file.setsampwidth(2)
        file.setframerate(44_100)
        file.writeframes(np.stack([left, np.zeros_like(left)], axis=1).tobytes())
    track = MediaFile(tmp_path / "tone.wav")
    wanted = 0.25 * np.sin(2 * np.pi * 1000 * np.arange(RATE) / RATE)  # the mean of two channels
    np.testing.assert_allclose(track.sound(0, 1, RATE)[50:], wanted[50:], atol=1e-3)
    assert track.audio_rate == 44_100


def test_headers_that_claim_more_than_there_is_are_not_believed(make_video: Maker) -> None:
    file = MediaFile(over_report(make_video("over.mp4")))
    assert file.stop_s == pytest.approx(2, abs=0.1)
    assert file.sound_span(RATE)[1] == pytest.approx(2, abs=0.1)
    assert read_counter(file.frames(np.array([1.5]))[0][0]) == 37


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("long") / "long.mp4"
    return long_video(path, minutes=20, rate=Fraction(60_000, 1001), click_s=1190.25)


@pytest.mark.slow
@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
@given(seconds=st.lists(st.floats(0, 1199), min_size=1, max_size=3))
@pytest.mark.parametrize("decoder", slow_unless({"pyav"}, ["decord", "pyav"]))
def test_twenty_minutes_in_it_is_still_the_right_frame(
    long: Path, seconds: list[float], decoder: Decoder
) -> None:
    numbers = np.floor(np.array([*seconds, 1190.0]) * 60_000 / 1001).astype(int)
    file = MediaFile(long, decoder=decoder)
    frames, real = file.frames((numbers + 0.5) * 1001 / 60_000)
    assert [read_long_counter(f) for f in frames] == numbers.tolist()
    np.testing.assert_allclose(real, numbers * 1001 / 60_000, atol=1e-3)
    file.close()


@pytest.mark.slow
def test_twenty_minutes_in_the_sound_is_still_in_its_place(long: Path) -> None:
    window = np.abs(MediaFile(long).sound(1189.9, 1190.6, LONG_RATE))
    assert 1189.9 + float(np.argmax(window)) / LONG_RATE == pytest.approx(1190.25, abs=0.05)


class _Malloc(ctypes.Structure):
    """What glibc's mallinfo2 returns."""

    _fields_ = [(name, ctypes.c_size_t) for name in ("arena", "a", "b", "c", "mapped", "d", "e")]
    _fields_ += [(name, ctypes.c_size_t) for name in ("used", "free", "top")]


def bytes_in_use() -> int:
    """Bytes that are allocated: resident memory would move with whatever else the system does."""
    gc.collect()  # PyAV's containers and streams hold one another
    info = ctypes.CDLL(None).mallinfo2
    info.restype = _Malloc
    found = info()
    return int(found.used + found.mapped)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="glibc tells of its memory")
@pytest.mark.parametrize("decoder", slow_unless({"pyav"}, ["decord", "pyav"]))
def test_memory_stays_flat_over_many_files(make_video: Maker, decoder: Decoder) -> None:
    paths = [make_video(f"{n}.mp4") for n in range(4)]

    def open_all() -> int:
        for path in paths * 5:
            file = MediaFile(path, decoder=decoder)
            file.frames(np.array([0.5, 1.5]))
            file.sound(0.5, 1.5, RATE)
            file.close()
        return bytes_in_use()

    open_all()  # what is remembered for good
    before = open_all()
    assert (open_all() - before) / 20 < 20_000  # a file that is not closed takes a megabyte
