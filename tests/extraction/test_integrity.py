"""What a look at a file tells: whole, cut, empty, damaged, missing."""

import tarfile
from pathlib import Path

import h5py
import pytest
from support.media_files import Maker

from karmma_pipeline.extraction.media.integrity import check_file, check_files


@pytest.mark.parametrize("name", ["v.mp4", "v.mkv", "v.webm", "v.avi"])
def test_a_cut_file_is_told_from_a_whole_one(make_video: Maker, tmp_path: Path, name: str) -> None:
    if name.endswith("webm"):
        path = make_video("v.mkv", sound=False).rename(tmp_path / name)
    else:
        path = make_video(name, sound=name != "v.avi")
    whole = check_file(path)
    assert (whole.state, not whole.lacks("video"), not whole.lacks("audio")) == (
        "fine",
        True,
        name in {"v.mp4", "v.mkv"},
    )
    assert whole.duration_s == pytest.approx(2, abs=0.15)
    if name != "v.avi":  # whose header has the rate of our writer's clock
        assert whole.fps == pytest.approx(25, abs=0.5)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])
    assert check_file(path).state in {"truncated", "damaged"}


def test_an_mp4_with_its_index_in_front_is_told_to_be_cut(
    make_video: Maker, tmp_path: Path
) -> None:
    import av

    path = tmp_path / "fast.mp4"
    with (
        av.open(str(make_video())) as source,
        av.open(str(path), "w", options={"movflags": "faststart"}) as target,
    ):
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    assert check_file(path).state == "fine"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[: size - 100])
    cut = check_file(path)  # FFmpeg opens it without a word
    assert (cut.state, cut.detail) == ("truncated", f"{size - 100:,} of {size:,} bytes")


def test_whatever_is_no_media_file_is_said(tmp_path: Path) -> None:
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "page.mp4").write_text("<html>")
    (tmp_path / "list.mp4").write_text("#EXTM3U\nfile:///etc/hostname\n")
    (tmp_path / "bad.hdf5").write_bytes(b"x" * 5000)
    (tmp_path / "folder").mkdir()
    with h5py.File(tmp_path / "fine.hdf5", "w") as file:
        file["a"] = [0.0]
    with tarfile.open(tmp_path / "fine.tar", "w") as tar:
        tar.add(tmp_path / "page.mp4", "frame_0000000001.jpg")
    data = (tmp_path / "fine.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(data[:1000])
    names = ["gone.mp4", "empty.mp4", "page.mp4", "list.mp4", "bad.hdf5"]
    names += ["folder", "fine.hdf5", "fine.tar", "cut.tar"]
    found = check_files([tmp_path / name for name in names])
    assert [found[tmp_path / name].state for name in names] == [
        *("missing", "empty", "damaged", "damaged", "damaged"),
        *("fine", "fine", "fine", "truncated"),
    ]
