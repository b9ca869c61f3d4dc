"""Answers while sensors send, and while they fail: the newest window, with whatever is there.

A window is decoded, sampled and computed by the code that reads files, so that it gets the answer
that `karmma predict` gives to the same window of the same signals.
"""

import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from karmma_pipeline.data.manifest import Clip, FileSource, Source
from karmma_pipeline.errors import ConfigError
from karmma_pipeline.extraction.decode.worker import decode_clip
from karmma_pipeline.extraction.media.interface import MediaFaultError, MediaReader
from karmma_pipeline.extraction.types import DecodedClip, DecodeSettings, InputSpec
from karmma_pipeline.modalities import Reason
from karmma_pipeline.recognition.prediction import DROPPED, Prediction
from karmma_pipeline.recognition.sensors import (
    CAMERA,
    MICROPHONE,
    Camera,
    CameraView,
    LiveFrames,
    Microphone,
    SoundView,
)

SENSOR_OF = {"rgb": "rgb", "flow": "rgb", "audio": "audio"}
"""Modality to the sensor that it comes from: flow is computed from the camera's pictures."""

_PLACES = {"rgb": CAMERA, "audio": MICROPHONE}

NO_DATA, STALE, GAP, FROZEN = "no_data", "stale", "gap", "frozen"

Answer = Callable[[Clip, DecodedClip], Prediction]

# How long nobody may ask before what is sent meanwhile is no longer kept, seconds.
_PAUSE_S = 10.0

# Two moments that are one but for rounding, in hops.
_ROUNDING = 1e-6


@dataclass(frozen=True)
class StreamSettings:
    """How a stream looks at its sensors; all times in seconds.

    Attributes:
        window_s: length of what is recognised.
        hop_s: from one window to the next.
        deadline_s: how old a sensor's newest sample may be, for all sensors or by name.
        tolerance_s: how late samples may come; windows end this long before they are answered.
        share: part of a window that a sensor must cover.
        frozen_s: for how long a camera may send the very same picture; None: for ever.
        audio_hz: rate of the pushed sound; None: that of the model's spectrograms.

    Raises:
        ConfigError: one of them makes no sense.
    """

    window_s: float = 2.0
    hop_s: float = 0.5
    deadline_s: float | Mapping[str, float] = 0.5
    tolerance_s: float = 0.1
    share: float = 0.8
    frozen_s: float | None = None
    audio_hz: int | None = None

    def __post_init__(self) -> None:
        deadlines = self.deadline_s
        named = deadlines if isinstance(deadlines, Mapping) else {"": deadlines}
        if unknown := [name for name in named if name and name not in SENSOR_OF.values()]:
            raise ConfigError(f"deadline_s: no sensor {unknown[0]!r}; sensors are rgb and audio.")
        above = {"window_s": self.window_s, "hop_s": self.hop_s, "frozen_s": self.frozen_s}
        above |= {"audio_hz": self.audio_hz}
        above |= {f"deadline_s {name}".strip(): value for name, value in named.items()}
        for key, value in above.items():
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{key}={value}: a number above 0 is allowed.")
        if not (math.isfinite(self.tolerance_s) and self.tolerance_s >= 0):
            raise ConfigError(f"tolerance_s={self.tolerance_s}: 0 or seconds above it.")
        if not 0 < self.share <= 1:
            raise ConfigError(f"share={self.share}: above 0 and at most 1 is allowed.")

    def deadline(self, sensor: str) -> float:
        """Return the deadline of a sensor."""
        if isinstance(self.deadline_s, Mapping):
            return self.deadline_s.get(sensor, 0.5)
        return self.deadline_s


class Stream:
    """Live sensors in, a prediction per window out; made by `Recognizer.stream`.

    `push` may be called from any thread at any time, `step` from one. A window lies on the grid
    ``[i * hop_s, i * hop_s + window_s]`` of the sensors' clock, so that a step that comes a little
    early or late looks at the same window. Nothing waits for a sensor that is missing.

    Attributes:
        settings: how it looks at its sensors.
        modalities: that the model takes.
        skipped: windows that passed while nobody asked for them.
        lag_s: how long before the last answered step its window ended.
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
        rate = settings.audio_hz or decode.audio.sample_rate
        self._microphone = Microphone(rate, keep_s, settings.tolerance_s)
        self._frames, self._stepping = LiveFrames(), threading.Lock()
        self._last: int | None = None
        self.skipped, self.lag_s = 0, 0.0

    def push(self, sensor: str, time_s: float, values: npt.NDArray[np.generic]) -> None:
        """Take over what a sensor has sent.

        Args:
            sensor: ``rgb`` or ``audio``; flow is computed from ``rgb``.
            time_s: when the picture, or the first sample, was taken, seconds on a clock that all
                sensors and `step` share.
            values: a picture, uint8 [H, W, 3] in RGB; or sound, float32 [S], mono.

        Raises:
            ConfigError: there is no such sensor, or these are no such values.
        """
        if sensor == "rgb":
            self._camera.push(time_s, values)  # type: ignore[arg-type]  # it looks itself
        elif sensor == "audio":
            self._microphone.push(time_s, values)  # type: ignore[arg-type]
        else:
            raise ConfigError(f"push({sensor!r}, ...): sensors are rgb and audio.")

    def switch(self, modality: str, on: bool) -> None:
        """Leave a modality out, or let it in again, whatever its sensor sends.

        Raises:
            ConfigError: the model does not take it.
        """
        if modality not in self.modalities:
            raise ConfigError(
                f"switch({modality!r}, ...): the model takes {', '.join(self.modalities)}."
            )
        self._off = self._off - {modality} if on else self._off | {modality}

    @property
    def ignored(self) -> dict[str, int]:
        """Sensor to how much of it came too late, from the future, or with NaN in it."""
        return {"rgb": self._camera.ignored, "audio": self._microphone.ignored}

    def step(self, now_s: float) -> Prediction | None:
        """Answer for the newest window; None if it has been answered already.

        The window ends at least ``tolerance_s`` before ``now_s``. Windows before it that nobody
        asked for are skipped and counted. Where the clock goes back by more than a window, all
        begins anew.

        Raises:
            ConfigError: ``now_s`` is no number.
        """
        if not math.isfinite(now_s):
            raise ConfigError(f"step({now_s}): seconds on the sensors' clock are wanted.")
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
            self._last = place
            start_s = place * settings.hop_s
            prediction = self._window(start_s, start_s + settings.window_s, now_s)
            self.lag_s = now_s - start_s - settings.window_s
            return prediction

    def _begin_anew(self) -> None:
        self._camera.forget()
        self._microphone.forget()
        self._last = None

    def _window(self, start_s: float, stop_s: float, now_s: float) -> Prediction:
        by_s = now_s + self.settings.tolerance_s  # clocks of sensors may be that much ahead
        camera = self._camera.view(start_s, stop_s, by_s)
        sound = self._microphone.view(start_s, stop_s, by_s)
        why = {m: reason for m in self.modalities
               if (reason := self._absence(m, camera, sound, start_s, stop_s, now_s))}  # fmt: skip
        media: dict[str, Source] = {m: FileSource(_PLACES[of]) for m, of in SENSOR_OF.items()}
        clip = Clip(f"{start_s:.3f}", media, start_s, stop_s, {})
        here, missing = self._inputs(why)
        of_live = _Views({view.path: view for view in (camera, sound) if view is not None})
        decoded = decode_clip(clip, replace(self._decode, inputs=here), of_live, self._frames.of)
        # What the sensors do not cover well enough for the wanted moments is a gap in them.
        why |= {spec.modality: GAP for spec in decoded.reasons}
        decoded.reasons |= dict.fromkeys(missing, Reason.GAP)
        prediction = self._answer(clip, decoded)
        reasons = {m: why.get(m, reason) for m, reason in prediction.reasons.items()}
        return replace(prediction, reasons=reasons)

    def _inputs(self, why: Mapping[str, str]) -> tuple[tuple[InputSpec, ...], list[InputSpec]]:
        """Return what is there, and what is not."""
        inputs = self._decode.inputs
        here = tuple(spec for spec in inputs if spec.modality not in why)
        return here, [spec for spec in inputs if spec.modality in why]

    def _absence(
        self,
        modality: str,
        camera: CameraView | None,
        sound: SoundView | None,
        start_s: float,
        stop_s: float,
        now_s: float,
    ) -> str | None:
        """Return why a modality is not to be seen in a window; None if it is."""
        if modality in self._off:
            return DROPPED
        sensor = SENSOR_OF.get(modality)
        newest_s = self._newest_s(sensor)
        deadline_s = self.settings.deadline(sensor or "")
        least_s = self.settings.share * (stop_s - start_s) * (1 - _ROUNDING)
        if sensor == "rgb" and camera is not None:
            covered_s = camera.covered_s(start_s, stop_s, deadline_s)
            frozen_s = self.settings.frozen_s
            if frozen_s is not None and camera.same_s >= frozen_s:
                return FROZEN
        elif sensor == "audio" and sound is not None:
            covered_s = sound.covered_s(start_s, stop_s)
        elif newest_s is None:
            return NO_DATA
        else:
            return STALE
        if newest_s is None or newest_s < now_s - deadline_s:
            return STALE
        return GAP if covered_s < least_s else None

    def _newest_s(self, sensor: str | None) -> float | None:
        if sensor is None:
            return None
        return self._camera.newest_s if sensor == "rgb" else self._microphone.newest_s


class _Views:
    """The sensors' views in place of open files."""

    def __init__(self, views: Mapping[object, MediaReader]) -> None:
        self._views = views

    def of(self, source: Source) -> MediaReader:
        """Return the view that stands behind a source.

        Raises:
            MediaFaultError: its sensor has sent nothing that is still of use.
        """
        assert isinstance(source, FileSource)  # noqa: S101  (made above)
        if source.path not in self._views:
            raise MediaFaultError(Reason.NO_STREAM, f"{source.path} has sent nothing")
        return self._views[source.path]
