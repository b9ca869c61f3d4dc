"""Pictures in folders and tars: the right ones, near enough, and none from elsewhere."""

import gzip
import io
import os
import tarfile
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.media_files import counter_picture, pack, read_counter, write_flow, write_frames

from karmma_pipeline.data.sources import FrameSource
from karmma_pipeline.extraction.media.image_frames import ImageFrames
from karmma_pipeline.extraction.media.interface import MediaFaultError
from karmma_pipeline.modalities import Reason

NAME = "frame_{:010d}.jpg"
RGB, UV = (NAME,), (f"u/{NAME}", f"v/{NAME}")


def shown(files: ImageFrames, *times: float) -> list[int]:
    wanted = files.numbers(np.array(times))
    found = dict(files.decode(wanted))
    return [read_counter(found[n]) for n in wanted.tolist()]


@pytest.fixture(params=["folder", "tar"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> FrameSource:
    folder = write_frames(tmp_path / "frames", [*range(1, 31), *range(35, 61)])
    path = folder if request.param == "folder" else pack(folder, tmp_path / "P01_01.tar")
    return FrameSource(path, RGB, fps=60)


def test_a_moment_gets_the_picture_of_its_interval(source: FrameSource) -> None:
    files = ImageFrames(source)
    assert shown(files, 0, 0.016, 0.0168, 0.25) == [1, 1, 2, 16]
    assert files.span(1, 60) == (0, 1)
    assert files.stop_s == 1


def test_a_missing_number_is_replaced_by_the_nearest_with_its_own_time(
    source: FrameSource,
) -> None:
    files = ImageFrames(source)
    times = (np.array([31, 32, 33, 34]) - 1) / 60
    assert shown(files, *times) == [30, 30, 35, 35]
    np.testing.assert_allclose(
        files.frame_starts[files.numbers(times)], np.array([29, 29, 34, 34]) / 60
    )


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(number=st.integers(1, 30), inside=st.floats(0.01, 0.95))
def test_any_moment_inside_an_interval_gets_that_picture(
    source: FrameSource, number: int, inside: float
) -> None:
    assert shown(ImageFrames(source), (number - 1 + inside) / 60) == [number]


def test_colours_are_red_green_blue(tmp_path: Path) -> None:
    red = np.zeros((16, 16, 3), np.uint8)
    red[..., 2] = 255  # OpenCV writes blue first
    cv2.imwrite(str(tmp_path / NAME.format(1)), red)
    (_, picture), *_ = ImageFrames(FrameSource(tmp_path, RGB, fps=60)).decode(np.array([0]))
    assert (picture.mean(axis=(0, 1)) > 200).tolist() == [True, False, False]


def test_a_tar_is_listed_once_for_all_processes(tmp_path: Path) -> None:
    tar = pack(write_frames(tmp_path / "frames", range(1, 5)), tmp_path / "a.tar")
    first = ImageFrames(FrameSource(tar, RGB, fps=60), tmp_path / "index")
    assert len(list((tmp_path / "index").iterdir())) == 1
    assert {p.name for p in tmp_path.iterdir()} == {"frames", "a.tar", "index"}
    again = ImageFrames(FrameSource(tar, RGB, fps=50), tmp_path / "index")
    assert shown(first, 0.02) == shown(again, 0.025) == [2]


def test_flow_pictures_are_px_of_their_own_size(tmp_path: Path) -> None:
    folder = write_flow(tmp_path / "flow", range(1, 4), (3.0, -1.5), bound_px=8)
    source = FrameSource(folder, UV, fps=60, stride=2, dilation=3, bound_px=8)
    files = ImageFrames(source)
    np.testing.assert_allclose(files.frame_starts, [0, 2 / 60, 4 / 60])
    assert files.gap_s == pytest.approx(3 / 60)
    motion = files.motion(np.array([0, 2]))
    assert motion.shape == (2, 2, 48, 96)
    np.testing.assert_allclose(motion[:, 0], 3, atol=8 / 255 + 1e-3)
    np.testing.assert_allclose(motion[:, 1], -1.5, atol=8 / 255 + 1e-3)


def reason(source: FrameSource) -> Reason:
    with pytest.raises(MediaFaultError) as caught:
        shown(ImageFrames(source), 0.0)
    return caught.value.reason


def test_each_fault_has_its_reason(tmp_path: Path) -> None:
    assert reason(FrameSource(tmp_path / "gone", RGB, fps=60)) is Reason.FILE_MISSING
    assert reason(FrameSource(tmp_path, RGB, fps=60)) is Reason.FILE_MISSING
    (tmp_path / "no.tar").write_bytes(b"<html>" * 200)
    assert reason(FrameSource(tmp_path / "no.tar", RGB, fps=60)) is Reason.DECODE_ERROR
    for name, part in (("cut", 0.6), ("html", 0.0)):
        folder = write_frames(tmp_path / name, [1])
        path = folder / NAME.format(1)
        data = path.read_bytes()
        path.write_bytes(data[: int(len(data) * part)] or b"<html>404</html>")
        assert reason(FrameSource(folder, RGB, fps=60)) is Reason.DECODE_ERROR


def test_a_tar_that_was_cut_still_has_what_came_before(tmp_path: Path) -> None:
    tar = pack(write_frames(tmp_path / "frames", range(1, 21)), tmp_path / "a.tar")
    tar.write_bytes(tar.read_bytes()[: int(tar.stat().st_size * 0.6)])
    files = ImageFrames(FrameSource(tar, RGB, fps=60))
    assert 5 < len(files.frame_starts) < 20
    assert files.stop_s < 20 / 60


def test_links_and_other_folders_members_are_never_read(tmp_path: Path) -> None:
    secret = tmp_path / "secret.jpg"
    cv2.imwrite(str(secret), counter_picture(7))
    tar = tmp_path / "evil.tar"
    with tarfile.open(tar, "w") as archive:
        for number, kind in enumerate((tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE), 1):
            member = tarfile.TarInfo(NAME.format(number))
            member.type, member.linkname = kind, str(secret)
            archive.addfile(member)
        for name in (f"../{NAME.format(4)}", f"/{NAME.format(5)}", f"x/../{NAME.format(6)}"):
            member, data = tarfile.TarInfo(name), secret.read_bytes()
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    assert reason(FrameSource(tar, RGB, fps=60)) is Reason.FILE_MISSING
    assert not os.path.lexists(tmp_path / NAME.format(1))


NAMES_IN_USE = [
    ("P01_01/", "frame_{:010d}.jpg"),  # packed with its folder
    ("", "img_{:05d}.jpg"),
    ("", "{:06d}.jpg"),
    ("", "1_{:06d}.jpg"),  # PySlowFast's, in the folder 1
    ("1/", "1_{:06d}.png"),
    ("", "frame_{:010d}.png"),
    ("", "frame_{:010d}.JPG"),
    ("", "frame{:d}.jpg"),
    ("a{b}/", "frame_{:010d}.jpg"),
]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("folder", "name"), NAMES_IN_USE)
def test_pictures_are_found_by_the_name_that_all_of_them_have(
    tmp_path: Path, folder: str, name: str, packed: bool
) -> None:
    path = tmp_path / "P01_01"
    write_frames(path / folder, range(2, 13), name)  # the first one is missing
    (path / folder / "Thumbs.db").touch()
    (path / folder / "._x_1.jpg").touch()
    if packed:
        path = pack(path, tmp_path / "P01_01.tar")
    for index in (None, tmp_path / "index", tmp_path / "index"):
        files = ImageFrames(FrameSource(path, RGB, fps=10), index)
        assert shown(files, 0.0, 0.1, 0.5, 1.05) == [2, 2, 6, 11]
        np.testing.assert_allclose([files.frame_starts[0], files.stop_s], [0.1, 1.2])


def test_pictures_that_are_counted_from_zero_begin_at_zero(tmp_path: Path) -> None:
    write_frames(tmp_path / "a", range(5), "{:06d}.jpg")
    files = ImageFrames(FrameSource(tmp_path / "a", RGB, fps=10))
    assert shown(files, 0.0, 0.45) == [0, 4]
    np.testing.assert_allclose([files.frame_starts[0], files.stop_s], [0, 0.5])


def test_flow_is_found_in_a_folder_inside(tmp_path: Path) -> None:
    write_flow(tmp_path / "P01_01/P01_01", range(1, 4), (3.0, -1.5), bound_px=8)
    tar = pack(tmp_path / "P01_01", tmp_path / "P01_01.tar")
    for path in (tmp_path / "P01_01", tar):
        motion = ImageFrames(FrameSource(path, UV, fps=60, bound_px=8)).motion(np.array([1]))
        np.testing.assert_allclose(motion[:, 0], 3, atol=8 / 255 + 1e-3)


def detail(source: FrameSource) -> str:
    with pytest.raises(MediaFaultError) as caught:
        ImageFrames(source)
    return caught.value.detail


def test_what_is_there_instead_is_said(tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    assert "it contains no images" in detail(FrameSource(tmp_path / "none", RGB, fps=60))
    write_frames(tmp_path / "two", range(1, 4), "left_{:d}.jpg")
    write_frames(tmp_path / "two", range(1, 4), "right_{:d}.jpg")
    said = detail(FrameSource(tmp_path / "two", RGB, fps=60))
    assert "no frame_{:010d}.jpg; it contains 6 others, such as left_1.jpg" in said
    write_frames(tmp_path / "flow", range(1, 4), "flow_x_{:d}.jpg")  # of an unknown scale
    assert "others, such as flow_x_1.jpg" in detail(FrameSource(tmp_path / "flow", UV, fps=60))
    packed = gzip.compress(pack(tmp_path / "two", tmp_path / "a.tar").read_bytes())
    (tmp_path / "a.tar").write_bytes(packed)
    said = detail(FrameSource(tmp_path / "a.tar", RGB, fps=60))
    assert "not an uncompressed tar (compressed with gzip" in said
