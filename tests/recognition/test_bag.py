"""Robots' recordings: bags that are written here are read back at the times of their messages."""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pytest
from click.testing import CliRunner
from support.media_files import counter_picture, read_counter

from karmma_pipeline import config
from karmma_pipeline.cli import main
from karmma_pipeline.data.sensors import Sensor
from karmma_pipeline.errors import ConfigError, MediaError
from karmma_pipeline.extraction.media.media_file import MediaFile
from karmma_pipeline.extraction.media.sensor_series import SensorSeries
from karmma_pipeline.extraction.pipeline import extract
from karmma_pipeline.extraction.recipe import ExtractRecipe
from karmma_pipeline.recognition.bag import parse_topics, unpack
from karmma_pipeline.training.recipe import BaselineRecipe
from karmma_pipeline.training.stages import train_baseline

pytestmark = pytest.mark.extra
writer = pytest.importorskip("mcap_ros2.writer")

HEADER = "std_msgs/Header header\n"
STAMP = (
    "\n================\nMSG: std_msgs/Header\nbuiltin_interfaces/Time stamp\nstring frame_id"
    "\n================\nMSG: builtin_interfaces/Time\nint32 sec\nuint32 nanosec"
)
TYPES = {
    "sensor_msgs/msg/CompressedImage": HEADER + "string format\nuint8[] data" + STAMP,
    "sensor_msgs/msg/Image": HEADER
    + "uint32 height\nuint32 width\nstring encoding\nuint8 is_bigendian\nuint32 step\nuint8[] data"
    + STAMP,
    "sensor_msgs/msg/Imu": HEADER
    + "geometry_msgs/Vector3 linear_acceleration\nfloat64[9] linear_acceleration_covariance"
    + "\n================\nMSG: geometry_msgs/Vector3\nfloat64 x\nfloat64 y\nfloat64 z"
    + STAMP,
    "audio_common_msgs/msg/AudioStamped": HEADER
    + "audio_common_msgs/Audio audio"
    + "\n================\nMSG: audio_common_msgs/Audio\naudio_common_msgs/AudioData audio_data"
    + "\naudio_common_msgs/AudioInfo info"
    + "\n================\nMSG: audio_common_msgs/AudioData\nfloat32[] float32_data"
    + "\nint16[] int16_data"
    + "\n================\nMSG: audio_common_msgs/AudioInfo\nint32 format\nint32 channels"
    + "\nint32 rate\nint32 chunk"
    + STAMP,
}
START_S, RATE, FPS = 1_700_000_000, 16_000, 10
SENSOR: dict[str, Any] = {
    "channels": ["ax", "az"],
    "time": "t",
    "rate_hz": 20,
    "windows": 2,
    "window": 5,
}


def header(at_s: float) -> dict[str, Any]:
    nanoseconds = round((START_S + at_s) * 1000) * 1_000_000
    stamp = {"sec": nanoseconds // 10**9, "nanosec": nanoseconds % 10**9}
    return {"stamp": stamp, "frame_id": ""}


def picture(number: int) -> dict[str, Any]:
    """A message of a raw picture, whose rows have four bytes more than their pixels."""
    rows = counter_picture(number)[..., ::-1].reshape(48, -1)
    padded = np.pad(rows, [(0, 0), (0, 4)])
    facts = {"height": 48, "width": 96, "encoding": "bgr8", "is_bigendian": 0, "step": 292}
    return {"header": header(0.2 + number / FPS), **facts, "data": padded.tobytes()}


def jpeg(number: int) -> dict[str, Any]:
    _, data = cv2.imencode(".jpg", counter_picture(number))
    return {"header": header(0.2 + number / FPS), "format": "jpeg", "data": data.tobytes()}


def wave(part: slice) -> np.ndarray:
    return (8000 * np.sin(0.1 * np.arange(3 * RATE))).astype(np.int16)[part]


def write_bag(path: Path, seconds: float = 3.0, *, compressed: bool = False) -> Path:
    """Write a bag: pictures from 0.2 s on, sound from 0 s, an IMU from 0.1 s; recorded late."""
    messages: list[tuple[float, str, str, dict[str, Any]]] = []
    kind = f"sensor_msgs/msg/{'CompressedImage' if compressed else 'Image'}"
    for n in range(round(seconds * FPS)):
        make = jpeg if compressed else picture
        messages.append((0.2 + n / FPS, "/camera", kind, make(n)))
    for n in range(round(seconds * 10)):
        data = wave(slice(n * RATE // 10, (n + 1) * RATE // 10))
        info = {"format": 8, "channels": 1, "rate": RATE, "chunk": len(data)}
        audio = {"audio_data": {"float32_data": [], "int16_data": data.tolist()}, "info": info}
        message = {"header": header(n / 10), "audio": audio}
        messages.append((n / 10, "/mic", "audio_common_msgs/msg/AudioStamped", message))
    for n in range(round(seconds * 50)):
        at = 0.1 + n / 50
        vector = {"x": at, "y": 7.0, "z": -at}
        rest = {"linear_acceleration": vector, "linear_acceleration_covariance": [0.0] * 9}
        messages.append((at, "/imu", "sensor_msgs/msg/Imu", {"header": header(at), **rest}))
    with path.open("wb") as file:
        bag = writer.Writer(file)
        schemas = {name: bag.register_msgdef(name, text) for name, text in TYPES.items()}
        for at, topic, name, message in sorted(messages, key=lambda one: one[0]):
            logged = round((START_S + at + 0.07) * 1e9)
            bag.write_message(topic, schemas[name], message, log_time=logged)
        bag.finish()
    return path


TOPICS = ("rgb=/camera", "audio=/mic", "imu=/imu:linear_acceleration.x,linear_acceleration.z")


@pytest.mark.parametrize("compressed", [False, True])
def test_topics_are_files_at_the_times_of_their_messages(tmp_path: Path, compressed: bool) -> None:
    bag = write_bag(tmp_path / "robot.mcap", compressed=compressed)
    sensor = Sensor.model_validate(SENSOR)
    found = unpack(bag, parse_topics(TOPICS), {"imu": sensor}, tmp_path / "out")
    assert found.media["rgb"] == found.media["flow"] == found.media["audio"]
    file = MediaFile(found.media["rgb"].path)
    np.testing.assert_allclose(file.frame_starts, 0.2 + np.arange(30) / FPS, atol=1e-3)
    for number in (0, 17, 29):
        frames, _ = file.frames(np.array([0.25 + number / FPS]))
        assert read_counter(frames[0]) == number
        if not compressed:
            np.testing.assert_array_equal(frames[0], counter_picture(number))
    with av.open(str(file.path)) as container:
        codec = container.streams.video[0].codec_context.name
        sound = np.concatenate([f.to_ndarray()[0] for f in container.decode(audio=0)])
    assert codec == ("mjpeg" if compressed else "ffv1")
    np.testing.assert_array_equal(sound, wave(slice(None)))
    moments = np.arange(0.5, 2.5, 0.05)
    values = SensorSeries.of_file(found.media["imu"].path, sensor).at(moments)
    np.testing.assert_allclose(values, np.stack([moments, -moments], 1), atol=2e-3)
    assert found.end_s == pytest.approx(3.1, abs=0.01)


def test_the_clock_of_the_recording_is_another(tmp_path: Path) -> None:
    bag = write_bag(tmp_path / "robot.mcap")
    found = unpack(bag, parse_topics(("rgb=/camera",)), {}, tmp_path, clock="log")
    (shown,) = {MediaFile(found.media["rgb"].path).frame_starts[0]}
    assert shown == pytest.approx(0, abs=1e-3)  # there is nothing else to begin with


@pytest.mark.parametrize(
    ("topics", "said"),
    [
        ((), r"select topics .* it has /camera \(sensor_msgs/msg/Image, 30 messages\); /imu"),
        (("rgb=/front",), r"rgb=/front: .*no such topic; it has /camera"),
        (("rgb=/imu",), "sensor_msgs/msg/Imu does not contain images"),
        (("audio=/camera",), "sensor_msgs/msg/Image does not contain audio"),
        (
            ("imu=/imu",),
            r"takes 2 channels, but the message has 3 numeric fields; select 2 of them with "
            r"--topic imu=/imu:FIELD",
        ),
        (("imu=/imu:x,y",), r"no field x; it has linear_acceleration.x"),
        (("rgb",), "write MODALITY=/topic"),
        (("rgb=/a", "rgb=/b"), "rgb has a topic already"),
    ],
)
def test_what_a_bag_has_not_is_named(tmp_path: Path, topics: tuple[str, ...], said: str) -> None:
    bag = write_bag(tmp_path / "robot.mcap")
    with pytest.raises(ConfigError, match=said):
        unpack(bag, parse_topics(topics), {"imu": Sensor.model_validate(SENSOR)}, tmp_path / "out")


@pytest.mark.parametrize("data", [b"", b"no bag at all", None])
def test_what_is_no_bag_is_refused(tmp_path: Path, data: bytes | None) -> None:
    bag = tmp_path / "robot.mcap"
    bag.write_bytes(write_bag(bag).read_bytes()[:-2000] if data is None else data)
    with pytest.raises(MediaError, match=r"robot\.mcap"):
        unpack(bag, parse_topics(("rgb=/camera",)), {}, tmp_path)


def rows(folder: Path) -> list[Mapping[str, str]]:
    with (folder / "predictions.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_bag_is_recognised_like_the_files_that_it_was_made_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    bag = write_bag(tmp_path / "robot.mcap")
    found = unpack(bag, parse_topics(TOPICS), {"imu": Sensor.model_validate(SENSOR)}, tmp_path)
    (tmp_path / "list.csv").write_text(
        "clip_id,video,imu,start,stop,verb,split\n"
        + "".join(
            f"c{n},robot.mkv,robot_imu.csv,{n},{n + 1},{'ab'[n % 2]},train\n" for n in range(3)
        )
    )
    tree: dict[str, Any] = {
        "manifest": "list.csv",
        "out": "features",
        "sensors": {"imu": SENSOR},
        "audio": {"front_end": "vggish", "window_s": 0.5},
        "sets": {
            "one": {
                "rgb": {"name": "s3d", "weights": "random:0", "frames": 8, "size": 32},
                "audio": {"name": "resnet18", "weights": "random:1", "image": [32, 32]},
                "imu": {"name": "windows"},
            }
        },
    }
    extract(config.build(ExtractRecipe, tree, "test"))
    size = {"dim": 16, "attention_heads": 2, "ffn_width": 16, "head_width": 16}
    tree = {"store": "features/one", "out": "run", "epochs": 1, "val_split": "train", "size": size}
    train_baseline(config.build(BaselineRecipe, tree, "test"))
    assert found.media.keys() == {"rgb", "flow", "audio", "imu"}
    topics = [part for topic in TOPICS for part in ("--topic", topic)]
    windows = ["robot.mcap", *topics, "--window", "1", "--stop", "3"]
    for out, arguments in (("bag", windows), ("list", ["list.csv"])):
        result = CliRunner().invoke(main, ["predict", "run", *arguments, "--out", out])
        assert result.exit_code == 0, result.output
    of_bag, of_list = rows(Path("bag")), rows(Path("list"))
    assert len(of_bag) == len(of_list) == 3
    for one, other in zip(of_bag, of_list, strict=True):
        said = {key: value for key, value in one.items() if key.startswith("verb")}
        assert said
        assert {key: other[key] for key in said} == said
    assert of_bag[0]["clip_id"] == "robot.mcap@0.000"
