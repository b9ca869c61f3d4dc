"""A sensor's series on the clips' clock: values at whatever moments a clip is looked at.

Between samples the signal is the band-limited one: a windowed sinc (Kaiser) over the samples,
which for a lower rate also takes away what that rate cannot hold. One formula does both at any
phase, so that two series of different rates and offsets line up. Time stamps that stray from
an even grid are first brought onto one, by a cubic spline.

S samples, K moments, C channels.
"""

from functools import lru_cache
from pathlib import Path
from typing import Self

import numpy as np

from karmma_pipeline.data.sensors import UNITS, Sensor
from karmma_pipeline.extraction.media.interface import MediaFaultError
from karmma_pipeline.extraction.media.series_files import Values, read_series_file
from karmma_pipeline.extraction.types import Times
from karmma_pipeline.modalities import Reason

# Zero crossings of the sinc on each side, Kaiser's beta for 60 dB, and the share of the lower
# rate's Nyquist at which the filter is at half: it passes up to 0.77 and stops from 1 on. Sharper
# ones ring for longer than an action lasts.
_ZEROS, _BETA, _ROLLOFF = 16, 5.653, 0.88

#: How series are brought to a rate, as stores record it.
RESAMPLING = f"sinc of {_ZEROS} zero crossings, Kaiser {_BETA}, cut-off {_ROLLOFF} if lower"

# Periods by which time stamps may stray from a grid that is taken as even.
_EVEN = 0.01

# Moments that are worked out at once, which bounds the memory.
_AT_ONCE = 256


class SensorSeries:
    """The samples of a sensor: of a file, or of what a live one has sent so far.

    Args:
        path: where they come from.
        sensor: its settings.
        times: of the samples on the clips' clock, rising, seconds [S].
        values: [S, C]; rows with NaN count as missing.

    Attributes:
        start_s, stop_s: of the series on the clips' clock: the first sample, and a period after
            the last.
        rate_hz: its own rate.

    Raises:
        MediaFaultError: there are fewer than two samples.
    """

    def __init__(self, path: Path, sensor: Sensor, times: Times, values: Values) -> None:
        self.path, self._sensor, self._times = path, sensor, times
        if len(values) < 2:
            raise MediaFaultError(Reason.TOO_SHORT, f"{path}: {len(values)} samples")
        self.rate_hz = sensor.source_hz or 1 / float(np.median(np.diff(times)))
        self.start_s = float(times[0])
        self.stop_s = float(times[-1]) + 1 / self.rate_hz
        with np.errstate(over="ignore"):
            self._values = values.astype(np.float32)  # half the memory; sensors have 16 bits
        self._good = np.asarray(np.isfinite(self._values).all(axis=1))

    @classmethod
    def of_file(cls, path: Path, sensor: Sensor) -> Self:
        """Read a file.

        Raises:
            MediaFaultError: it cannot be read, has fewer than two samples, or its times do not
                rise.
        """
        values, stamps = read_series_file(path, sensor)
        return cls(path, sensor, _clock(path, sensor, len(values), stamps), values)

    def at(self, moments: Times) -> Values:
        """Return the signal at rising moments [K], as the sensor's ``rate_hz`` can hold it [K, C].

        Raises:
            MediaFaultError: a moment lies outside of the series or in a hole, by more than
                ``max_gap_s``; or the clock strays from the stated rate there.
        """
        times, values = self._part(moments)
        self._check_holes(times, moments)
        self._check_rate(times)
        first_s, rate, samples = _even(times, values, self.rate_hz)
        cutoff = _ROLLOFF * self._sensor.rate_hz / rate
        # A rate that is as high, but for the rounding of time stamps, loses nothing.
        cutoff = min(1.0, cutoff) if self._sensor.rate_hz < 0.999 * rate else 1.0
        places = (moments - first_s) * rate
        parts = np.split(places, range(_AT_ONCE, len(places), _AT_ONCE))
        return np.concatenate([_band_limited(samples, part, cutoff) for part in parts])

    def _part(self, moments: Times) -> tuple[Times, Values]:
        """Return the samples that moments depend on, without those that are NaN."""
        margin = reach_s(self._sensor, self.rate_hz)
        ends = np.array([moments[0] - margin, moments[-1] + margin])
        low, high = np.searchsorted(self._times, ends)
        good = self._good[low:high]
        return self._times[low:high][good], self._values[low:high][good].astype(np.float64)

    def _check_holes(self, times: Times, moments: Times) -> None:
        longest = max(self._sensor.max_gap_s, 1.5 / self.rate_hz)
        if (
            len(times) < 2
            or moments[0] < self._times[0] - longest
            or (moments[-1] > self._times[-1] + longest)
        ):
            holds = f"{self.path}: covers {self.start_s:.3f} to {self.stop_s:.3f} s"
            clip = f"{moments[0]:.3f} to {moments[-1]:.3f} s"
            inside = self._times[0] < moments[-1] and moments[0] < self._times[-1]
            if len(times) < 2 and inside:
                raise MediaFaultError(
                    Reason.GAP, f"{holds}, but has no samples in the clip, {clip}"
                )
            raise MediaFaultError(Reason.OUT_OF_RANGE, f"{holds}, but the clip spans {clip}")
        before = np.searchsorted(times, moments, side="right") - 1
        after = np.searchsorted(times, moments)
        # Before the first and after the last sample the hole reaches up to the moment itself.
        low = np.where(before >= 0, times[before], moments)
        high = np.where(after < len(times), times[np.minimum(after, len(times) - 1)], moments)
        n = int(np.argmax(high - low > longest))
        if high[n] - low[n] > longest:
            nan = np.any((self._times > low[n]) & (self._times < high[n]))
            what = "NaN" if nan else "no samples"
            detail = f"{self.path}: {what} from {low[n]:.3f} s to {high[n]:.3f} s"
            raise MediaFaultError(Reason.GAP, detail)

    def _check_rate(self, times: Times) -> None:
        stated = self._sensor.source_hz
        if self._sensor.time is None or stated is None:
            return
        rate = 1 / float(np.median(np.diff(times)))
        if abs(rate / stated - 1) > self._sensor.rate_tolerance:
            detail = f"timestamps from {times[0]:.3f} s on give {rate:.4g} Hz, not {stated:g}"
            raise MediaFaultError(Reason.BAD_CLOCK, f"{self.path}: {detail}")


def reach_s(sensor: Sensor, rate_hz: float) -> float:
    """Return how far from a moment samples lie that it depends on, seconds.

    Args:
        sensor: its settings.
        rate_hz: the series' own rate.
    """
    return (_ZEROS + 2) / min(rate_hz, sensor.rate_hz) + sensor.max_gap_s


def _clock(path: Path, sensor: Sensor, samples: int, stamps: Values | None) -> Times:
    if stamps is None:
        assert sensor.source_hz is not None  # noqa: S101  (the recipe has one of the two)
        return sensor.offset_s + np.arange(samples) / sensor.source_hz
    times = stamps * UNITS[sensor.unit]
    wrong = np.flatnonzero(~np.isfinite(times) | (np.diff(times, prepend=-np.inf) <= 0))
    if len(wrong) and samples > 1:
        n = int(wrong[0])
        before = times[n - 1] if n else times[0]
        detail = f"{path}: sample {n + 1}: timestamp {times[n]:.6g} s follows {before:.6g} s"
        raise MediaFaultError(Reason.BAD_CLOCK, detail)
    first_s = times[0] if sensor.from_first and samples else 0.0
    return times - first_s + sensor.offset_s


def _even(times: Times, values: Values, rate_hz: float) -> tuple[float, float, Values]:
    """Return samples on an even grid: its first moment, its rate, and they themselves."""
    first_s, length_s = float(times[0]), float(times[-1] - times[0])
    own_hz = (len(times) - 1) / length_s
    stray = np.abs(times - first_s - np.arange(len(times)) / own_hz).max() * own_hz
    if stray <= _EVEN:
        return first_s, own_hz, values
    from scipy.interpolate import CubicSpline  # half a second, for those who need it

    # Holes are bridged by lines: a spline would swing across them.
    knots = [times]
    for n in np.flatnonzero(np.diff(times) > 1.5 / rate_hz).tolist():
        count = round((times[n + 1] - times[n]) * rate_hz)
        knots.append(np.linspace(times[n], times[n + 1], count + 1)[1:-1])
    filled = np.sort(np.concatenate(knots))
    lines = np.stack([np.interp(filled, times, channel) for channel in values.T], axis=1)
    grid = first_s + np.arange(int(length_s * rate_hz + 1e-6) + 1) / rate_hz
    return first_s, rate_hz, CubicSpline(filled, lines)(grid)


def _band_limited(samples: Values, places: Times, cutoff: float) -> Values:
    """Return the signal between samples [K, C]; beyond their ends the last one stays.

    Args:
        samples: [S, C] at an even rate.
        places: of the moments, counted in samples from the first [K].
        cutoff: highest frequency that is kept, as a share of the samples' Nyquist frequency.
    """
    from scipy import special

    half = int(np.ceil(_ZEROS / cutoff))
    near = np.floor(places).astype(np.int64)[:, None] + np.arange(1 - half, half + 1)
    away = places[:, None] - near
    window = special.i0(_BETA * np.sqrt(np.maximum(0, 1 - (away / half) ** 2)))
    weights = np.sinc(cutoff * away) * window
    weights /= weights.sum(axis=1, keepdims=True)
    return np.einsum("kt,ktc->kc", weights, samples[np.clip(near, 0, len(samples) - 1)])


def series_of(path: Path, sensor: Sensor) -> SensorSeries:
    """Return a file's series; the last few are kept, for clips of one recording are neighbours.

    Raises:
        MediaFaultError: it cannot be read.
    """
    status = path.stat() if path.is_file() else None
    key = None if status is None else (status.st_size, status.st_mtime_ns)
    return _kept_series(path, sensor, key)


# One for each sensor of a recording. Size and time are part of the key: a file may be replaced.
@lru_cache(maxsize=4)
def _kept_series(path: Path, sensor: Sensor, _key: tuple[int, int] | None) -> SensorSeries:
    return SensorSeries.of_file(path, sensor)
