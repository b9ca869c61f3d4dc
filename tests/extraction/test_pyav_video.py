"""Pictures by number and by time, of every format; decord where it is sure to give the same."""

import gc
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.video.frame import VideoFrame
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.media_files import Maker, read_counter, turn, write_video

from karmma_pipeline.extraction.media.interface import MediaFaultError
from karmma_pipeline.extraction.media.media_file import MediaFile
from karmma_pipeline.extraction.media.pyav_video import PyavVideo
from karmma_pipeline.modalities import Reason

VARIABLE = [0, 0.04, 0.08, 1.0, 1.04, 1.9, 1.94]
KINDS: dict[str, dict[str, Any]] = {
    "constant.mp4": {"seconds": 3.0},
    "ntsc.mp4": {"fps": 60_000 / 1001},
    "variable.mp4": {"times": VARIABLE},
    "late.mp4": {"video_delay_s": 0.5},
    "matroska.mkv": {"fps": 12},
    "vp9.webm": {"codec": "libvpx-vp9", "sound": False, "seconds": 1.0},
    "transport.ts": {"seconds": 3.0},
    "program.mpg": {"codec": "mpeg2video", "sound": False, "times": np.arange(60) / 25},
    "riff.avi": {"codec": "mpeg4", "sound": False, "times": np.arange(40) / 25},
}


@pytest.fixture(scope="module", params=KINDS)
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("kinds") / request.param, **KINDS[request.param])


def test_both_decoders_give_the_same_frames_at_the_same_times(path: Path) -> None:
    one, other = MediaFile(path), MediaFile(path, decoder="decord")
    if path.suffix not in {".mp4", ".mkv", ".webm"}:
        with pytest.raises(MediaFaultError, match="use video_decoder: pyav"):
            _ = other.stop_s
        return
    np.testing.assert_allclose(one.frame_starts, other.frame_starts, atol=2e-4)
    assert one.stop_s == pytest.approx(other.stop_s, abs=2e-3)
    numbers = np.arange(len(one.frame_starts))
    for (n, a), (m, b) in zip(one.decode(numbers), other.decode(numbers), strict=True):
        assert n == m == read_counter(a) == read_counter(b)
        assert np.abs(a.astype(int) - b).max() <= 2


def test_pictures_and_decoders_are_let_go_of_without_the_garbage_collector(tmp_path: Path) -> None:
    path = write_video(tmp_path / "v.mp4", seconds=8.0, sound=False)

    def kept() -> list[str]:
        return [type(o).__name__ for o in gc.get_objects() if type(o) in {VideoFrame, PyavVideo}]

    gc.collect()
    before = kept()
    gc.disable()
    try:
        file = MediaFile(path)
        assert len(list(file.decode(np.arange(2)))) == 2
        file.close()
        del file
        assert kept() == before
    finally:
        gc.enable()


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_random_frames_in_any_order_of_clips_are_the_ones_asked_for(
    path: Path, data: st.DataObject
) -> None:
    file = MediaFile(path)
    last = len(file.frame_starts) - 1
    for _ in range(3):
        numbers = np.array(data.draw(st.lists(st.integers(0, last), min_size=1, max_size=6)))
        found = {n: read_counter(picture) for n, picture in file.decode(numbers)}
        assert found == {n: n for n in sorted(set(numbers.tolist()))}


def test_rotation_flags_are_applied(make_video: Maker) -> None:
    plain = MediaFile(make_video("plain.mp4", sound=False)).frames(np.array([0.5]))[0][0]
    turned = MediaFile(turn(make_video("turned.mp4", sound=False)))
    picture = turned.frames(np.array([0.5]))[0][0]
    np.testing.assert_array_equal(picture, np.rot90(plain, -1))  # clockwise


def test_av1_is_read(make_video: Maker) -> None:
    path = make_video("av1.mkv", codec="libsvtav1", sound=False, seconds=1.0)
    file = MediaFile(path)
    frames, _ = file.frames(np.array([0.02, 0.5, 0.9]))
    assert [read_counter(f) for f in frames] == [0, 12, 22]


def test_a_file_that_was_cut_gives_what_can_be_read(make_video: Maker) -> None:
    path = make_video("cut.mp4", seconds=8.0, index_first=True)
    data = path.read_bytes()
    media = data.index(b"mdat")
    path.write_bytes(data[: media + int(0.6 * (len(data) - media))])
    file = MediaFile(path)
    assert 2 < file.stop_s < 7
    times = np.linspace(0.01, file.stop_s - 0.05, 20)
    frames, real = file.frames(times)
    assert [read_counter(f) for f in frames] == np.floor(times * 25 + 0.02).astype(int).tolist()
    assert (np.abs(times - real) < 0.05).all()


def test_no_frame_that_damage_may_have_touched_is_given(make_video: Maker) -> None:
    path = make_video(seconds=40.0, sound=False)
    data = bytearray(path.read_bytes())
    rng = np.random.default_rng(1)
    for at in rng.integers(len(data) * 4 // 10, len(data) * 6 // 10, 400):
        data[at] ^= 1 << int(rng.integers(8))
    path.write_bytes(data)
    faults: list[Reason] = []
    for t in np.arange(0.5, 40, 1.3):
        try:
            frames, _ = MediaFile(path).frames(np.array([t]))
        except MediaFaultError as fault:
            faults.append(fault.reason)
        else:
            assert read_counter(frames[0]) == int(t * 25 + 0.02)
    assert set(faults) == {Reason.DECODE_ERROR}


def test_sound_in_an_unknown_codec_costs_only_the_sound(make_video: Maker, tmp_path: Path) -> None:
    path = tmp_path / "unknown.mkv"
    path.write_bytes(make_video("v.mkv").read_bytes().replace(b"A_AAC", b"A_ZZZ"))
    file = MediaFile(path)
    assert read_counter(file.frames(np.array([0.5]))[0][0]) == 12
    with pytest.raises(MediaFaultError) as caught:
        file.sound(0.2, 0.8, 16_000)
    assert caught.value.reason is Reason.DECODE_ERROR


def joined(path: Path, *parts: Path) -> Path:
    """Put the streams of files into one file, in the order of the files."""
    with ExitStack() as stack:
        inputs: list[Any] = [stack.enter_context(av.open(str(part))) for part in parts]
        out = stack.enter_context(av.open(str(path), "w"))
        streams = [[out.add_stream_from_template(s) for s in one.streams] for one in inputs]
        for one, targets in zip(inputs, streams, strict=True):
            for packet in one.demux():
                if packet.size:
                    packet.stream = targets[packet.stream.index]
                    out.mux(packet)
    return path


def test_a_named_stream_is_read_instead_of_the_default(make_video: Maker, tmp_path: Path) -> None:
    parts = [make_video("a.mp4"), make_video("b.mp4", sound=False, seconds=4.0)]
    path = joined(tmp_path / "three.mp4", *parts)  # 0: picture, 1: sound, 2: picture
    assert [round(MediaFile(path, stream=n).stop_s) for n in (0, 2)] == [2, 4]
    for number in (1, 7, -1):  # one that is there is no picture
        with pytest.raises(MediaFaultError) as caught:
            _ = MediaFile(path, stream=number).stop_s
        assert caught.value.reason is Reason.NO_STREAM
    assert MediaFile(path, stream=1).sound_span(16_000)[1] == pytest.approx(2, abs=0.1)
    with pytest.raises(MediaFaultError):
        MediaFile(path, stream=2).sound_span(16_000)


def test_a_named_stream_keeps_the_clock_of_its_file(make_video: Maker, tmp_path: Path) -> None:
    late = make_video("late.mp4", sound=False, video_delay_s=0.5)
    path = joined(tmp_path / "two.mp4", make_video("a.mp4", sound=False), late)
    for number, start_s in ((0, 0.0), (1, 0.5)):
        assert MediaFile(path, stream=number).frame_starts[0] == pytest.approx(start_s, abs=1e-3)
