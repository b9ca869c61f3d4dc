"""What a decode process makes of clips: one clock, one decode, nothing of other clips."""

import shutil
from pathlib import Path
from typing import Any

import av
import h5py
import numpy as np
import psutil
import pytest
from support.media_files import RATE, Maker, pack, read_counter, write_frames

from karmma_pipeline.data.manifest import Clip
from karmma_pipeline.data.sources import FileSource, FrameSource, SoundArray
from karmma_pipeline.extraction.decode.frame_selection import partners, sample_times
from karmma_pipeline.extraction.decode.spectrogram import longest_s, mel_image
from karmma_pipeline.extraction.decode.worker import decode_clips
from karmma_pipeline.extraction.media.media_file import MediaFile
from karmma_pipeline.extraction.recipe import Audio, Flow, Sampling
from karmma_pipeline.extraction.types import DecodedClip, DecodeSettings, InputSpec
from karmma_pipeline.modalities import Reason
from karmma_pipeline.models.backbones import FrameTransform

VIEW = FrameTransform(resize=(48, 96), crop=(48, 96), mean=(0, 0, 0), std=(1, 1, 1))
RGB = InputSpec("rgb", 4, VIEW, (48, 96), per_frame=True)
FLOW = InputSpec("flow", 4, VIEW, (48, 96), per_frame=True)
AUDIO = InputSpec("audio", 4, None, (16, 16), per_frame=True)
MELS = Audio(sample_rate=RATE, n_fft=512, win_length=400, mels=16, frame_s=0.2)


def decode(clips: list[Clip], *inputs: InputSpec, **changes: Any) -> list[DecodedClip]:
    settings = {"sampling": Sampling(), "flow": Flow(), "audio": MELS, **changes}
    return decode_clips(clips, DecodeSettings(inputs=inputs, **settings))


def clip(path: Path, start: float, stop: float | None, name: str = "c") -> Clip:
    return Clip(name, dict.fromkeys(("rgb", "flow", "audio"), FileSource(path)), start, stop, {})


def test_sound_that_starts_late_is_padded_counted_and_present(make_video: Maker) -> None:
    path = make_video(seconds=1.0, times=np.arange(50) / 25)  # 2 s of pictures, 1 s of sound
    (found,) = decode([clip(path, 0, 2)], RGB, AUDIO)
    assert not found.reasons
    np.testing.assert_array_equal(found.times[AUDIO][0], found.times[RGB][0])
    assert found.padded == 2
    assert found.audio_rate == RATE
    silence = (-100 - MELS.mean) / MELS.std
    np.testing.assert_allclose(found.arrays[AUDIO][3], silence, rtol=1e-5)


def test_each_network_hears_its_own_spectrogram_in_one_pass(make_video: Maker) -> None:
    """Two rates and formulas, each as if it were alone, and the recipe's for the third."""
    path = make_video(seconds=2.0)
    own = [
        Audio(front_end="ast", mels=16, hops=32),
        Audio(front_end="auditory_slowfast", mels=16, hops=40),
    ]
    specs = [InputSpec("audio", 1, None, (16, 32), per_frame=False, audio=a) for a in (*own, None)]
    (found,) = decode([clip(path, 0.5, 1.5)], *specs)
    for spec in specs:
        settings = spec.audio or MELS
        half = min(1.0, longest_s(settings)) / 2
        sound = MediaFile(path).sound(1 - half, 1 + half, settings.sample_rate)
        np.testing.assert_array_equal(found.arrays[spec], mel_image(settings, sound, spec.image))
    assert not np.array_equal(found.arrays[specs[0]], found.arrays[specs[2]])


def test_a_clip_wholly_after_the_sound_has_none(make_video: Maker) -> None:
    path = make_video(seconds=1.0, times=np.arange(100) / 25)
    (found,) = decode([clip(path, 2, 3)], RGB, AUDIO)
    assert found.reasons == {AUDIO: Reason.OUT_OF_RANGE}


def test_sound_without_pictures_is_sampled_on_its_own_span(make_video: Maker) -> None:
    (found,) = decode([clip(make_video(video=False), 0, None)], RGB, AUDIO)
    assert found.reasons == {RGB: Reason.NO_STREAM}
    np.testing.assert_allclose(found.times[AUDIO][0], [0.25, 0.75, 1.25, 1.75], atol=0.05)


def test_what_a_clip_gets_does_not_depend_on_the_clips_before_it(make_video: Maker) -> None:
    path = make_video(seconds=4.0)
    clips = [clip(path, start, start + 1, f"c{start}") for start in (2, 0, 3, 1)]
    together = decode(clips, RGB, FLOW, AUDIO)
    for one, found in zip(clips, together, strict=True):
        (alone,) = decode([one], RGB, FLOW, AUDIO)
        for spec in (RGB, FLOW, AUDIO):
            np.testing.assert_array_equal(alone.arrays[spec], found.arrays[spec])


def test_each_frame_is_decoded_once_for_all_networks(
    make_video: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    original = MediaFile.decode

    def spy(self: MediaFile, numbers: Any) -> Any:
        asked.extend(numbers.tolist())
        return original(self, numbers)

    monkeypatch.setattr(MediaFile, "decode", spy)
    small = VIEW.model_copy(update={"crop": (24, 24)})
    other = InputSpec("rgb", 8, small, (24, 24), per_frame=True)
    (found,) = decode([clip(make_video(), 0, 2)], RGB, FLOW, other)
    assert not found.reasons
    assert len(asked) == len(set(asked))
    assert asked == sorted(asked)


def test_a_damaged_place_costs_its_clip_not_the_next(make_video: Maker) -> None:
    path = make_video(seconds=40.0, sound=False)
    data = bytearray(path.read_bytes())
    start, stop = int(len(data) * 0.45), int(len(data) * 0.5)
    data[start:stop] = bytes(0xFF for _ in range(stop - start))
    path.write_bytes(data)
    spans = [(0, 5), (20, 30), (36, 39)]
    found = decode([clip(path, *span, f"c{i}") for i, span in enumerate(spans)], RGB)
    assert not found[0].reasons
    assert found[1].reasons == {RGB: Reason.DECODE_ERROR}
    assert not found[2].reasons


@pytest.mark.parametrize("fps", [10, 12, 25, 30_000 / 1001, 60_000 / 1001])
def test_flow_pairs_are_different_frames_about_the_gap_apart(fps: float) -> None:
    starts = np.arange(200) / fps
    first, second = partners(starts, np.arange(200), gap_s=1 / 15)
    assert (second > first).all()
    gaps = (starts[second] - starts[first])[:-5]
    assert np.ptp(gaps) < 1e-9
    assert abs(gaps[0] - 1 / 15) <= max(0.5 / fps, 1 / fps - 1 / 15) + 1e-9


def test_flow_of_one_frame_is_too_short(make_video: Maker) -> None:
    (found,) = decode([clip(make_video(times=[0.0], sound=False), 0, None)], RGB, FLOW)
    assert found.reasons == {FLOW: Reason.TOO_SHORT}


def test_flow_is_px_per_gap_whatever_the_frame_rate(make_video: Maker) -> None:
    slow, fast = (
        decode([clip(make_video(f"{fps}.mp4", fps=fps, pan_px_s=45.0), 0, 2)], FLOW)[0]
        for fps in (12, 60)
    )
    u = [np.median(d.arrays[FLOW][:, 0].astype(float) - 128) * 20 / 127 for d in (slow, fast)]
    assert u == pytest.approx([3, 3], abs=0.5)  # 45 px/s for 1/15 s


def test_a_clip_shorter_than_the_window_repeats_what_the_recipe_says() -> None:
    last = sample_times(Sampling(mode="fps", fps=10), 5, 5.3, 6)
    np.testing.assert_allclose(last, [5, 5.1, 5.2, 5.3, 5.3, 5.3])
    both = Sampling(mode="fps", fps=10, short="repeat_ends")
    np.testing.assert_allclose(sample_times(both, 5, 5.3, 6), [5, 5, 5.1, 5.2, 5.3, 5.3])


def test_a_file_that_holds_nothing_near_a_moment_is_a_timestamp_mismatch(make_video: Maker) -> None:
    path = make_video(times=[0, 0.04, 0.08, 2.0, 2.04], sound=False)
    (strict,) = decode([clip(path, 0, 2)], RGB)
    assert strict.reasons == {RGB: Reason.TIMESTAMP_MISMATCH}
    (lenient,) = decode([clip(path, 0, 2)], RGB, sampling=Sampling(tolerance_s=2))
    np.testing.assert_allclose(lenient.times[RGB][0], [0.25, 0.75, 1.25, 1.75])
    np.testing.assert_allclose(lenient.times[RGB][1], 0.08, atol=1e-3)


def test_a_clip_may_reach_out_of_its_file_by_the_tolerance_only(make_video: Maker) -> None:
    path = make_video()
    found = decode([clip(path, 1, 2.3, "a"), clip(path, 1, 3, "b")], RGB)
    assert not found[0].reasons
    assert found[0].times[RGB].max() < 2
    assert found[1].reasons == {RGB: Reason.OUT_OF_RANGE}


def frame_clip(path: Path, name: str, span: tuple[int, int] | None, **more: Any) -> Clip:
    source = FrameSource(path, ("frame_{:010d}.jpg",), fps=50, span=span)
    return Clip(name, {"rgb": source, "flow": source, **more}, 0.5, 1.0, {})


def test_frames_are_addressed_by_the_numbers_that_the_data_set_states(tmp_path: Path) -> None:
    folder = write_frames(tmp_path / "frames", range(1, 101))
    tar = pack(folder, tmp_path / "v.tar")
    for path in (folder, tar):
        stated, timed, late = decode(
            [
                frame_clip(path, "a", (41, 44)),
                frame_clip(path, "b", None),
                frame_clip(path, "c", (90, 400)),
            ],
            RGB,
            FLOW,
        )
        counted = [read_counter(p.transpose(1, 2, 0)) for p in stated.arrays[RGB]]
        assert counted == [41, 42, 43, 44]
        np.testing.assert_allclose(stated.times[RGB][1], np.arange(40, 44) / 50)
        counted = [read_counter(p.transpose(1, 2, 0)) for p in timed.arrays[RGB]]
        assert counted == [29, 35, 41, 47]  # 0.5625 s lies in picture 29 of 50 a second
        assert stated.decoders == {"rgb": "cv2", "flow": "cv2"}
        assert late.reasons == dict.fromkeys((RGB, FLOW), Reason.OUT_OF_RANGE)


def test_frames_and_an_hdf5_track_share_a_clock(tmp_path: Path) -> None:
    folder = write_frames(tmp_path / "frames", range(1, 101))
    track = np.zeros(2 * RATE, np.float32)
    track[round(0.9375 * RATE)] = 1
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        file["v"] = track
    sound = SoundArray(tmp_path / "a.hdf5", "v", RATE)
    (found,) = decode([frame_clip(folder, "a", (26, 50), audio=sound)], RGB, AUDIO)
    assert not found.reasons
    np.testing.assert_array_equal(found.times[AUDIO][0], found.times[RGB][0])
    loud = found.arrays[AUDIO].max(axis=(1, 2))
    assert loud.argmax() == 3  # the click is heard around the last frame
    assert found.decoders["audio"] == "h5py"
    assert found.audio_rate == RATE


def test_a_tar_is_no_sound_and_a_track_no_picture(tmp_path: Path) -> None:
    folder = write_frames(tmp_path / "frames", range(1, 101))
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        file["v"] = np.zeros(RATE, np.float32)
    wrong = Clip(
        "c",
        {
            "rgb": SoundArray(tmp_path / "a.hdf5", "v", RATE),
            "audio": FrameSource(folder, ("frame_{:010d}.jpg",), fps=50),
        },
        0,
        1,
        {},
    )
    (found,) = decode([wrong], RGB, AUDIO)
    assert found.reasons == {RGB: Reason.NO_STREAM, AUDIO: Reason.NO_STREAM}


def test_a_file_stays_open_for_the_next_task_of_its_video_and_no_longer(
    make_video: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, changed = make_video("v.mp4", click_s=1.5), make_video("w.mp4", pan_px_s=20, fps=10)
    copies = [Path(shutil.copy(path, tmp_path / f"{start}.mp4")) for start in (0, 1)]
    wanted = [decode([clip(copy, i, i + 1)], RGB, AUDIO) for i, copy in enumerate(copies)]
    opened: list[Any] = []
    original = av.open

    def spy(*args: Any, **options: Any) -> Any:
        opened.append(args)
        return original(*args, **options)

    monkeypatch.setattr(av, "open", spy)
    found = [decode([clip(path, 0, 1)], RGB, AUDIO)]
    first = len(opened)
    found.append(decode([clip(path, 1, 2)], RGB, AUDIO))
    assert len(opened) == first + 1  # to begin anew at the only key frame
    for (one,), (other,) in zip(found, wanted, strict=True):
        for spec in (RGB, AUDIO):
            np.testing.assert_array_equal(one.arrays[spec], other.arrays[spec])
    shutil.copy(changed, path)
    (one,), (other,) = (decode([clip(of, 0, 1)], RGB) for of in (path, changed))
    np.testing.assert_array_equal(one.arrays[RGB], other.arrays[RGB])
    here = {Path(file.path) for file in psutil.Process().open_files()}
    assert {file for file in here if file.is_relative_to(tmp_path)} == {changed}
