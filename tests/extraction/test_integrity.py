"""What a look at a source tells: whole, cut, empty, damaged, missing."""

import gzip
import os
import struct
import wave
from collections.abc import Iterator
from pathlib import Path

import av
import h5py
import numpy as np
import pytest
from support.forks import in_fork
from support.media_files import (
    RATE,
    broken_library,
    pack,
    remux,
    write_frames,
    write_video,
)

from karmma_pipeline.data.sources import FileSource, FrameSource, SoundArray, Source
from karmma_pipeline.extraction.media.container import read_info
from karmma_pipeline.extraction.media.integrity import (
    check_source,
    check_sources,
)
from karmma_pipeline.extraction.media.interface import MediaFaultError
from karmma_pipeline.extraction.media.media_file import MediaFile, OpenMedia
from karmma_pipeline.extraction.media.packet_index import until_end
from karmma_pipeline.modalities import Reason

NAME = "frame_{:010d}.jpg"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Two seconds of pictures or sound in every container that says how long it is."""
    folder = tmp_path_factory.mktemp("whole")
    first = write_video(folder / "v.mp4", sound=False, pan_px_s=40)
    options = {"fast.mp4": {"movflags": "faststart"}}
    options["pieces.mp4"] = {"movflags": "frag_keyframe+empty_moov", "frag_duration": "200000"}
    for name in ("fast.mp4", "pieces.mp4", "v.mkv", "v.ts", "v.m2ts"):
        remux(first, folder / name, options.get(name, {}))
    write_video(folder / "v.avi", sound=False, pan_px_s=40, codec="mpeg4")
    with wave.open(str(folder / "s.wav"), "wb") as file:
        file.setparams((1, 2, RATE, 0, "NONE", ""))
        file.writeframes(np.random.default_rng(0).bytes(4 * RATE))
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


NAMES = ("v.mp4", "fast.mp4", "pieces.mp4", "v.mkv", "v.avi", "v.ts", "v.m2ts", "s.wav")


@pytest.mark.parametrize("name", NAMES)
def test_a_file_that_is_cut_anywhere_is_told_from_a_whole_one(
    whole: dict[str, bytes], tmp_path: Path, name: str
) -> None:
    source, data = FileSource(tmp_path / name), whole[name]
    source.path.write_bytes(data)
    check = check_source(source)
    kind = "audio" if name == "s.wav" else "video"
    assert (check.state, list(check.ends or ())) == ("fine", [kind])
    if name.endswith("mp4"):
        assert check.fps == pytest.approx(25, abs=0.5)
    if name != "v.avi":  # whose header has the rate of our writer's clock
        assert (check.ends or {})[kind] == pytest.approx(2, abs=0.15)
    for place in np.random.default_rng(1).integers(1, len(data) - 1, 10).tolist():
        source.path.write_bytes(data[:place])
        check = check_source(source)
        assert check.state in {"truncated", "damaged"}, place
        if check.ends is not None:  # what is left of it was measured
            assert (check.ends.get(kind) or 0) <= 2 * place / len(data) + 1.1, place


@pytest.mark.parametrize("name", ["a.mp4", "a.mov", "a.ts"])
def test_pictures_may_end_before_the_sound(tmp_path: Path, name: str) -> None:
    """A clip is judged by the end of its own stream, as extraction does."""
    parts = [write_video(tmp_path / f"{s}.mp4", seconds=s, fps=10) for s in (2.0, 5.0)]
    with (
        av.open(str(parts[0])) as a,
        av.open(str(parts[1])) as b,
        av.open(str(tmp_path / name), "w") as target,
    ):
        pairs = ((a, a.streams.video[0]), (b, b.streams.audio[0]))
        streams = [target.add_stream_from_template(stream) for _, stream in pairs]
        for (source, stream), own in zip(pairs, streams, strict=True):
            for packet in source.demux(stream):
                if packet.dts is not None:
                    packet.stream = own
                    target.mux(packet)
    ends = check_source(FileSource(tmp_path / name)).ends or {}
    assert ends == {"video": pytest.approx(2, abs=0.1), "audio": pytest.approx(5, abs=0.2)}


def test_what_is_left_of_a_cut_file_is_what_a_reader_finds(
    whole: dict[str, bytes], tmp_path: Path
) -> None:
    path = tmp_path / "fast.mp4"
    path.write_bytes(whole[path.name][: len(whole[path.name]) * 3 // 4])
    check = check_source(FileSource(path))
    cut = f"{path.stat().st_size:,} of {len(whole[path.name]):,} bytes"
    video = MediaFile(path, decoder="pyav")
    assert (check.detail, check.ends) == (cut, {"video": video.stop_s})
    assert 0.5 < video.stop_s < 1.9
    video.close()


def test_what_is_appended_to_a_whole_file_makes_it_no_cut_one(
    whole: dict[str, bytes], tmp_path: Path
) -> None:
    for rest in (whole["v.ts"], bytes(1000), b"\xff" * 1000):
        (tmp_path / "v.mp4").write_bytes(whole["fast.mp4"] + rest)
        check = check_source(FileSource(tmp_path / "v.mp4"))
        assert (check.state, check.detail) == ("fine", "")
        assert (check.ends or {})["video"] == pytest.approx(2, abs=0.1)


def test_sound_whose_size_was_not_known_is_whole(whole: dict[str, bytes], tmp_path: Path) -> None:
    for size in (0xFFFF_FFFF, 0x7FFF_FFFF, 0x7FFF_F024, 0):  # as ffmpeg, arecord and SoX pipe it
        data = bytearray(whole["s.wav"])
        data[4:8] = struct.pack("<I", size)
        data[40:44] = struct.pack("<I", max(0, size - 36) & 0xFFFF_FFFF)
        (tmp_path / "s.wav").write_bytes(data)
        check = check_source(FileSource(tmp_path / "s.wav"))
        assert (check.state, list(check.ends or ())) == ("fine", ["audio"]), hex(size)


def test_pictures_are_looked_for_inside(tmp_path: Path) -> None:
    write_frames(tmp_path / "pictures", range(2, 12))
    (tmp_path / "none").mkdir()
    (tmp_path / "none/readme.txt").touch()
    pack(tmp_path / "pictures", tmp_path / "fine.tar")
    data = (tmp_path / "fine.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(data[: len(data) * 2 // 3 + 7])
    end = len(data.rstrip(b"\0"))
    (tmp_path / "open.tar").write_bytes(data[: -(-end // 512) * 512])  # without its end mark
    (tmp_path / "zip.tar").write_bytes(gzip.compress(data))
    names = ("pictures", "none", "fine.tar", "cut.tar", "open.tar", "zip.tar")
    found = {n: check_source(FrameSource(tmp_path / n, (NAME,), 10.0)) for n in names}
    assert {name: check.state for name, check in found.items()} == {
        "pictures": "fine",
        "none": "missing",
        "fine.tar": "fine",
        "cut.tar": "truncated",
        "open.tar": "fine",
        "zip.tar": "damaged",
    }
    for name in ("pictures", "fine.tar", "open.tar"):
        assert (found[name].ends or {})["video"] == pytest.approx(1.1)
    assert found["none"].detail == f"no {NAME}; it contains no images"
    assert 0.3 < ((found["cut.tar"].ends or {})["video"] or 0) < 0.9


def test_what_lies_where_a_file_is_missing_is_said_by_plan_and_extraction(tmp_path: Path) -> None:
    (tmp_path / "P01_03.Mp4").touch()
    (tmp_path / "P01_01.MP4").mkdir()
    (tmp_path / "annex.mp4").symlink_to("store/7d865e")
    for name, said in (
        ("P01_03.MP4", "did you mean P01_03.Mp4?"),
        ("P01_03.MOV", "did you mean P01_03.Mp4?"),
        ("P01_01.MP4", "it is a folder, not a file"),
        ("gone/v.mp4", f"no such folder: {tmp_path / 'gone'}"),
        ("other.mp4", ""),
        ("annex.mp4", "a link to store/7d865e, which does not exist"),
        ("videos\\v.mp4", "separate folders by /, not by a backslash"),
    ):
        path = tmp_path / name
        (check,) = check_sources({0: FileSource(path)}, check_source).values()
        with pytest.raises(MediaFaultError) as fault:
            read_info(path)
        assert (check.state, check.detail) == ("missing", said)
        assert fault.value.detail == (f"{path}: {said}" if said else str(path))


def test_what_may_not_be_read_costs_its_clips_and_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "closed").mkdir()
    source = FileSource(tmp_path / "closed/v.mp4")
    source.path.write_bytes(b"x" * 99)

    def look() -> int:
        source.path.parent.chmod(0)
        if os.getuid() == 0:  # who may look everywhere
            os.setuid(65534)
        (check,) = check_sources({0: source}, check_source, probe=False).values()
        with pytest.raises(MediaFaultError) as fault, OpenMedia() as media:
            media.of(source)
        assert fault.value.reason is Reason.FILE_MISSING
        assert "no permission to read /" in check.detail
        assert check.detail in fault.value.detail
        return 0

    assert in_fork(look) == 0
    source.path.parent.chmod(0o700)

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    check = check_source(source)
    assert check.detail == "not readable: change its permissions"


def test_whatever_is_no_media_file_is_said(tmp_path: Path) -> None:
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "page.mp4").write_text("<html>")
    (tmp_path / "list.mp4").write_text("#EXTM3U\nfile:///etc/hostname\n")
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "bad.hdf5").write_bytes(b"x" * 5000)
    with h5py.File(tmp_path / "fine.hdf5", "w") as file:
        file["a"] = np.zeros(3 * RATE, np.float32)
    files = ("gone.mp4", "empty.mp4", "page.mp4", "list.mp4", "folder.mp4")
    arrays = (("bad.hdf5", "a"), ("fine.hdf5", "a"), ("fine.hdf5", "b"))
    sources: list[Source] = [
        *(FileSource(tmp_path / name) for name in files),
        *(SoundArray(tmp_path / name, key, RATE) for name, key in arrays),
    ]
    found = list(check_sources(dict(enumerate(sources)), check_source).values())
    states = ["missing", "damaged", "damaged", "damaged", "missing", "damaged", "fine", "fine"]
    assert [check.state for check in found] == states
    assert [check.ends for check in found[-2:]] == [{"audio": 3.0}, {}]


def test_whatever_a_library_raises_costs_its_file_and_not_the_plan(tmp_path: Path) -> None:
    (tmp_path / "v.ts").touch()
    (check,) = check_sources({0: FileSource(tmp_path / "v.ts")}, broken_library).values()
    assert (check.state, check.detail) == ("damaged", "IndexError: list index out of range")


def test_a_stream_that_begins_later_ends_no_other() -> None:
    def demuxed() -> Iterator[int]:
        yield from (1, 2)
        raise IndexError("list index out of range")

    assert list(until_end(demuxed())) == [1, 2]
