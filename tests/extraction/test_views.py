"""Views of a clip as they are decoded: windows of its time, crops of its pictures."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.media_files import Maker

from karmma_pipeline import config, distill, load_model, predict, train_teacher
from karmma_pipeline.data.manifest import Clip
from karmma_pipeline.data.sensors import Sensor
from karmma_pipeline.data.sources import FileSource
from karmma_pipeline.errors import ConfigError
from karmma_pipeline.extraction.decode.sensor_windows import read_windows
from karmma_pipeline.extraction.decode.worker import decode_clips
from karmma_pipeline.extraction.media.sensor_series import series_of
from karmma_pipeline.extraction.pipeline import extract
from karmma_pipeline.extraction.recipe import Audio, ExtractRecipe, Flow, Sampling
from karmma_pipeline.extraction.types import DecodeSettings, input_spec
from karmma_pipeline.models.backbones import BackboneChoice, FrameTransform
from karmma_pipeline.store import FeatureStore, verify
from karmma_pipeline.views import View, Views

RGB = input_spec("rgb", BackboneChoice(name="s3d", weights="random:0", frames=4, size=32))
SOUND = input_spec("audio", BackboneChoice(name="resnet18", weights="random:0", image=(32, 32)))


def test_windows_are_spread_evenly_from_the_clips_start_to_its_end() -> None:
    three = Views(clips=3).every()
    assert [view.span(10.0, 20.0, 2.0) for view in three] == [(10, 12), (14, 16), (18, 20)]
    assert [view.span(10.0, 20.0, 6.0) for view in three] == [(10, 16), (12, 18), (14, 20)]
    parts = [view.span(0.0, 9.0) for view in three]
    np.testing.assert_allclose(parts, [(0, 3), (3, 6), (6, 9)])
    assert [view.span(0.0, 1.0, 2.0) for view in three] == [(0, 1)] * 3
    assert View(0, 1, 2, 3).span(0.0, 9.0, 2.0) == (0.0, 9.0)
    assert [view.side for view in Views(crops=3).every()] == [0, None, 1]


@pytest.mark.parametrize(
    ("mode", "spans"), [("uniform", [(0, 1), (1, 2)]), ("fps", [(0, 0.8), (1.2, 2)])]
)
def test_a_window_is_decoded_as_a_clip_of_that_span(
    make_video: Maker, mode: str, spans: list[tuple[float, float]]
) -> None:
    source = FileSource(make_video("v.mp4"))
    clip = Clip("c", {"rgb": source, "audio": source}, 0.0, 2.0, {})
    audio = Audio(front_end="vggish", n_fft=512, win_length=400, mels=32, window_s=None)
    sampling = Sampling(mode=mode, fps=5.0)
    settings = DecodeSettings(sampling, Flow(), audio, (RGB, SOUND))
    views = [replace(clip, view=view) for view in Views(clips=2).every()]
    found = decode_clips(views, settings)
    for decoded, (start, stop), part in zip(found, spans, [(0.0, 1.0), (1.0, 2.0)], strict=True):
        (alone,) = decode_clips([replace(clip, start_s=float(start), stop_s=float(stop))], settings)
        np.testing.assert_allclose(decoded.times[RGB], alone.times[RGB], atol=1e-9)
        np.testing.assert_array_equal(decoded.arrays[RGB], alone.arrays[RGB])
        (heard,) = decode_clips([replace(clip, start_s=part[0], stop_s=part[1])], settings)
        np.testing.assert_array_equal(decoded.arrays[SOUND], heard.arrays[SOUND])


@pytest.mark.parametrize("upright", [False, True])
def test_three_crops_lie_at_the_ends_and_in_the_middle_of_the_longer_side(upright: bool) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (2, 48, 97, 3), np.uint8)
    transform = FrameTransform(resize=(48,), crop=(40, 40), mean=(0.5,) * 3, std=(0.5,) * 3)
    across = [frames[:, 4:44, left : left + 40] for left in (0, 28, 57)]
    if upright:
        frames, across = frames.swapaxes(1, 2), [of.swapaxes(1, 2) for of in across]
    for view, wanted in zip(Views(crops=3).every(), across, strict=True):
        found = transform.apply(np.ascontiguousarray(frames), view.side)
        np.testing.assert_array_equal(found, wanted.transpose(0, 3, 1, 2))


def test_crops_of_a_clip_share_its_decoded_frames_and_are_its_own(make_video: Maker) -> None:
    clip = Clip("c", {"rgb": FileSource(make_video("v.mp4"))}, 0.0, 2.0, {})
    settings = DecodeSettings(Sampling(), Flow(), Audio(), (RGB,))
    views = decode_clips([replace(clip, view=v) for v in Views(crops=3).every()], settings)
    (whole,) = decode_clips([clip], settings)
    left, middle, right = (one.arrays[RGB] for one in views)
    np.testing.assert_array_equal(middle, whole.arrays[RGB])
    assert RGB.transform is not None
    beside = round(RGB.transform.resize[0] * 2) - 32  # of pictures of 96 x 48
    assert not np.array_equal(left, middle)
    if beside <= 32:  # both ends show some of the middle
        shared = 32 - (beside - beside // 2)
        np.testing.assert_array_equal(right[..., :shared], middle[..., 32 - shared :])


def test_windows_of_a_sensor_are_those_of_its_part_of_the_clip(tmp_path: Path) -> None:
    path = tmp_path / "imu.csv"
    path.write_text("t,x\n" + "".join(f"{i / 10},{i}\n" for i in range(101)))
    sensor = Sensor(channels=["x"], time="t", rate_hz=10, window=10, windows=2)
    series = series_of(path, sensor)
    for view, (start, stop) in zip(Views(clips=2).every(), [(0.0, 5.0), (5.0, 10.0)], strict=True):
        values, times = read_windows(series, sensor, 0.0, 10.0, view)
        wanted, moments = read_windows(series, sensor, start, stop)
        np.testing.assert_array_equal(values, wanted)
        np.testing.assert_array_equal(times, moments)


def test_there_must_be_something_to_crop() -> None:
    squeezed = replace(RGB, transform=FrameTransform(
        resize=(32, 32), crop=(32, 32), mean=(0.5,) * 3, std=(0.5,) * 3))  # fmt: skip
    from karmma_pipeline.extraction.types import _check_crops

    _check_crops([RGB, SOUND])
    with pytest.raises(ConfigError, match="rgb is resized to"):
        _check_crops([RGB, squeezed])
    with pytest.raises(ConfigError, match="no backbone takes images"):
        _check_crops([SOUND])


@pytest.mark.slow
def test_views_from_a_list_to_a_report(make_video: Maker, tmp_path: Path) -> None:
    rows = [f"c{i},v{i}.mp4,{'ab'[i % 2]},{'val' if i > 3 else 'train'}" for i in range(6)]
    (tmp_path / "m.csv").write_text("\n".join(["clip_id,video,verb,split", *rows]) + "\n")
    for i in range(6):
        make_video(f"v{i}.mp4", pan_px_s=40.0 * (i % 2))
    sets = {"s": {"rgb": {"name": "s3d", "weights": "random:0", "frames": 8, "size": 32}}}
    tree = {
        "manifest": tmp_path / "m.csv",
        "out": tmp_path / "f",
        "sets": sets,
        "decode": {"workers": 1},
        "batch_size": 4,
        "store": {"clips_per_shard": 10},
    }
    assert extract(config.build(ExtractRecipe, tree, "test")).complete
    viewed = {**tree, "out": tmp_path / "g", "views": {"clips": 2, "crops": 3}}
    assert extract(config.build(ExtractRecipe, viewed, "test")).complete
    store, plain = (FeatureStore.open(tmp_path / name / "s") for name in "gf")
    assert verify(store.path) == []
    assert store.clip_ids[:7].tolist() == [*(f"c0.v{v}".encode() for v in range(6)), b"c1.v0"]
    tokens = store.gather("rgb", torch.arange(36)).float()
    assert len(torch.unique(tokens[6:12].flatten(1), dim=0)) == 6  # c1 moves
    assert store.times("rgb")[4, 0, 0] > 1 > store.times("rgb")[2, 0, -1]
    size = {"dim": 16, "attention_heads": 2, "ffn_width": 16, "head_width": 16}
    run = {"size": size, "epochs": 2, "batch_size": 2, "select_by": "loss"}
    train_teacher({**run, "store": store.path, "out": tmp_path / "t"})
    taught = {**run, "teacher": tmp_path / "t", "teacher_store": store.path}
    distill({**taught, "store": store.path, "out": tmp_path / "r"})
    found = predict(tmp_path / "r", store, split="val")
    assert found.clip_ids == ("c4", "c5")
    assert predict(tmp_path / "r", plain, split="val").clip_ids == found.clip_ids
    model = load_model(tmp_path / "r")
    with torch.inference_mode():
        each = model.network({"rgb": tokens[24:]}, torch.ones(12, 1, dtype=torch.bool))
    mean = each["verb"].view(2, 6, -1).mean(dim=1)
    np.testing.assert_allclose(found.logits["verb"], mean.numpy(), rtol=1e-4, atol=1e-5)
