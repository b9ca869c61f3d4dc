"""Robots' recordings: topics of an MCAP bag (ROS 2) as files that everything else reads.

Pictures and sound go into one Matroska file, without loss (JPEG as it is, other pictures as FFV1,
sound as PCM), at the times at which the robot took them; a sensor goes into a table. So what is
recognised in a bag is decoded, sampled and resampled by the very code that read the training's
clips. Needs the extra ``[mcap]``.
"""

import csv
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import av
import cv2
import numpy as np
import numpy.typing as npt

from karmma_pipeline.data.sensors import UNITS, Sensor
from karmma_pipeline.data.sources import FileSource, SensorSource, Source
from karmma_pipeline.errors import ConfigError, MediaError
from karmma_pipeline.recognition.clips import Recording

_logger = logging.getLogger(__name__)

Clock = Literal["header", "log"]

_PICTURES = ("rgb", "flow")
_TICK = Fraction(1, 1000)  # Matroska's clock
_NS = 1e-9
# Sound that begins this much before or after its predecessor's end is a hole, not jitter.
_JITTER_S = 0.05
_JPEG = b"\xff\xd8"

# Encodings of sensor_msgs/Image: channels, FFmpeg's name of the pixels.
_RAW = {
    "rgb8": (3, "rgb24"),
    "8UC3": (3, "bgr24"),
    "bgr8": (3, "bgr24"),
    "rgba8": (4, "rgba"),
    "bgra8": (4, "bgra"),
    "mono8": (1, "gray"),
    "8UC1": (1, "gray"),
}


@dataclass(frozen=True)
class Topic:
    """What becomes of a topic.

    fields: of a sensor's message, such as ``linear_acceleration.x``, in the order of the channels;
        none: all its numbers.
    """

    modality: str
    name: str
    fields: tuple[str, ...] = ()


def parse_topics(given: Sequence[str]) -> dict[str, Topic]:
    """Read ``MODALITY=/topic`` or ``MODALITY=/topic:field,field``.

    Raises:
        ConfigError: one is not of this form, or a modality comes twice.
    """
    topics: dict[str, Topic] = {}
    for text in given:
        modality, equals, rest = text.partition("=")
        name, _, fields = rest.partition(":")
        if not (modality and equals and name):
            raise ConfigError(f"--topic {text}: write MODALITY=/topic, such as rgb=/camera/image.")
        if modality in topics:
            raise ConfigError(f"--topic {text}: {modality} has a topic already.")
        topics[modality] = Topic(modality, name, tuple(f for f in fields.split(",") if f))
    return topics


def unpack(
    bag: Path,
    topics: Mapping[str, Topic],
    sensors: Mapping[str, Sensor],
    folder: Path,
    clock: Clock = "header",
) -> Recording:
    """Write the topics of a bag as files, and return where each modality lies.

    Time 0 is the first message of any of the topics.

    Args:
        bag: the file.
        topics: by modality; ``flow`` is that of ``rgb`` if it is not named.
        sensors: settings of those modalities that are sensors.
        folder: where files are written, named after the bag.
        clock: the time in a message's header, where it has one, or that of its recording.

    Raises:
        ConfigError: a topic is not in the bag or holds something else.
        MediaError: the bag cannot be read.
    """
    with _opened(bag) as reader:
        _check_topics(bag, reader, topics)
        wanted = {topic.name for topic in topics.values()}
        zero = _first_times(reader, wanted, clock)
        folder.mkdir(parents=True, exist_ok=True)
        media = folder / f"{bag.stem}.mkv"
        with ExitStack() as stack:
            file = _MediaWriter(media, topics)
            stack.callback(file.close)
            tables = {
                m: _Table(folder / f"{bag.stem}_{m}.csv", topics[m], sensor)
                for m, sensor in sensors.items()
                if m in topics
            }
            for name, kind, message, time_ns in _messages(reader, wanted, clock):
                at_s = (time_ns - zero) * _NS
                if at_s < 0:  # recorded late, and older than all that is first of its topic
                    continue
                for m, topic in topics.items():
                    if topic.name == name and m in tables:
                        tables[m].add(at_s, message)
                    elif topic.name == name:
                        file.add(m, kind, at_s, message)
    sources: dict[str, Source] = {m: table.close() for m, table in tables.items()}
    sources |= dict.fromkeys((m for m in topics if m not in tables), FileSource(media))
    if "rgb" in topics:
        sources.setdefault("flow", FileSource(media))
    return Recording(sources, max([file.end_s, *(table.end_s for table in tables.values())]))


@contextmanager
def _opened(bag: Path) -> Iterator[Any]:
    if find_spec("mcap_ros2") is None:
        raise ConfigError(
            f"{bag}: reading bags needs mcap-ros2-support: pip install 'karmma-pipeline[mcap]'."
        )
    from mcap.exceptions import McapError
    from mcap.reader import make_reader
    from mcap_ros2.decoder import DecoderFactory

    try:
        with bag.open("rb") as file:
            yield make_reader(file, decoder_factories=[DecoderFactory()])
    except FileNotFoundError:
        raise MediaError(f"{bag}: no such file.") from None
    except (McapError, EOFError, OSError) as error:
        reason = str(error) or "it ends too early"
        raise MediaError(f"{bag}: not an MCAP bag, or damaged ({reason}).") from None


def _check_topics(bag: Path, reader: Any, topics: Mapping[str, Topic]) -> None:
    """Refuse topics that are not there, and say which are."""
    summary = reader.get_summary()
    if summary is None:
        raise MediaError(
            f"{bag}: has no index, because its recording was interrupted; `mcap recover` writes "
            "one."
        )
    counts = summary.statistics.channel_message_counts if summary.statistics else {}
    there = {
        channel.topic: f"{summary.schemas[channel.schema_id].name}, {counts.get(number, 0)}"
        for number, channel in summary.channels.items()
        if channel.schema_id in summary.schemas
    }
    listed = "; ".join(f"{name} ({kind} messages)" for name, kind in sorted(there.items()))
    if not topics:
        raise ConfigError(
            f"{bag}: select topics with --topic MODALITY=/topic; it has {listed or 'none'}."
        )
    for topic in topics.values():
        if topic.name not in there:
            raise ConfigError(
                f"--topic {topic.modality}={topic.name}: {bag} has no such topic; it has "
                f"{listed or 'none'}."
            )


def _messages(reader: Any, names: set[str], clock: Clock) -> Iterator[tuple[str, str, Any, int]]:
    """Yield topic, type, message and time in ns, in the order of recording."""
    for schema, channel, logged, message in reader.iter_decoded_messages(topics=sorted(names)):
        stamp = getattr(getattr(message, "header", None), "stamp", None)
        taken = 0 if stamp is None else stamp.sec * 1_000_000_000 + stamp.nanosec
        time = taken if clock == "header" and taken else logged.log_time
        yield channel.topic, schema.name, message, time


def _first_times(reader: Any, names: set[str], clock: Clock) -> int:
    """Return the earliest of the topics' first messages, ns."""
    first: dict[str, int] = {}
    for name, _, _, time in _messages(reader, names, clock):
        first.setdefault(name, time)
        if len(first) == len(names):
            break
    if missing := names - first.keys():
        raise MediaError(f"topic {min(missing)} has no messages.")
    return min(first.values())


class _MediaWriter:
    """Writes pictures and sound into one file; what is not asked for has no stream."""

    def __init__(self, path: Path, topics: Mapping[str, Topic]) -> None:
        self.path, self.end_s, self.left_out = path, 0.0, 0
        self._of = {m: topic.name for m, topic in topics.items()}
        self._waiting: list[tuple[str, float, Any]] = []
        self._video: Any = None
        self._audio: Any = None
        self._file: Any = None
        self._last, self._sound_end = -1, -np.inf

    def add(self, modality: str, kind: str, at_s: float, message: Any) -> None:
        """Take a message; its stream must be known before the first one is written."""
        if modality == "flow" and "rgb" in self._of:
            if self._of["flow"] != self._of["rgb"]:
                raise ConfigError(
                    "--topic flow: flow is computed from images; give the topic of rgb instead."
                )
            return
        what = "video" if modality in _PICTURES else "audio"
        if what == "video" and not kind.endswith(("Image", "CompressedImage")):
            raise _wrong(modality, self._of[modality], kind, "images")
        if what == "audio" and "Audio" not in kind:
            raise _wrong(modality, self._of[modality], kind, "audio")
        if self._file is None:
            self._waiting.append((what, at_s, message))
            needed = {"video" if m in _PICTURES else "audio" for m in self._of if m in _MEDIA}
            if needed <= {one[0] for one in self._waiting}:
                self._begin()
            return
        self._write(what, at_s, message)

    def _begin(self) -> None:
        """Open the file with a stream of each kind that has come, and write what has waited."""
        self._file = av.open(str(self.path), "w", format="matroska")
        for what in dict.fromkeys(one[0] for one in self._waiting):
            first = next(message for kind, _, message in self._waiting if kind == what)
            if what == "video":
                self._video = self._video_stream(_picture(first))
            else:
                self._audio = self._audio_stream(_sound(first))
        waiting, self._waiting = self._waiting, []
        for what, at_s, message in sorted(waiting, key=lambda one: one[1]):
            self._write(what, at_s, message)

    def _video_stream(self, picture: bytes | npt.NDArray[np.uint8]) -> Any:
        """Return a stream as the first picture needs it."""
        jpeg = isinstance(picture, bytes)
        stream = self._file.add_stream("mjpeg" if jpeg else "ffv1", rate=30)
        stream.height, stream.width = _decoded(picture).shape[:2]
        stream.pix_fmt = "yuvj420p" if jpeg else "bgr0"
        stream.time_base = stream.codec_context.time_base = _TICK
        return stream

    def _audio_stream(self, sound: "_Sound") -> Any:
        stream = self._file.add_stream("pcm_s16le", rate=sound.rate)
        stream.layout = "mono" if sound.samples.shape[1] == 1 else "stereo"
        return stream

    def _write(self, what: str, at_s: float, message: Any) -> None:
        if what == "audio":
            self._write_sound(at_s, _sound(message))
            return
        tick = round(at_s / _TICK)
        if tick <= self._last:  # a player would show only one of them
            self.left_out += 1
            return
        self._last, self.end_s = tick, max(self.end_s, at_s)
        picture = _picture(message)
        if isinstance(picture, bytes) != (self._video.codec_context.name == "mjpeg"):
            raise MediaError(
                f"{self._of.get('rgb')}: the encoding of the images changes during the recording."
            )
        if isinstance(picture, bytes):
            packet = av.Packet(picture)
            packet.pts = packet.dts = tick
            packet.time_base, packet.stream, packet.is_keyframe = _TICK, self._video, True
            self._file.mux(packet)
            return
        frame = av.VideoFrame.from_ndarray(picture, format="bgr24").reformat(format="bgr0")
        frame.pts, frame.time_base = tick, _TICK
        self._file.mux(self._video.encode(frame))

    def _write_sound(self, at_s: float, sound: "_Sound") -> None:
        # Messages come when they come; samples follow one another, unless some were lost.
        if abs(at_s - self._sound_end) > _JITTER_S:
            self._sound_end = max(at_s, self._sound_end)
        samples = np.ascontiguousarray(sound.samples.reshape(1, -1))
        frame = av.AudioFrame.from_ndarray(samples, format="s16", layout=self._audio.layout.name)
        frame.sample_rate, frame.time_base = sound.rate, Fraction(1, sound.rate)
        frame.pts = round(self._sound_end * sound.rate)
        self._file.mux(self._audio.encode(frame))
        self._sound_end += len(sound.samples) / sound.rate
        self.end_s = max(self.end_s, self._sound_end)

    def close(self) -> None:
        """Finish the file."""
        if self._file is None and self._waiting:  # a kind that never came
            self._begin()
        if self._file is None:
            return
        for stream in (self._video, self._audio):
            if stream is not None and stream.codec_context.name != "mjpeg":
                self._file.mux(stream.encode(None))
        self._file.close()
        if self.left_out:
            _logger.warning(
                "%d images were skipped: their timestamps do not increase", self.left_out
            )


_MEDIA = {*_PICTURES, "audio"}


def _wrong(modality: str, topic: str, kind: str, wanted: str) -> ConfigError:
    return ConfigError(f"--topic {modality}={topic}: {kind} does not contain {wanted}.")


def _picture(message: Any) -> bytes | npt.NDArray[np.uint8]:
    """Return a JPEG as it is, any other picture as uint8 [H, W, 3], blue first.

    Raises:
        MediaError: it is of a kind that has no colours, such as depth.
    """
    data = bytes(message.data)
    if not hasattr(message, "encoding"):  # CompressedImage
        if data.startswith(_JPEG):
            return data
        return _decoded(data)
    if message.encoding not in _RAW:
        raise MediaError(f"encoding={message.encoding!r} is not supported, only {', '.join(_RAW)}.")
    channels, name = _RAW[message.encoding]
    rows = np.frombuffer(data, np.uint8).reshape(message.height, message.step)
    pixels = rows[:, : message.width * channels]
    shape = (message.height, message.width, channels) if channels > 1 else pixels.shape
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels).reshape(shape), format=name)
    return np.asarray(frame.to_ndarray(format="bgr24"), np.uint8)


def _decoded(picture: bytes | npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Return a picture as uint8 [H, W, 3], blue first."""
    if not isinstance(picture, bytes):
        return picture
    shown: Any = cv2.imdecode(np.frombuffer(picture, np.uint8), cv2.IMREAD_COLOR)
    if shown is None:
        raise MediaError("a compressed image is damaged, or neither JPEG nor PNG.")
    return np.asarray(shown, np.uint8)


@dataclass(frozen=True)
class _Sound:
    """Samples int16 [S, channels] at a rate in Hz."""

    samples: npt.NDArray[np.int16]
    rate: int


def _sound(message: Any) -> _Sound:
    """Return the samples of an ``audio_common_msgs/AudioStamped`` message.

    Raises:
        MediaError: it does not say how its samples lie, or they are none that are known.
    """
    audio = getattr(message, "audio", message)
    info, data = getattr(audio, "info", None), getattr(audio, "audio_data", None)
    if info is None or data is None or not info.rate:
        raise MediaError(
            "audio: only audio_common_msgs/AudioStamped is supported; other messages do not "
            "define their sample layout."
        )
    floats = np.asarray(data.float32_data, np.float32)
    if len(floats):
        samples = np.clip(np.rint(floats * 32767), -32768, 32767).astype(np.int16)
    else:
        samples = np.asarray(data.int16_data, np.int16)
    channels = max(1, int(info.channels))
    if channels > 2 or not len(samples):
        raise MediaError(
            f"audio: expected int16 or float32 samples of 1 or 2 channels, found {len(samples)} "
            f"samples of {channels} channels."
        )
    return _Sound(samples.reshape(-1, channels), int(info.rate))


@dataclass
class _Table:
    """Writes a sensor's messages as the table that the training's sensor settings read."""

    path: Path
    topic: Topic
    sensor: Sensor
    end_s: float = 0.0
    _rows: list[tuple[float, list[float]]] = field(default_factory=list)
    _fields: tuple[str, ...] = ()

    def add(self, at_s: float, message: Any) -> None:
        """Take a message."""
        numbers = dict(_numbers(message))
        if not self._fields:
            self._fields = self._chosen(numbers)
        self._rows.append((at_s, [numbers[name] for name in self._fields]))
        self.end_s = max(self.end_s, at_s)

    def _chosen(self, numbers: Mapping[str, float]) -> tuple[str, ...]:
        names = self.sensor.channels
        fields = self.topic.fields
        if not fields and isinstance(names, tuple) and all(name in numbers for name in names):
            fields = tuple(str(name) for name in names)
        fields = fields or tuple(numbers)
        where = f"--topic {self.topic.modality}={self.topic.name}"
        if unknown := [name for name in fields if name not in numbers]:
            raise ConfigError(f"{where}: no field {unknown[0]}; it has {', '.join(numbers)}.")
        if len(fields) != self.sensor.channel_count:
            raise ConfigError(
                f"{where}: the model takes {self.sensor.channel_count} channels, but the message "
                f"has {len(fields)} numeric fields; select {self.sensor.channel_count} of them "
                f"with {where}:FIELD,FIELD: {', '.join(numbers)}."
            )
        return fields

    def close(self) -> SensorSource:
        """Write the table and return it."""
        sensor = self.sensor
        if sensor.variable is not None or sensor.axis or sensor.from_first or sensor.time is None:
            raise ConfigError(
                f"--topic {self.topic.modality}: bags are supported only for sensors with a "
                "time column on the clips' clock."
            )
        names = sensor.channels if isinstance(sensor.channels, tuple) else ()
        columns = [*names] or [*range(sensor.channel_count + 1)]
        if not names:
            columns.remove(sensor.time if isinstance(sensor.time, int) else columns[-1])
        unit = UNITS[sensor.unit]
        with self.path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            named = [str(name) for name in (sensor.time, *columns)]
            order = _order([sensor.time, *columns])
            writer.writerow([named[n] for n in order])
            for at_s, values in sorted(self._rows, key=lambda row: row[0]):
                cells = [repr((at_s - sensor.offset_s) / unit), *map(repr, values)]
                writer.writerow([cells[n] for n in order])
        return SensorSource(self.path)


def _order(columns: Sequence[int | str]) -> list[int]:
    """Return the places of columns in a file: those with numbers lie where they say."""
    numbered = {c: n for n, c in enumerate(columns) if isinstance(c, int)}
    others = [n for n, c in enumerate(columns) if not isinstance(c, int)]
    return [numbered[c] if c in numbered else others.pop(0) for c in range(len(columns))]


def _numbers(message: Any, prefix: str = "") -> Iterator[tuple[str, float]]:
    """Yield the numbers of a message by their dotted names; headers and covariances are none."""
    for name in getattr(message, "__slots__", ()):
        value = getattr(message, name)
        if name == "header" or name.endswith("covariance"):
            continue
        if isinstance(value, bool | int | float):
            yield prefix + name, float(value)
        elif hasattr(value, "__slots__") and not isinstance(value, str | bytes):
            yield from _numbers(value, f"{prefix}{name}.")
        elif isinstance(value, list | tuple | np.ndarray):
            flat = [v for v in value if isinstance(v, int | float)]
            yield from ((f"{prefix}{name}.{n}", float(v)) for n, v in enumerate(flat))
