"""The samples of a live sensor, such as an IMU: a buffer that any thread fills, read as a series.

Windows are cut out of it by the code that reads files, on the same resampling. S samples, C
channels.
"""

import sys
import threading
from bisect import bisect_left, bisect_right
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from karmma_pipeline.data.sensors import Sensor
from karmma_pipeline.errors import ConfigError
from karmma_pipeline.extraction.media.sensor_series import SensorSeries, reach_s
from karmma_pipeline.extraction.types import Times
from karmma_pipeline.recognition.sensors import oldest

# Seconds before a window's filters that are kept: the rate that decides on their length is
# estimated anew from what is there.
_SPARE_S = 1.0

# A sample stands for so many periods at most, as holes do that are always bridged.
_PERIODS = 1.5


class SamplesView:
    """The samples that concern one window, at least one.

    Args:
        name: of the sensor.
        sensor: its settings.
        times: rising, seconds [S].
        values: float64 [S, C].
    """

    def __init__(
        self, name: str, sensor: Sensor, times: Times, values: npt.NDArray[np.float64]
    ) -> None:
        self.path, self._sensor = Path(name), sensor
        self._times, self._values = times, values

    def series(self) -> SensorSeries:
        """Return them as those of a file.

        Raises:
            MediaFaultError: there is only one.
        """
        return SensorSeries(self.path, self._sensor, self._times, self._values)

    def covered_s(self, start_s: float, stop_s: float) -> float:
        """Return for how many seconds of a span there are samples, holes left out."""
        rate = _rate(self._sensor, self._times)
        if rate is None:
            return 0.0
        ends = np.minimum(np.append(self._times[1:], np.inf), self._times + _PERIODS / rate)
        parts = np.minimum(ends, stop_s) - np.maximum(self._times, start_s)
        return float(np.maximum(parts, 0.0).sum())

    def within(self, start_s: float, stop_s: float, limits: tuple[float, float]) -> bool:
        """Tell whether all values of a span lie between two numbers, or on them."""
        values = self._values[(self._times >= start_s) & (self._times < stop_s)]
        return bool(((values >= limits[0]) & (values <= limits[1])).all())


class Samples:
    """Samples of one sensor; `push` from any thread, in any order.

    Args:
        name: of the sensor: its modality.
        sensor: its settings, as in training.
        keep_s: seconds that are kept where nobody reads; half of it may lie ahead of who does.

    Attributes:
        ignored: samples that came too late, twice, from the future, or are no numbers.
        newest_s: time of the newest sample that a window has met; None before the first.
    """

    def __init__(self, name: str, sensor: Sensor, keep_s: float) -> None:
        self.name, self._sensor = name, sensor
        self._keep_s = keep_s + 2 * reach_s(sensor, sensor.source_hz or sensor.rate_hz)
        self._lock = threading.Lock()
        self.ignored = 0
        self.forget()

    def forget(self) -> None:
        """Begin anew."""
        with self._lock:
            self._times: list[float] = []
            self._rows: list[npt.NDArray[np.float64]] = []
            self._low_s, self._high_s = -np.inf, sys.float_info.max
            self.newest_s: float | None = None

    def push(self, time_s: Any, values: Any) -> None:
        """Take over a sample [C] of a moment, or samples [S, C] of S moments.

        Raises:
            ConfigError: they are no such numbers.
        """
        try:
            times, rows = np.asarray(time_s, np.float64), np.asarray(values, np.float64)
        except (TypeError, ValueError):
            raise ConfigError(f"push({self.name!r}, ...): expected numbers.") from None
        channels = self._sensor.channel_count
        if rows.shape != (*times.shape, channels) or times.ndim > 1:
            raise ConfigError(
                f"push({self.name!r}, ...): expected [{channels}] values for one time or [S, "
                f"{channels}] for S times; got {rows.shape} for {times.shape}."
            )
        good = np.isfinite(rows).all(axis=-1) & np.isfinite(times)
        with self._lock:
            for at_s, row, fine in zip(
                np.atleast_1d(times).tolist(), rows.reshape(-1, channels), good.ravel(), strict=True
            ):
                place = bisect_left(self._times, at_s) if fine else 0
                known = fine and place < len(self._times) and self._times[place] == at_s
                if not fine or known or not self._low_s <= at_s <= self._high_s:
                    self.ignored += 1
                    continue
                self._times.insert(place, at_s)
                self._rows.insert(place, row.copy())
            if self._times:
                self._drop_before(oldest(self._times[len(self._times) // 2], self._keep_s))

    def view(self, start_s: float, now_s: float) -> SamplesView | None:
        """Return what there is by now for a window, and forget what is older; None if nothing."""
        with self._lock:
            future = bisect_right(self._times, now_s)
            self.ignored += len(self._times) - future
            del self._times[future:], self._rows[future:]
            rate = _rate(self._sensor, np.array(self._times))
            reach = 0.0 if rate is None else reach_s(self._sensor, rate)
            # A clock gone astray must not push out what is good.
            self._low_s, self._high_s = start_s - reach - _SPARE_S, now_s + self._keep_s / 2
            self._drop_before(self._low_s)
            if not self._times:
                return None
            self.newest_s = self._times[-1]
            return SamplesView(self.name, self._sensor, np.array(self._times), np.stack(self._rows))

    def _drop_before(self, oldest_s: float) -> None:
        old = bisect_left(self._times, oldest_s)
        del self._times[:old], self._rows[:old]


def _rate(sensor: Sensor, times: Times) -> float | None:
    """Return a sensor's own rate, Hz; None while there are too few samples to tell."""
    if len(times) < 2:
        return None
    return sensor.source_hz or 1 / float(np.median(np.diff(times)))
