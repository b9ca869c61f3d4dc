"""Which moments of a clip a network sees."""

import numpy as np
import numpy.typing as npt

from karmma_pipeline.extract.recipe import Sampling

Times = npt.NDArray[np.float64]


def sample_times(settings: Sampling, start_s: float, stop_s: float, count: int) -> Times:
    """Return ``count`` moments of a clip in seconds [T], within its borders."""
    centre = (np.arange(count) + 0.5) / count
    if settings.mode == "uniform":
        return start_s + (stop_s - start_s) * centre
    middle = (start_s + stop_s) / 2
    offsets = (np.arange(count) - (count - 1) / 2) / settings.fps
    return np.clip(middle + offsets, start_s, np.nextafter(stop_s, start_s))


def covering(starts: Times, times: Times) -> npt.NDArray[np.int64]:
    """Return the frame that is shown at each moment: the last one that starts by then.

    Args:
        starts: ascending start of each frame's interval, seconds [frames].
        times: seconds [T]; moments before the first or after the last frame get that frame.
    """
    found = np.searchsorted(starts, times, side="right") - 1
    return np.clip(found, 0, len(starts) - 1).astype(np.int64)
