"""A source of live signals, played into a stream at its own rate: a video, or a camera."""

import heapq
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from karmma_pipeline.data.sources import FileSource
from karmma_pipeline.errors import ConfigError, MediaError
from karmma_pipeline.extraction.media.interface import MediaFaultError, MediaReader
from karmma_pipeline.extraction.media.media_file import OpenMedia
from karmma_pipeline.jobs import StopFlag
from karmma_pipeline.recognition.prediction import Prediction
from karmma_pipeline.recognition.stream import Stream

#: When it is there, the sensor, the time of its first sample, and the values.
Event = tuple[float, str, float, Any]
OnPicture = Callable[[Any], None]

# Seconds of sound that come at a time, as from a sound card.
_CHUNK_S = 0.05

# How often a live loop looks whether a window has become due, seconds.
_POLL_S = 0.01


def video_events(media: OpenMedia, path: Path, rate: int) -> Iterator[Event]:
    """Yield what a file's camera and microphone send, in the order in which it is there.

    Raises:
        MediaError: the file is missing, or holds neither pictures nor sound.
    """
    if path.is_dir():
        raise MediaError(f"--source {path}: is a folder; give a video.")
    if not path.exists():  # a pipe is no regular file, but can be played
        raise MediaError(f"--source {path}: no such file.")
    reader = media.of(FileSource(path))
    sensors, fault = [], None
    for events in (_pictures(reader), _sound(reader, rate)):
        try:
            first = next(events, None)
        except MediaFaultError as error:
            fault = error
            continue
        if first is not None:
            sensors.append(_after(first, events))
    if not sensors and fault is not None:
        raise MediaError(f"{path}: {fault.reason.label}: {fault.hint}")
    return heapq.merge(*sensors, key=_there)


def _there(event: Event) -> float:
    return event[0]


def _after(first: Event, events: Iterator[Event]) -> Iterator[Event]:
    """Yield what a sensor sends until it is damaged, as a sensor that dies."""
    yield first
    try:
        yield from events
    except MediaFaultError:
        return


def _pictures(reader: MediaReader) -> Iterator[Event]:
    starts = reader.frame_starts
    for number, picture in reader.decode(np.arange(len(starts))):
        start_s = float(starts[number])
        yield start_s, "rgb", start_s, picture


def _sound(reader: MediaReader, rate: int) -> Iterator[Event]:
    start_s, stop_s = reader.sound_span(rate)
    count, size = round((stop_s - start_s) * rate), round(_CHUNK_S * rate)
    for first in range(0, count, size):
        at_s, samples = start_s + first / rate, min(size, count - first)
        there_s = at_s + samples / rate
        yield there_s, "audio", at_s, reader.sound(at_s, there_s, rate)


def camera_events(number: int) -> Iterator[Event]:
    """Yield the pictures of a camera of this machine, on the clock since its start; no sound.

    Raises:
        ConfigError: there is no such camera.
    """
    log = getattr(cv2.utils, "logging", cv2)  # of cv2 itself before OpenCV 4.13
    before = log.getLogLevel()
    log.setLogLevel(0)  # silent
    try:
        camera = cv2.VideoCapture(number)
    finally:
        log.setLogLevel(before)
    if not camera.isOpened():
        raise ConfigError(f"--camera {number}: no such camera, or another program uses it.")
    return _of_camera(camera)


def _of_camera(camera: Any) -> Iterator[Event]:
    started = time.monotonic()
    try:
        while True:
            there, picture = camera.read()
            if not there:
                return
            now_s = time.monotonic() - started
            yield now_s, "rgb", now_s, cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)
    finally:
        camera.release()


class Failures:
    """Sensors that die and come back by chance.

    Args:
        rate: probability that a sensor changes from one second to the next.
        seed: of the chance.
    """

    def __init__(self, rate: float, seed: int) -> None:
        if not 0 <= rate <= 1:
            raise ConfigError(f"rate={rate}: must be a probability between 0 and 1.")
        self._rate, self._rng = rate, np.random.default_rng(seed)
        self._until: dict[str, int] = {}
        self._dead: dict[str, bool] = {}

    def hit(self, sensor: str, now_s: float) -> bool:
        """Tell whether what a sensor sends now is lost."""
        while self._until.setdefault(sensor, 0) < now_s:
            self._until[sensor] += 1
            if self._rng.random() < self._rate:
                self._dead[sensor] = not self._dead.get(sensor, False)
        return self._dead.get(sensor, False)


@dataclass(frozen=True)
class Answered:
    """A prediction, and how many seconds after the end of its window it was there."""

    prediction: Prediction
    late_s: float


def simulated(
    stream: Stream, events: Iterator[Event], failures: Failures, show: OnPicture, stop: StopFlag
) -> Iterator[Answered]:
    """Yield the answers that a machine would give which is never late."""
    hop_s = stream.settings.hop_s
    now_s = stream.settings.window_s + stream.settings.tolerance_s
    for there_s, sensor, at_s, values in events:
        while there_s > now_s:
            stop.check("all predictions so far have been printed")
            if (prediction := stream.step(now_s)) is not None:
                yield Answered(prediction, stream.lag_s)
            now_s += hop_s
        _pass_on(stream, failures, show, (there_s, sensor, at_s, values))
    if (prediction := stream.step(now_s)) is not None:
        yield Answered(prediction, stream.lag_s)


def at_its_rate(
    stream: Stream, events: Iterator[Event], failures: Failures, show: OnPicture, stop: StopFlag
) -> Iterator[Answered]:
    """Yield answers while a source plays in a thread of its own, as sensors do."""
    started, over = time.monotonic(), threading.Event()
    faults: list[BaseException] = []

    def play() -> None:
        try:
            for event in events:
                while (early_s := event[0] - (time.monotonic() - started)) > 0:
                    time.sleep(min(early_s, 0.1))
                    if over.is_set():
                        return
                if over.is_set():
                    return
                _pass_on(stream, failures, show, event)
        except BaseException as error:
            faults.append(error)
        finally:
            over.set()

    player = threading.Thread(target=play, daemon=True)
    player.start()
    first_s = stream.settings.window_s + stream.settings.tolerance_s
    try:
        while True:
            stop.check("all predictions so far have been printed")
            last = over.is_set()  # looked at before the step, which then sees all there is
            now_s = time.monotonic() - started
            prediction = stream.step(now_s) if now_s >= first_s else None
            if prediction is not None:
                took_s = time.monotonic() - started - now_s
                yield Answered(prediction, stream.lag_s + took_s)
            elif last:
                break
            else:
                time.sleep(_POLL_S)
    finally:
        over.set()
        player.join()
    if faults:
        raise faults[0]


def _pass_on(stream: Stream, failures: Failures, show: OnPicture, event: Event) -> None:
    there_s, sensor, at_s, values = event
    if not failures.hit(sensor, there_s):
        stream.push(sensor, at_s, values)
        if sensor == "rgb":
            show(values)
