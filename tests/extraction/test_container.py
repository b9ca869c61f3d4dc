"""Random clips of odd files: each picture is the one that its counter says, the click is heard
when it sounds. What a clip gets is read back from the inputs of the networks."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.media_files import over_report, read_counter, turn, write_video

from karmma_pipeline.data.manifest import Clip
from karmma_pipeline.data.sources import FileSource
from karmma_pipeline.extraction.decode.worker import decode_clips
from karmma_pipeline.extraction.media.container import read_info
from karmma_pipeline.extraction.media.interface import MediaFaultError
from karmma_pipeline.extraction.recipe import Audio, Flow, Sampling
from karmma_pipeline.extraction.types import DecodedClip, DecodeSettings, InputSpec
from karmma_pipeline.modalities import Reason
from karmma_pipeline.models.backbones import FrameTransform

FRAMES, COLUMNS = 6, 200
CLICK_S = 1.2
BLUR_S = 0.1
"""AAC spreads a click over its blocks."""


def cut_at_60_percent(path: Path) -> Path:
    data = path.read_bytes()
    media = data.index(b"mdat")
    path.write_bytes(data[: media + int(0.6 * (len(data) - media))])
    return path


@dataclass(frozen=True)
class Kind:
    """A file: how it is written, when its frames start, when it clicks, how long clips go."""

    name: str
    options: dict[str, Any]
    starts: np.ndarray
    click_s: float | None = CLICK_S
    stop_s: float = 2.0
    change: Callable[[Path], Path] | None = None
    turned: bool = False


CONSTANT = np.arange(50) / 25
NTSC = np.arange(119) * 1001 / 60_000
VARIABLE = np.array([0, 0.04, 0.08, 0.5, 0.54, 0.9, 0.94, 1.3, 1.34, 1.7, 1.94])
KINDS = {
    "constant": Kind("v.mp4", {}, CONSTANT),
    "ntsc": Kind("v.mp4", {"times": NTSC}, NTSC, stop_s=1.98),
    "variable": Kind("v.mp4", {"times": VARIABLE}, VARIABLE, stop_s=1.95),
    "matroska": Kind("v.mkv", {"times": VARIABLE}, VARIABLE, stop_s=1.95),
    # 1024 samples of its encoder's run-in are sound there, as no list of edits leaves them out
    "transport": Kind("v.ts", {}, CONSTANT + 0.064, CLICK_S + 0.064),
    "rotated": Kind("v.mp4", {}, CONSTANT, change=turn, turned=True),
    "late picture": Kind("v.mp4", {"video_delay_s": 0.5}, CONSTANT + 0.5, stop_s=2.5),
    "late sound": Kind("v.mp4", {"audio_delay_s": 0.5}, CONSTANT, CLICK_S + 0.5),
    "over-reported": Kind("v.mp4", {}, CONSTANT, change=over_report),
    "one frame": Kind("v.mp4", {"times": [0.0]}, CONSTANT[:1], None, stop_s=0.04),
    "cut": Kind("v.mp4", {"seconds": 8.0, "index_first": True}, np.arange(200) / 25,
                change=cut_at_60_percent),
}  # fmt: skip


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for name, kind in KINDS.items():
        path = tmp_path_factory.mktemp("odd") / kind.name
        write_video(path, click_s=kind.click_s and CLICK_S, **kind.options)
        found[name] = kind.change(path) if kind.change else path
    return found


def decode(kind: Kind, path: Path, start_s: float, stop_s: float) -> DecodedClip:
    size = (96, 48) if kind.turned else (48, 96)
    whole = FrameTransform(resize=size, crop=size, mean=(0, 0, 0), std=(1, 1, 1))
    rgb = InputSpec("rgb", FRAMES, whole, size, per_frame=True)
    audio = InputSpec("audio", 1, None, (32, COLUMNS), per_frame=False)
    sound = Audio(sample_rate=16_000, n_fft=256, win_length=80, hop_length=40, mels=16)
    rules = Sampling(), Flow(), sound
    media = {"rgb": FileSource(path), "audio": FileSource(path)}
    clips = [Clip("c", media, start_s, stop_s, {})]
    (found,) = decode_clips(clips, DecodeSettings(*rules, (rgb, audio)))
    assert set(found.reasons.values()) <= {Reason.OUT_OF_RANGE}
    return found


def array_of(arrays: Mapping[InputSpec, np.ndarray], modality: str) -> np.ndarray:
    (found,) = (array for spec, array in arrays.items() if spec.modality == modality)
    return found


def click_of(picture: np.ndarray, start_s: float, stop_s: float) -> float | None:
    """Return when a spectrogram is loudest; None if it is silent all along."""
    loudness = picture.mean(axis=0)
    if float(np.ptp(loudness)) < 1.0:
        return None
    return start_s + (int(loudness.argmax()) + 0.5) / COLUMNS * (stop_s - start_s)


def check_sound(kind: Kind, picture: np.ndarray, start_s: float, stop_s: float) -> None:
    assert kind.click_s is not None
    heard = click_of(picture, start_s, stop_s)
    if start_s + BLUR_S < kind.click_s < stop_s - BLUR_S:
        assert heard == pytest.approx(kind.click_s, abs=0.03)
    elif not start_s - BLUR_S < kind.click_s < stop_s + BLUR_S:
        assert heard is None


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
@pytest.mark.parametrize("name", KINDS)
def test_random_clips_get_their_own_pictures_and_sound(
    paths: dict[str, Path], name: str, data: st.DataObject
) -> None:
    kind = KINDS[name]
    least = min(0.2, kind.stop_s / 2)
    start_s = data.draw(st.floats(0, kind.stop_s - least))
    stop_s = data.draw(st.floats(start_s + least, kind.stop_s))
    found = decode(kind, paths[name], start_s, stop_s)
    pictures = array_of(found.arrays, "rgb")
    times = start_s + (stop_s - start_s) * (np.arange(FRAMES) + 0.5) / FRAMES
    wanted = np.maximum(np.searchsorted(kind.starts, times + 5e-4, side="right") - 1, 0)
    shown = [np.rot90(p, 1) if kind.turned else p for p in pictures.transpose(0, 2, 3, 1)]
    numbers = np.array([read_counter(np.ascontiguousarray(p)) for p in shown])
    border = np.abs(kind.starts[None] - 5e-4 - times[:, None]).min(axis=1) < 1e-3
    assert (numbers[~border] == wanted[~border]).all()
    assert (np.abs(numbers - wanted) <= 1).all()
    requested, real = array_of(found.times, "rgb")
    np.testing.assert_allclose(requested, times, atol=1e-9)
    np.testing.assert_allclose(real, kind.starts[numbers], atol=1e-3)
    if found.reasons:  # the sound has not begun yet
        assert name == "late sound"
        assert stop_s < 0.5 + BLUR_S
    elif kind.click_s is not None:
        check_sound(kind, array_of(found.arrays, "audio"), start_s, stop_s)


@pytest.mark.parametrize(
    ("begin", "what"),
    [
        (b"", "an empty file"),
        (b"\xff\xd8\xff\xe0\0\x10JFIF", "an image: .*column frames"),
        (b"RIFF\x1a\0\0\0WEBPVP8L\x0d\0\0\0", "an image: .*column frames"),
        (b"PK\x03\x04\x14", "an archive: unpack it"),
        (b"\n<!DOCTYPE html><html>404", "a web page: download it again"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", ".*git lfs pull"),
        (bytes(4096), "all zeros: download or copy it again"),
    ],
)
def test_what_is_no_media_file_is_called_by_its_name(
    tmp_path: Path, begin: bytes, what: str
) -> None:
    (tmp_path / "v.mp4").write_bytes(begin)
    with pytest.raises(MediaFaultError, match=rf"v\.mp4: {what}") as caught:
        read_info(tmp_path / "v.mp4")
    assert caught.value.reason is Reason.DECODE_ERROR
    assert caught.value.hint.startswith("The file is ")
    assert caught.value.hint.endswith(", then run the same command again.")
    assert "damaged" not in caught.value.hint


def test_a_format_that_is_not_read_is_called_so(tmp_path: Path) -> None:
    write_video(tmp_path / "v.swf", codec="flv1", sound=False)
    with pytest.raises(MediaFaultError, match=r"v\.swf: an unsupported format \("):
        read_info(tmp_path / "v.swf")
