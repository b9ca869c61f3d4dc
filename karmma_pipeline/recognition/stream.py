"""Live recognition: a prediction for the newest window, from the sensors that have sent data.

Windows are decoded, sampled and computed by the code that reads files, so predictions equal those
of `karmma predict` for the same window of the same signals.
"""

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from karmma_pipeline.data.manifest import Clip
from karmma_pipeline.data.sensors import Sensor
from karmma_pipeline.data.sources import FileSource, SensorSource, Source
from karmma_pipeline.errors import ConfigError
from karmma_pipeline.extraction.decode.worker import decode_clip
from karmma_pipeline.extraction.inference.recent import Recent
from karmma_pipeline.extraction.media.interface import MediaFaultError, MediaReader
from karmma_pipeline.extraction.media.sensor_series import SensorSeries
from karmma_pipeline.extraction.types import DecodedClip, DecodeSettings, InputSpec
from karmma_pipeline.modalities import Reason
from karmma_pipeline.recognition.noise import Noise
from karmma_pipeline.recognition.prediction import DROPPED, Prediction
from karmma_pipeline.recognition.samples import Samples, SamplesView
from karmma_pipeline.recognition.sensors import (
    CAMERA,
    MICROPHONE,
    Camera,
    CameraView,
    LiveFrames,
    Microphone,
    SoundView,
)
from karmma_pipeline.recognition.spectrograms import Spectrograms

SENSOR_OF = {"rgb": "rgb", "flow": "rgb", "audio": "audio"}
"""Modality to the sensor that it comes from: flow is computed from the camera's pictures.

A sensor of the model's own, such as an IMU, has the name of its modality.
"""

_PLACES = {"rgb": CAMERA, "audio": MICROPHONE}

NO_DATA, STALE, GAP, FROZEN = "no_data", "stale", "gap", "frozen"
OUT_OF_RANGE = Reason.OUT_OF_RANGE.label

# Faults of a window that are no gap in what its sensor has sent.
_OTHER_FAULTS = {Reason.TOO_SHORT, Reason.BAD_CLOCK}

Answer = Callable[[Clip, DecodedClip, Recent], Prediction]

# How long nobody may ask before what is sent meanwhile is no longer kept, seconds.
_PAUSE_S = 10.0

# Of a window and of a hop, seconds: no machine holds a shorter one, no memory a longer one.
_SHORTEST_S, _LONGEST_S = 0.001, 3600

# Two moments that are one but for rounding, in hops.
_ROUNDING = 1e-6

# The longest of so many last answers is how long the next one is thought to take.
_REMEMBERED = 8


@dataclass(frozen=True)
class StreamSettings:
    """Settings of a stream; all times in seconds. See `Recognizer.stream`.

    Attributes:
        window_s: length of a window.
        hop_s: time between windows.
        deadline_s: maximum age of a sensor's newest sample, for all sensors or by name.
        tolerance_s: maximum delay of samples; windows end this long before now.
        share: minimum share of a window that a sensor must cover.
        frozen_s: maximum duration of identical frames; None: no limit.
        audio_hz: sample rate of the pushed audio; None: that of the model's spectrograms.
        limits: sensor to its valid range (low, high).

    Raises:
        ConfigError: a setting is invalid.
    """

    window_s: float = 2.0
    hop_s: float = 0.5
    deadline_s: float | Mapping[str, float] = 0.5
    tolerance_s: float = 0.1
    share: float = 0.8
    frozen_s: float | None = None
    audio_hz: int | None = None
    limits: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        deadlines = self.deadline_s
        named = deadlines if isinstance(deadlines, Mapping) else {"": deadlines}
        for key, seconds in {"window_s": self.window_s, "hop_s": self.hop_s}.items():
            if not _SHORTEST_S <= seconds <= _LONGEST_S:
                raise ConfigError(
                    f"{key}={seconds}: must be from {_SHORTEST_S} to {_LONGEST_S} seconds."
                )
        above = {"frozen_s": self.frozen_s, "audio_hz": self.audio_hz}
        above |= {f"deadline_s {name}".strip(): value for name, value in named.items()}
        for key, value in above.items():
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{key}={value}: must be a number > 0.")
        if not (math.isfinite(self.tolerance_s) and self.tolerance_s >= 0):
            raise ConfigError(f"tolerance_s={self.tolerance_s}: must be a number >= 0.")
        if not 0 < self.share <= 1:
            raise ConfigError(f"share={self.share}: must be > 0 and <= 1.")
        for name, (low, high) in self.limits.items():
            if not low < high:
                raise ConfigError(
                    f"limits: {name} from {low} to {high}: write the lowest value first."
                )

    def deadline(self, sensor: str) -> float:
        """Return the deadline of a sensor."""
        if isinstance(self.deadline_s, Mapping):
            return self.deadline_s.get(sensor, 0.5)
        return self.deadline_s


class Stream:
    """Predicts the newest window of live sensors; created by `Recognizer.stream`.

    `push` may be called from any thread at any time, `step` from one thread. Windows are
    ``[i * hop_s, i * hop_s + window_s]`` on the sensors' clock, so calling `step` a little early
    or late gives the same window. The stream never waits for a missing sensor.

    Attributes:
        settings: its settings.
        modalities: the modalities of the model.
        skipped: number of windows without a prediction, see `step`.
        lag_s: age of the last predicted window when its computation started: at most ``hop_s`` plus
            ``tolerance_s`` if `step` is called again as soon as it returns. The time of the
            computation itself is not included.
    """

    def __init__(
        self,
        settings: StreamSettings,
        decode: DecodeSettings,
        modalities: tuple[str, ...],
        answer: Answer,
    ) -> None:
        self.settings, self.modalities = settings, modalities
        self._decode, self._answer = decode, answer
        self._off: frozenset[str] = frozenset()
        keep_s = 2 * (_PAUSE_S + settings.window_s + settings.hop_s + settings.tolerance_s)
        transforms = [spec.transform for spec in decode.inputs if spec.transform is not None]
        self._camera = Camera(transforms, keep_s)
        self._audio_hz = settings.audio_hz or decode.audio.sample_rate
        self._microphone = Microphone(self._audio_hz, keep_s, settings.tolerance_s)
        self._samples = {m: Samples(m, decode.sensors[m], keep_s)
                         for m in modalities if m in decode.sensors}  # fmt: skip
        self._check_names()
        # As long as windows overlap, one may want what an earlier one has made.
        self._recent = Recent(math.ceil(settings.window_s / settings.hop_s))
        self._frames, self._spectrograms = LiveFrames(self._recent), Spectrograms(self._recent)
        self._stepping = threading.Lock()
        self._last: int | None = None
        self._took = deque[float](maxlen=_REMEMBERED)
        self._let_go = False
        self.skipped, self.lag_s = 0, 0.0

    def push(
        self,
        sensor: str,
        time_s: float | npt.NDArray[np.float64],
        values: npt.NDArray[np.generic],
    ) -> None:
        """Add new data of a sensor.

        Args:
            sensor: ``rgb``, ``audio``, or the modality of a sensor that the model was trained
                with. Flow is computed from ``rgb``.
            time_s: time of the frame or of the first audio sample, in seconds on the clock that
                all sensors and `step` share; for a block of sensor samples, the time of each, [S].
            values: a frame, uint8 [H, W, 3] in RGB; audio, float32 [S], mono; or one sample [C] or
                a block of samples [S, C] of a sensor, with channels as in training.

        Raises:
            ConfigError: there is no such sensor, or the values have another shape or type.
        """
        if sensor in self._samples:
            self._samples[sensor].push(time_s, values)
            return
        if isinstance(time_s, np.ndarray) and time_s.ndim:
            raise ConfigError(f"push({sensor!r}, ...): expected a single time.")
        if sensor == "rgb":
            self._camera.push(float(time_s), values)  # type: ignore[arg-type]  # it looks itself
        elif sensor == "audio":
            self._microphone.push(float(time_s), values)  # type: ignore[arg-type]
        else:
            raise ConfigError(f"push({sensor!r}, ...): the sensors are {self._names()}.")

    def _names(self) -> str:
        *others, last = ("rgb", "audio", *self._samples)
        return f"{', '.join(others)} and {last}"

    def _check_names(self) -> None:
        named = self.settings.deadline_s if isinstance(self.settings.deadline_s, Mapping) else {}
        known = {*SENSOR_OF.values(), *self._samples}
        if unknown := [name for name in named if name not in known]:
            raise ConfigError(
                f"deadline_s: no sensor {unknown[0]!r}; the sensors are {self._names()}."
            )
        if unknown := [name for name in self.settings.limits if name not in self._samples]:
            raise ConfigError(
                f"limits: {unknown[0]!r} is not a numeric sensor; the model has "
                f"{', '.join(self._samples) or 'none'}."
            )

    def switch(self, modality: str, on: bool) -> None:
        """Switch a modality off or on again, whatever its sensor sends.

        Raises:
            ConfigError: the model does not have it.
        """
        if modality not in self.modalities:
            raise ConfigError(
                f"switch({modality!r}, ...): the model takes {', '.join(self.modalities)}."
            )
        self._off = self._off - {modality} if on else self._off | {modality}

    @property
    def ignored(self) -> dict[str, int]:
        """Sensor to the number of samples that were too late, in the future, or NaN."""
        others = {name: samples.ignored for name, samples in self._samples.items()}
        return {"rgb": self._camera.ignored, "audio": self._microphone.ignored, **others}

    def noise(self) -> Noise:
        """Return synthetic signals of all its sensors."""
        return Noise(self._decode, self._audio_hz)

    def warm_up(self) -> None:
        """Run once on synthetic input of all sensors, since the first pass of a network is slow.

        Data that has been pushed is not affected.
        """
        other = Stream(self.settings, self._decode, self.modalities, self._answer)
        now_s = self.settings.window_s + self.settings.tolerance_s
        for sensor, time_s, values in other.noise().until(now_s):
            other.push(sensor, time_s, values)
        other.step(now_s)
        self._took.extend(other._took)

    def step(self, now_s: float) -> Prediction | None:
        """Return the prediction for the newest window; None if none is due, or it is skipped.

        The window ends at least ``tolerance_s`` before ``now_s``. Earlier windows without a
        prediction are skipped and counted. The window itself is also skipped if, judging by the
        last predictions, its own would be more than a window length late while the next one would
        not. If the clock jumps back by more than a window, the stream restarts.

        Args:
            now_s: current time in seconds on the sensors' clock.

        Raises:
            ConfigError: ``now_s`` is not finite.
        """
        if not math.isfinite(now_s):
            raise ConfigError(f"step({now_s}): expected seconds on the sensors' clock.")
        with self._stepping:
            settings = self.settings
            room_s = now_s - settings.tolerance_s - settings.window_s
            place = math.floor(room_s / settings.hop_s + _ROUNDING)
            if self._last is not None and place <= self._last:
                if (self._last - place) * settings.hop_s <= settings.window_s:
                    return None
                self._begin_anew()
            if self._last is not None:
                self.skipped += place - self._last - 1
            self._last, start_s = place, place * settings.hop_s
            stop_s = start_s + settings.window_s
            # Not two in a row, or who asks once per hop, and late each time, would get no answer.
            self._let_go = not self._let_go and self._is_too_late(now_s - stop_s)
            if self._let_go:
                self.skipped += 1
                return None
            began_s = time.perf_counter()
            prediction = self._window(start_s, stop_s, now_s)
            self._took.append(time.perf_counter() - began_s)
            self.lag_s = now_s - stop_s
            return prediction

    def _is_too_late(self, lag_s: float) -> bool:
        """Tell whether an answer begun so long after its window comes late, and the next in time.

        Late is what comes more than a window's length after the window.
        """
        room_s = self.settings.window_s - max(self._took, default=0.0)
        return self.settings.tolerance_s <= room_s < lag_s

    def _begin_anew(self) -> None:
        self._camera.forget()
        self._microphone.forget()
        for samples in self._samples.values():
            samples.forget()
        self._last = None

    def _window(self, start_s: float, stop_s: float, now_s: float) -> Prediction:
        by_s = now_s + self.settings.tolerance_s  # clocks of sensors may be that much ahead
        views = _Views(
            self._camera.view(start_s, stop_s, by_s),
            self._microphone.view(start_s, stop_s, by_s),
            {name: samples.view(start_s, by_s) for name, samples in self._samples.items()},
        )
        why = {m: reason for m in self.modalities
               if (reason := self._absence(m, views, start_s, stop_s, now_s))}  # fmt: skip
        media: dict[str, Source] = {m: FileSource(_PLACES[of]) for m, of in SENSOR_OF.items()}
        media |= {name: SensorSource(Path(name)) for name in self._samples}
        clip = Clip(f"{start_s:.3f}", media, start_s, stop_s, {})
        here, missing = self._inputs(why)
        settings = replace(self._decode, inputs=here)
        image_of = self._spectrograms.of(start_s)
        self._recent.begin()
        decoded = decode_clip(clip, settings, views, self._frames.of, image_of)
        # What the sensors do not cover well enough for the wanted moments is a gap in them.
        why |= {spec.modality: reason.label if reason in _OTHER_FAULTS else GAP
                for spec, reason in decoded.reasons.items()}  # fmt: skip
        decoded.reasons |= dict.fromkeys(missing, Reason.GAP)
        prediction = self._answer(clip, decoded, self._recent)
        reasons = {m: why.get(m, reason) for m, reason in prediction.reasons.items()}
        return replace(prediction, reasons=reasons)

    def _inputs(self, why: Mapping[str, str]) -> tuple[tuple[InputSpec, ...], list[InputSpec]]:
        """Return what is there, and what is not."""
        inputs = self._decode.inputs
        here = tuple(spec for spec in inputs if spec.modality not in why)
        return here, [spec for spec in inputs if spec.modality in why]

    def _absence(
        self, modality: str, views: "_Views", start_s: float, stop_s: float, now_s: float
    ) -> str | None:
        """Return why a modality is not to be seen in a window; None if it is."""
        if modality in self._off:
            return DROPPED
        sensor = SENSOR_OF.get(modality, modality)
        newest_s = self._newest_s(sensor)
        if newest_s is None:
            return NO_DATA
        settings, deadline_s = self.settings, self.settings.deadline(sensor)
        if views.is_frozen(sensor, settings.frozen_s):
            return FROZEN
        if newest_s < now_s - deadline_s or not views.has(sensor):
            return STALE
        if not views.is_within(sensor, start_s, stop_s, settings.limits):
            return OUT_OF_RANGE
        least_s = settings.share * (stop_s - start_s) * (1 - _ROUNDING)
        return GAP if views.covered_s(sensor, start_s, stop_s, deadline_s) < least_s else None

    def _newest_s(self, sensor: str) -> float | None:
        newest = {"rgb": self._camera.newest_s, "audio": self._microphone.newest_s}
        newest |= {name: samples.newest_s for name, samples in self._samples.items()}
        return newest.get(sensor)


@dataclass(frozen=True)
class _Views:
    """What the sensors have sent for a window, in place of open files; None: nothing."""

    camera: CameraView | None
    sound: SoundView | None
    samples: Mapping[str, SamplesView | None]

    def of(self, source: Source) -> MediaReader:
        """Return the view that stands behind a source.

        Raises:
            MediaFaultError: its sensor has sent nothing that is still of use.
        """
        assert isinstance(source, FileSource)  # noqa: S101  (made above)
        view = self.camera if source.path == CAMERA else self.sound
        if view is None:
            raise MediaFaultError(Reason.NO_STREAM, f"{source.path} has not sent any data")
        return view

    def series(self, source: SensorSource, sensor: Sensor) -> SensorSeries:
        """Return the samples of a sensor that has sent some."""
        view = self.samples[source.path.name]
        assert view is not None  # noqa: S101  (else it is not decoded)
        return view.series()

    def has(self, sensor: str) -> bool:
        """Tell whether a sensor has sent anything for the window."""
        views = {"rgb": self.camera, "audio": self.sound, **self.samples}
        return views[sensor] is not None

    def is_frozen(self, sensor: str, frozen_s: float | None) -> bool:
        """Tell whether a camera has sent the very same picture for so long."""
        if sensor != "rgb" or self.camera is None or frozen_s is None:
            return False
        return self.camera.same_s >= frozen_s

    def is_within(
        self,
        sensor: str,
        start_s: float,
        stop_s: float,
        limits: Mapping[str, tuple[float, float]],
    ) -> bool:
        """Tell whether all that a sensor has measured lies within its limits, if it has some."""
        view = self.samples.get(sensor)
        if view is None or sensor not in limits:
            return True
        return view.within(start_s, stop_s, limits[sensor])

    def covered_s(self, sensor: str, start_s: float, stop_s: float, deadline_s: float) -> float:
        """Return for how many seconds of a span a sensor has sent something."""
        if sensor == "rgb" and self.camera is not None:
            return self.camera.covered_s(start_s, stop_s, deadline_s)
        view = self.sound if sensor == "audio" else self.samples.get(sensor)
        return 0.0 if view is None else view.covered_s(start_s, stop_s)
