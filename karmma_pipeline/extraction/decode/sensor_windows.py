"""The windows of a clip's sensor series, from its start to its stop.

N windows, W samples of each, C channels.
"""

import numpy as np
import numpy.typing as npt

from karmma_pipeline.data.sensors import Sensor
from karmma_pipeline.extraction.media.interface import MediaFaultError
from karmma_pipeline.extraction.media.sensor_series import SensorSeries
from karmma_pipeline.extraction.types import Times
from karmma_pipeline.modalities import Reason
from karmma_pipeline.views import View

Windows = npt.NDArray[np.float32]

# Seconds that rounding may take from a clip.
_ROUNDING_S = 1e-6


def read_windows(
    series: SensorSeries,
    sensor: Sensor,
    start_s: float,
    stop_s: float | None,
    view: View | None = None,
) -> tuple[Windows, Times]:
    """Return the windows of a span of a series, or of a view of it; without a stop, up to its end.

    A view is as long as the windows need, where that is more than its part of the span.

    Returns:
        float32 [N, W, C], and the centres of the windows, requested and real, float64 [2, N].

    Raises:
        MediaFaultError: the series cannot be read for that span.
    """
    stop_s = series.stop_s if stop_s is None else stop_s
    if start_s >= stop_s:
        detail = f"{series.path}: ends at {stop_s:.3f} s, but the clip starts at {start_s:.3f} s"
        raise MediaFaultError(Reason.OUT_OF_RANGE, detail)
    if view is not None:
        length = max((stop_s - start_s) / view.windows, _samples(sensor) / sensor.rate_hz)
        start_s, stop_s = view.span(start_s, stop_s, length)
    starts = window_starts(sensor, start_s, stop_s)
    moments = starts[:, None] + np.arange(sensor.window) / sensor.rate_hz
    # Where a short clip is filled up, the moment of its last sample repeats.
    moments = np.minimum(moments, max(start_s, stop_s - 1 / sensor.rate_hz))
    rising, places = np.unique(moments, return_inverse=True)
    values = series.at(rising)[places.ravel()].astype(np.float32)
    if sensor.centre:
        points = values.reshape(len(values), -1, len(sensor.centre))
        values = (points - values[:, None, list(sensor.centre)]).reshape(values.shape)
    centres = starts + (sensor.window - 1) / 2 / sensor.rate_hz
    return values.reshape(sensor.shape), np.stack([centres, centres])


def _samples(sensor: Sensor) -> int:
    """Return how many samples all windows take together, or each if they have no hop."""
    if sensor.hop is None:
        return sensor.window
    return (sensor.windows - 1) * sensor.hop + sensor.window


def window_starts(sensor: Sensor, start_s: float, stop_s: float) -> Times:
    """Return when the windows of a span start, seconds [N].

    Raises:
        MediaFaultError: the span is too short, and is not to be filled up.
    """
    count, hop, samples = sensor.windows, sensor.hop, _samples(sensor)
    room_s = stop_s - start_s - samples / sensor.rate_hz
    if room_s < -_ROUNDING_S and sensor.short == "absent":
        needed = f"{samples} samples at {sensor.rate_hz:g} Hz span {samples / sensor.rate_hz:.3f} s"
        detail = f"the clip spans {start_s:.3f} to {stop_s:.3f} s, but {needed}"
        raise MediaFaultError(Reason.TOO_SHORT, detail)
    room_s = max(0.0, room_s)
    if hop is None:
        shares = np.arange(count) / (count - 1) if count > 1 else np.array([0.5])
        return start_s + room_s * shares
    return start_s + room_s / 2 + np.arange(count) * hop / sensor.rate_hz
