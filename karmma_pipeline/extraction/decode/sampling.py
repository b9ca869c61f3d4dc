"""Which moments of a clip a network sees."""

import numpy as np
import numpy.typing as npt

from karmma_pipeline.extraction.recipe import Sampling

Times = npt.NDArray[np.float64]
Numbers = npt.NDArray[np.int64]

ROUNDING_S = 5e-4
"""A frame counts as shown from this much before its start: decord's times are float32, and an
annotation that names a frame's own start must get that frame."""

_ALONE_S = 0.04
"""How long the only frame of a video counts as shown if the file does not say."""

PAIRS = "frame at t and the other frame nearest to gap_s later, inside the clip; scaled to gap_s"
"""The rule of `partners` in words, as stores record it."""


def sample_times(settings: Sampling, start_s: float, stop_s: float, count: int) -> Times:
    """Return ``count`` moments of a clip in seconds [T], within its borders."""
    if settings.mode == "uniform":
        return start_s + (stop_s - start_s) * (np.arange(count) + 0.5) / count
    first = (start_s + stop_s) / 2 - (count - 1) / 2 / settings.fps
    if settings.short == "repeat_last":
        first = max(first, start_s)
    times = first + np.arange(count) / settings.fps
    return np.clip(times, start_s, np.nextafter(stop_s, start_s))


def covering(starts: Times, times: Times) -> Numbers:
    """Return the frame that is shown at each moment: the last one that starts by then.

    Args:
        starts: ascending start of each frame's interval, seconds [frames].
        times: seconds [T]; moments before the first or after the last frame get that frame.
    """
    found = np.searchsorted(starts, times, side="right") - 1
    return np.clip(found, 0, len(starts) - 1).astype(np.int64)


def end_of(starts: Times, last_s: float) -> float:
    """Return when the last frame ends: after its own duration, or the usual one if longer."""
    usual = float(np.median(np.diff(starts))) if len(starts) > 1 else _ALONE_S
    return float(starts[-1]) + max(last_s, usual)


def partners(starts: Times, first: Numbers, gap_s: float) -> tuple[Numbers, Numbers]:
    """Return pairs of different frames [T] as close to ``gap_s`` apart as the file has them.

    The second is the frame whose start is nearest to the first's + gap_s; where the file ends
    before it, the pair moves back.
    """
    wanted = starts[first] + gap_s
    after = np.clip(np.searchsorted(starts, wanted), 1, len(starts) - 1)
    nearest = np.where(wanted - starts[after - 1] < starts[after] - wanted, after - 1, after)
    second = np.minimum(np.maximum(nearest, first + 1), len(starts) - 1)
    return np.minimum(first, second - 1), second
