"""Sound of media files stays beside the pictures: by its time stamps, however long it is."""

from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any
from wave import open as open_wave

import av
import numpy as np
import pytest

from karmma_pipeline.extraction.media.interface import MediaFaultError
from karmma_pipeline.extraction.media.media_file import MediaFile
from karmma_pipeline.modalities import Reason

RATE = 16_000
BLOCK = 800


def write_blocks(path: Path, wave: np.ndarray, starts: Iterable[float]) -> Path:
    """Write sound in blocks of 50 ms, each at its own time in seconds."""
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("pcm_s16le", rate=RATE, layout="mono")
        for block, start_s in zip(wave.reshape(-1, BLOCK), starts, strict=True):
            samples = np.round(block * 32767).astype(np.int16)[None]
            frame = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
            frame.sample_rate, frame.time_base = RATE, Fraction(1, RATE)
            frame.pts = round(start_s * RATE)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def clicks(seconds: float, at_s: Iterable[float]) -> np.ndarray:
    wave = np.zeros(round(seconds * RATE))
    for t in at_s:
        wave[round(t * RATE) : round(t * RATE) + 40] = 0.9
    return wave


def loudest(file: MediaFile, about_s: float, rate: int = RATE) -> float:
    """Return when it is loudest within half a second."""
    window = np.abs(file.sound(about_s - 0.5, about_s + 0.5, rate))
    assert window.max() > 0.2
    return about_s - 0.5 + float(np.argmax(window)) / rate


@pytest.mark.parametrize("pace", [0.99, 1.01])
def test_a_clock_that_drifts_does_not_part_sound_and_picture(tmp_path: Path, pace: float) -> None:
    wave = clicks(120, [5.025, 60.025, 116.025])
    starts = np.arange(len(wave) // BLOCK) * BLOCK / RATE * pace
    file = MediaFile(write_blocks(tmp_path / "v.mkv", wave, starts))
    for t in (5.025, 60.025, 116.025):
        assert loudest(file, t * pace) == pytest.approx(t * pace, abs=0.05)
    assert file.sound_span(RATE)[1] == pytest.approx(120 * pace, abs=0.1)


def test_holes_are_silent_and_overlaps_are_heard_once(tmp_path: Path) -> None:
    wave = clicks(6, [1.02, 2.52, 4.52])
    steps = np.full(120, 0.05)
    steps[39] += 1.0  # a second is missing after 2 s
    steps[60:76] -= 0.025  # then 0.4 s too much is sent
    starts = np.concatenate([[0.0], np.cumsum(steps)[:-1]])
    file = MediaFile(write_blocks(tmp_path / "v.mkv", wave, starts))
    for t, moved in ((1.02, 0.0), (2.52, 1.0), (4.52, 0.6)):
        assert loudest(file, t + moved) == pytest.approx(t + moved, abs=0.04)
    assert not file.sound(2.05, 2.95, RATE).any()


def write_mp3(path: Path, rate: int) -> bytes:
    t = np.arange(2 * rate) / rate
    wave = 0.5 * np.sin(2 * np.pi * 500 * t) * (np.abs(t - 1) < 0.05)
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libmp3lame", rate=rate, layout="mono")
        frame = av.AudioFrame.from_ndarray(wave[None].astype(np.float32), "fltp", "mono")
        frame.sample_rate = rate
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path.read_bytes()


def test_a_track_that_changes_its_rate_is_heard_to_its_end(tmp_path: Path) -> None:
    joined = b"".join(write_mp3(tmp_path / f"{rate}.mp3", rate) for rate in (44_100, 48_000))
    (tmp_path / "joined.mp3").write_bytes(joined)
    file = MediaFile(tmp_path / "joined.mp3")
    assert file.sound_span(RATE)[1] == pytest.approx(4.1, abs=0.15)
    for t in (1.0, 3.1):
        window = file.sound(t - 0.5, t + 0.5, RATE)
        heard = np.flatnonzero(np.abs(window) > 0.2) / RATE + t - 0.5
        assert heard.mean() == pytest.approx(t, abs=0.1)
        crossings = np.count_nonzero(np.diff(np.signbit(window[np.abs(window) > 1e-3])))
        assert crossings == pytest.approx(2 * 500 * 0.1, rel=0.15)  # the tone keeps its pitch


@pytest.mark.parametrize(
    ("layout", "codec"),
    # MOV says in an order of its own where the channels of 7.1 lie.
    [("7.1", "aac"), ("5.1", "aac"), ("7.1", "flac"), ("7.1", "pcm_s16le"), ("6.1", "pcm_s16le")],
)
def test_sound_of_many_channels_is_their_mean(tmp_path: Path, layout: str, codec: str) -> None:
    channels = len(av.AudioLayout(layout).channels)
    tone = 0.5 * np.sin(2 * np.pi * 400 * np.arange(2 * 48_000) / 48_000)
    wave = np.tile(tone, (channels, 1))
    whole = codec in {"flac", "pcm_s16le"}
    path = tmp_path / ("v.mov" if codec == "pcm_s16le" else "v.mkv")
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=48_000, layout=layout)
        for number, block in enumerate(np.split(wave, 100, axis=1)):
            packed = block.T.reshape(1, -1)
            if whole:
                samples = np.round(packed * 32767).astype(np.int16)
                frame = av.AudioFrame.from_ndarray(samples, "s16", layout)
            else:
                frame = av.AudioFrame.from_ndarray(packed.astype(np.float32), "flt", layout)
            frame.sample_rate, frame.time_base = 48_000, Fraction(1, 48_000)
            frame.pts = number * block.shape[1]
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    heard = MediaFile(path).sound(0.5, 1.5, RATE)
    assert heard.std() == pytest.approx(0.5 / 2**0.5, rel=0.1 if whole else 0.25)


def test_a_track_without_any_sample_is_none(tmp_path: Path) -> None:
    path = tmp_path / "v.wav"
    with open_wave(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
    for _ in range(2):  # the second clip of a task meets a track that was read
        with pytest.raises(MediaFaultError, match="its audio track is empty") as caught:
            MediaFile(path).sound_span(RATE)
        assert caught.value.reason is Reason.NO_STREAM


def test_little_of_a_long_track_is_kept_and_nothing_of_it_changes(tmp_path: Path) -> None:
    wave = np.random.default_rng(0).normal(0, 0.1, 60 * RATE)
    path = write_blocks(tmp_path / "v.mkv", wave, np.arange(len(wave) // BLOCK) * 0.05)
    spans = [(50.0, 51.0), (3.0, 4.5), (20.0, 21.0), (19.0, 22.0), (59.5, 61.0)]
    wanted = [MediaFile(path).sound(a, b, 24_000) for a, b in spans]
    file = MediaFile(path, sound_kept_s=5)
    assert file.sound_span(24_000)[1] == pytest.approx(60, abs=0.01)
    for (a, b), sound in zip(spans, wanted, strict=True):
        np.testing.assert_array_equal(file.sound(a, b, 24_000), sound)
        kept = sum(len(piece) for _, piece in file._track(24_000)._pieces)
        assert kept <= (5 + 8) * 24_000
