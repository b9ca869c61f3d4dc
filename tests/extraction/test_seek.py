"""A seek gives what a scan gives: every picture has its number burnt in, every file is made here.

`fuzz.seek` compares many more kinds of files with the programs of FFmpeg.
"""

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from support.media_files import RATE, counter_picture, mirror, read_counter, write_video

from karmma_pipeline.data.manifest import Clip
from karmma_pipeline.data.sources import FileSource
from karmma_pipeline.extraction.decode.worker import decode_clips
from karmma_pipeline.extraction.media import packet_index, pyav_video
from karmma_pipeline.extraction.media.interface import MediaFaultError
from karmma_pipeline.extraction.media.media_file import MediaFile
from karmma_pipeline.extraction.recipe import Audio, Flow, Sampling
from karmma_pipeline.extraction.types import DecodeSettings, InputSpec
from karmma_pipeline.modalities import Reason
from karmma_pipeline.models.backbones import FrameTransform

FPS = 25
X265 = {"x265-params": "log-level=none:keyint=40:bframes=4"}
OPEN = {"x264-params": "open-gop=1:keyint=30:bframes=3"}
REFRESH = {"x264-params": "intra-refresh=1:keyint=30"}


def encode(path: Path, codec: str, count: int = 150, fps: int = FPS, /, **options: str) -> Path:
    """Write pictures that show their numbers, 25 a second if not said otherwise."""
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=fps)
        stream.width, stream.height, stream.pix_fmt = 96, 48, "yuv420p"
        if "bf" in options:  # an option of all codecs
            stream.codec_context.max_b_frames = int(options.pop("bf"))
        if "g" in options:
            stream.codec_context.gop_size = int(options.pop("g"))
        stream.options = options
        for number in range(count):
            frame = av.VideoFrame.from_ndarray(counter_picture(number), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def copied(path: Path, source: Path, shown_from: int) -> Path:
    """Copy from the key frame before a picture on, without encoding; show from that picture on.

    It is what ``ffmpeg -ss T -i source -c copy`` does: an MP4's edit list leaves out the rest.
    """
    with av.open(str(source)) as one, av.open(str(path), "w") as other:
        stream = one.streams.video[0]
        target = other.add_stream_from_template(stream)
        zero = round(shown_from / FPS / (stream.time_base or 1))
        one.seek(zero, stream=stream)
        for packet in one.demux(stream):
            if packet.size and packet.pts is not None and packet.dts is not None:
                packet.pts, packet.dts = packet.pts - zero, packet.dts - zero
                packet.stream = target
                other.mux(packet)
    return path


KINDS: dict[str, Callable[[Path], Path]] = {
    "no timestamps": lambda d: encode(d / "v.avi", "libx264", bf="3", g="40"),
    "older codec": lambda d: encode(d / "v.avi", "mpeg4", bf="2", g="12"),
    "program stream": lambda d: encode(d / "v.mpg", "libx264", bf="3", g="40"),
    "mpeg2": lambda d: encode(d / "v.mpg", "mpeg2video", bf="2", g="15"),
    "raw": lambda d: encode(d / "v.h264", "libx264", bf="3", g="40"),
    "open gop": lambda d: encode(d / "v.mkv", "libx265", preset="ultrafast", **X265),
    "open gop 264": lambda d: encode(d / "v.mp4", "libx264", **OPEN),
    "intra refresh": lambda d: encode(d / "v.mp4", "libx264", **REFRESH),
    "transport": lambda d: encode(d / "v.ts", "libx264", bf="3", g="30"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_picture_alone_is_the_one_of_a_scan(tmp_path: Path, kind: str) -> None:
    file = MediaFile(KINDS[kind](tmp_path))
    assert len(file.frame_starts) == 150
    steps = np.diff(file.frame_starts)
    assert (steps >= 0).all()
    if kind != "program stream":  # few packets have a time, and FFmpeg mends those wrongly
        np.testing.assert_allclose(steps, 1 / FPS, atol=2e-3)
    numbers = np.random.default_rng(0).permutation(150)[:40]
    for number in [0, 149, *numbers.tolist()]:
        ((_, picture),) = file.decode(np.array([number]))
        assert read_counter(picture) == number


def test_real_media_is_read_as_a_scan_shows_it(tmp_path: Path) -> None:
    """FFmpeg's encoder leaves out some motion: only key frames show their own numbers."""
    path = encode(tmp_path / "v.rm", "rv20", 60, g="12")
    with av.open(str(path)) as container:
        scan = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert [read_counter(picture) for picture in scan[::12]] == [0, 12, 24, 36, 48]
    file = MediaFile(path)
    np.testing.assert_allclose(file.frame_starts, np.arange(60) / FPS, atol=2e-3)
    for number in np.random.default_rng(0).permutation(60).tolist():
        ((_, picture),) = file.decode(np.array([number]))
        np.testing.assert_array_equal(picture, scan[number])


def test_pictures_of_one_time_stamp_keep_their_order(tmp_path: Path) -> None:
    """Matroska counts milliseconds: two pictures of 2,000 a second share one."""
    file = MediaFile(encode(tmp_path / "v.mkv", "libx264", 60, 2000, bf="3", g="20"))
    assert (np.diff(file.frame_starts) == 0).any()
    for number in (0, 7, 18, 21, 22, 38, 39, 59):
        ((_, picture),) = file.decode(np.array([number]))
        assert read_counter(picture) == number


def test_a_copy_that_was_cut_shows_what_its_edit_list_shows(tmp_path: Path) -> None:
    for name, options in (("v", {"g": "50"}), ("o", {"x264-params": "open-gop=1:keyint=50"})):
        whole = encode(tmp_path / f"{name}.mp4", "libx264", 250, **options)
        file = MediaFile(copied(tmp_path / f"{name}_cut.mp4", whole, shown_from=83))
        for t in (0.01, 3.21, 0.51, 1.01, 5.0, 2.4):
            frames, real = file.frames(np.array([t]))
            assert read_counter(frames[0]) == 83 + int(t * FPS + 0.02)
            assert real[0] == pytest.approx(int(t * FPS + 0.02) / FPS, abs=1e-3)


def test_pictures_that_build_on_what_was_cut_off_are_no_frames(tmp_path: Path) -> None:
    """A decoder withholds the two B-frames after the first key frame, which are shown before it."""
    whole = encode(tmp_path / "v.avi", "mpeg1video", bf="2", g="15")
    path = tmp_path / "cut.avi"
    with av.open(str(whole)) as one, av.open(str(path), "w") as other:
        target = other.add_stream_from_template(one.streams.video[0])
        packets = [packet for packet in one.demux(video=0) if packet.size]
        second = [number for number, packet in enumerate(packets) if packet.is_keyframe][1]
        for number, packet in enumerate(packets[second:]):
            packet.pts = packet.dts = number
            packet.stream = target
            other.mux(packet)
    file = MediaFile(path)
    ((_, first),) = file.decode(np.array([0]))
    kept = 150 - read_counter(first)
    assert len(file.frame_starts) == kept < len(packets) - second
    for number in (0, 1, 40, kept - 1):
        ((_, picture),) = file.decode(np.array([number]))
        assert read_counter(picture) == 150 - kept + number


def test_decord_is_refused_where_it_would_give_other_pictures(tmp_path: Path) -> None:
    whole = encode(tmp_path / "v.mp4", "libx264", 100, g="25")
    plain = MediaFile(whole, decoder="decord")
    assert read_counter(plain.frames(np.array([2.01]))[0][0]) == 50
    odd = {
        "every key frame is exact": copied(tmp_path / "cut.mp4", whole, shown_from=33),
        "earlier frames": encode(tmp_path / "r.mp4", "libx264", bf="0", **REFRESH),
    }
    for why, path in odd.items():
        with pytest.raises(MediaFaultError, match=f"{why}; use video_decoder: pyav"):
            MediaFile(path, decoder="decord").frames(np.array([0.5]))


def test_clips_of_a_long_file_without_time_stamps_cost_less_than_scans(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A minute has five clips, each in a worker of its own, as 20 minutes have a hundred."""
    path = encode(tmp_path / "v.avi", "libx264", 1500, preset="ultrafast", bf="2", g="60")
    count, original = 0, packet_index.decoded

    def counted(packet: Any, *about: Any) -> Any:
        nonlocal count
        count += 1
        return original(packet, *about)

    monkeypatch.setattr(packet_index, "decoded", counted)
    monkeypatch.setattr(pyav_video, "decoded", counted)
    for number in np.random.default_rng(1).integers(0, 1450, 5).tolist():
        packet_index._read.cache_clear()
        file = MediaFile(path)
        found = dict(file.decode(np.arange(number, number + 50, 10)))
        assert [read_counter(picture) for picture in found.values()] == list(found)
        file.close()
    assert count < 1.5 * 1500


@pytest.mark.parametrize("way", ["180", "270", "hflip", "vflip", "transpose", "anti"])
def test_pictures_are_turned_and_mirrored_as_players_do(tmp_path: Path, way: str) -> None:
    plain = MediaFile(write_video(tmp_path / "p.mp4", sound=False)).frames(np.array([0.5]))[0][0]
    path = mirror(write_video(tmp_path / "m.mp4", sound=False), way)
    wanted = {
        "180": plain[::-1, ::-1],
        "270": np.rot90(plain),
        "hflip": plain[:, ::-1],
        "vflip": plain[::-1],
        "transpose": plain.transpose(1, 0, 2),
        "anti": plain[::-1, ::-1].transpose(1, 0, 2),
    }
    np.testing.assert_array_equal(MediaFile(path).frames(np.array([0.5]))[0][0], wanted[way])


def test_the_default_stream_is_the_flagged_one_even_if_smaller(tmp_path: Path) -> None:
    parts = [
        write_video(tmp_path / "small.mp4", sound=False, video_delay_s=0.0),
        write_video(tmp_path / "large.mp4", sound=False, size=(384, 192)),
    ]
    path = tmp_path / "two.mp4"
    targets: list[Any] = []
    with av.open(str(path), "w") as out:
        for part in parts:
            with av.open(str(part)) as one:
                target: Any = out.add_stream_from_template(one.streams.video[0])
                target.disposition = av.stream.Disposition(0 if "large" in part.name else 1)
                targets.append(target)
        for number, part in enumerate(parts):
            with av.open(str(part)) as one:
                for packet in one.demux(video=0):
                    if packet.size:
                        packet.stream = targets[number]
                        out.mux(packet)
    for stream in (None, 0):
        frames, _ = MediaFile(path, stream=stream).frames(np.array([0.5]))
        assert frames.shape[1:3] == (48, 96)


def test_titles_in_another_character_set_are_no_damage(tmp_path: Path) -> None:
    path = encode(tmp_path / "v.avi", "mpeg4", 20)
    with av.open(str(path)) as one, av.open(str(tmp_path / "t.avi"), "w") as other:
        other.metadata["title"] = "Kueche"
        target = other.add_stream_from_template(one.streams.video[0])
        for packet in one.demux(video=0):
            if packet.size:
                packet.stream = target
                other.mux(packet)
    data = (tmp_path / "t.avi").read_bytes()
    (tmp_path / "t.avi").write_bytes(data.replace(b"Kueche", b"K\xfc\xe7he\xff"))
    assert read_counter(MediaFile(tmp_path / "t.avi").frames(np.array([0.41]))[0][0]) == 10


@pytest.mark.parametrize("rate", [Fraction(1), Fraction(1, 5)])
def test_a_slide_show_is_as_good_as_a_film(tmp_path: Path, rate: Fraction) -> None:
    path = write_video(tmp_path / "v.mp4", times=[float(n / rate) for n in range(6)], sound=False)
    view = FrameTransform(resize=(48, 96), crop=(48, 96), mean=(0, 0, 0), std=(1, 1, 1))
    rgb = InputSpec("rgb", 5, view, (48, 96), per_frame=True)
    settings = DecodeSettings(Sampling(), Flow(), Audio(), (rgb,))
    clip = Clip("c", {"rgb": FileSource(path)}, 0.0, float(5 / rate), {})
    (found,) = decode_clips([clip], settings)
    assert not found.reasons
    assert [read_counter(p.transpose(1, 2, 0)) for p in found.arrays[rgb]] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("delay_s", "shown"),
    [
        (5.0, [(1.955, 0, 47), (1.995, 0, 48), (4.9, 0, 49), (5.0, 1, 0), (6.5, 1, 15)]),
        (0.0, [(0.57, 0, 12), (1.57, 0, 37), (2.05, 0, 49)]),
        (1.0, [(0.57, 0, 12), (1.57, 0, 37), (2.05, 0, 49), (2.5, 1, 15), (2.6, 1, 16)]),
    ],
)
def test_streams_joined_byte_by_byte_keep_their_times_and_a_moment_has_one_picture(
    tmp_path: Path, delay_s: float, shown: list[tuple[float, int, int]]
) -> None:
    """FFmpeg misses packets at the joint; time stamps may leap ahead there, or begin anew."""
    later: dict[str, Any] = {"video_delay_s": delay_s, "audio_delay_s": delay_s}
    parts = [
        write_video(tmp_path / "a.ts", click_s=0.5),
        write_video(tmp_path / "b.ts", fps=10, seconds=1.7, click_s=1.5, **later),
    ]
    # Zero is where the encoder's run-in of the first sound starts.
    begins = (0.064, delay_s - 0.016)
    path = tmp_path / "joined.ts"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    file = MediaFile(path)
    for t, part, number in shown:
        frames, starts = file.frames(np.array([t]))
        assert read_counter(frames[0]) == number
        assert starts[0] == pytest.approx(begins[part] + number / (25, 10)[part], abs=2e-3)
    sound = np.abs(file.sound(0, 8, RATE))
    clicks = [begins[0] + 0.5, *([begins[1] + 1.5] if delay_s else [])]
    heard = np.flatnonzero(sound > 0.1) / RATE
    assert np.abs(heard[:, None] - clicks).min(axis=1).max() < 0.02
    assert np.abs(heard[:, None] - clicks).min(axis=0).max() < 0.02


def test_what_lies_behind_the_end_of_a_stream_is_said(tmp_path: Path) -> None:
    path = write_video(tmp_path / "v.ts")
    path.write_bytes(2 * path.read_bytes())
    view = FrameTransform(resize=(48, 96), crop=(48, 96), mean=(0, 0, 0), std=(1, 1, 1))
    rgb = InputSpec("rgb", 5, view, (48, 96), per_frame=True)
    clip = Clip("c", {"rgb": FileSource(path)}, 2.5, 3.5, {})
    (found,) = decode_clips([clip], DecodeSettings(Sampling(), Flow(), Audio(), (rgb,)))
    assert found.reasons == {rgb: Reason.OUT_OF_RANGE}
    assert "its timestamps restart there" in found.details[rgb]
