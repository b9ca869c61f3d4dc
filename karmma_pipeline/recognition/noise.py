"""Made-up signals of all sensors that a model takes: to warm up with, and to measure with."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from karmma_pipeline.extraction.types import DecodeSettings

# Pictures per second and their size; and seconds of sound, or of a sensor, that come at a time.
_FPS, _PICTURE, _CHUNK_S = 25, (480, 640, 3), 0.1

# Rate of a sensor whose time stamps alone say it, as a multiple of that of its windows.
_FASTER = 2


class Noise:
    """Sensors that send noise without end, each from 0 s on.

    Args:
        decode: what the model takes, and with it the sensors' shapes and rates.
        audio_hz: rate of the sound.
    """

    def __init__(self, decode: DecodeSettings, audio_hz: int) -> None:
        rng = np.random.default_rng(0)
        self._pictures = rng.integers(0, 256, (_FPS, *_PICTURE), np.uint8)
        self._sound = (rng.random(round(_CHUNK_S * audio_hz), np.float32) - 0.5) / 2
        self._sensors, self._audio_hz = decode.sensors, audio_hz
        self._rng, self._sent = rng, dict[str, int]()

    def until(self, stop_s: float) -> Iterator[tuple[str, Any, Any]]:
        """Yield what is sent up to a moment, if not yielded before: sensor, time(s), values."""
        for number in self._due("rgb", _FPS, stop_s):
            # No picture and no sound comes twice: what was computed of it would not be again.
            again, place = divmod(number, _FPS)
            yield "rgb", number / _FPS, self._pictures[place] + np.uint8(again % 256)
        for number in self._due("audio", self._audio_hz / len(self._sound), stop_s):
            sound = np.roll(self._sound, number)
            yield "audio", number * len(sound) / self._audio_hz, sound
        for name, sensor in self._sensors.items():
            hz = sensor.source_hz or _FASTER * sensor.rate_hz
            numbers = np.array(self._due(name, hz, stop_s))
            if len(numbers):
                values = self._rng.standard_normal((len(numbers), sensor.channel_count))
                yield name, numbers / hz, values

    def _due(self, sensor: str, hz: float, stop_s: float) -> range:
        due = range(self._sent.get(sensor, 0), max(0, int(stop_s * hz)))
        self._sent[sensor] = max(due.stop, due.start)
        return due
