"""Tracks in HDF5: the right samples, and nothing that lies in another file."""

from pathlib import Path

import h5py
import numpy as np
import pytest

from karmma_pipeline.data.sources import SoundArray
from karmma_pipeline.extraction.media.audio_track import SoundArrayReader
from karmma_pipeline.extraction.media.interface import MediaFaultError
from karmma_pipeline.modalities import Reason

RATE = 24_000


@pytest.fixture
def path(tmp_path: Path) -> Path:
    t = np.arange(2 * RATE) / RATE
    tone = 0.5 * np.sin(2 * np.pi * 440 * t)
    with h5py.File(tmp_path / "audio.hdf5", "w") as file:
        file["P01_01"] = tone.astype(np.float32)
        file["whole"] = np.round(tone * 32768).astype(np.int16)
        file["group/inner"] = tone.astype(np.float32)
        file["nan"] = np.full(100, np.nan, np.float32)
        file["table"] = np.zeros((4, 4), np.float32)
        file.create_dataset("absurd", shape=(1 << 50,), dtype="f4", chunks=(1024,))
        file["soft"] = h5py.SoftLink("/P01_01")
        file["outside"] = h5py.ExternalLink(str(tmp_path / "secret.hdf5"), "/data")
        file.create_dataset("external", (100,), "f4", external=[(str(tmp_path / "raw"), 0, 400)])
        layout = h5py.VirtualLayout((100,), "f4")
        layout[:] = h5py.VirtualSource(str(tmp_path / "secret.hdf5"), "data", (100,))
        file.create_virtual_dataset("virtual", layout)
    with h5py.File(tmp_path / "secret.hdf5", "w") as file:
        file["data"] = np.ones(100, np.float32)
    (tmp_path / "raw").write_bytes(b"\1" * 400)
    return tmp_path / "audio.hdf5"


@pytest.mark.parametrize("key", ["P01_01", "whole", "group/inner"])
def test_windows_are_the_samples_of_their_time(path: Path, key: str) -> None:
    file = SoundArrayReader(SoundArray(path, key, RATE))
    assert file.sound_span(RATE) == (0, 2)
    wanted = 0.5 * np.sin(2 * np.pi * 440 * (np.arange(RATE // 10) / RATE + 1.5))
    np.testing.assert_allclose(file.sound(1.5, 1.6, RATE), wanted, atol=1e-3)
    padded = file.sound(-0.5, 2.5, RATE)
    assert not padded[: RATE // 2].any()
    assert not padded[-RATE // 2 :].any()
    assert padded[RATE // 2 : -RATE // 2].std() == pytest.approx(0.5 / 2**0.5, abs=1e-3)
    assert not file.sound(50, 51, RATE).any()


def test_another_rate_is_resampled(path: Path) -> None:
    window = SoundArrayReader(SoundArray(path, "P01_01", RATE)).sound(0.5, 1.5, 16_000)
    wanted = 0.5 * np.sin(2 * np.pi * 440 * (np.arange(16_000) / 16_000 + 0.5))
    np.testing.assert_allclose(window, wanted, atol=2e-3)


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("gone", Reason.NO_STREAM),
        ("group", Reason.NO_STREAM),
        ("soft", Reason.UNSAFE_FILE),
        ("outside", Reason.UNSAFE_FILE),
        ("outside/data", Reason.UNSAFE_FILE),
        ("external", Reason.UNSAFE_FILE),
        ("virtual", Reason.UNSAFE_FILE),
        ("absurd", Reason.UNSAFE_FILE),
        ("table", Reason.DECODE_ERROR),
        ("nan", Reason.DECODE_ERROR),
    ],
)
@pytest.mark.parametrize("rate", [RATE, 16_000])
def test_each_fault_has_its_reason(path: Path, key: str, reason: Reason, rate: int) -> None:
    with pytest.raises(MediaFaultError) as caught:
        SoundArrayReader(SoundArray(path, key, RATE)).sound(0, 1, rate)
    assert caught.value.reason is reason


def test_a_file_that_is_none_has_its_reason(tmp_path: Path) -> None:
    (tmp_path / "page.hdf5").write_text("<html>")
    for name, reason in (("gone", Reason.FILE_MISSING), ("page", Reason.DECODE_ERROR)):
        with pytest.raises(MediaFaultError) as caught:
            SoundArrayReader(SoundArray(tmp_path / f"{name}.hdf5", "x", RATE)).sound_span(RATE)
        assert caught.value.reason is reason
