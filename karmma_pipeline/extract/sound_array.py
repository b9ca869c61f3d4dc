"""A sound track kept in an HDF5 file, one dataset per video; S samples.

HDF5 can point into other files in four ways; all are refused.
"""

from functools import lru_cache
from typing import Any

import h5py
import numpy as np
import soxr

from karmma_pipeline.data.sources import SoundArray
from karmma_pipeline.extract.faults import MediaFaultError, first_line
from karmma_pipeline.extract.track import LONGEST_S, QUALITY, Sound, as_float, cut
from karmma_pipeline.modalities import Reason


class SoundFile:
    """One track; read by windows, or as a whole where it must be resampled."""

    audio_decoder = "h5py"

    def __init__(self, source: SoundArray) -> None:
        self.source, self.path = source, source.path

    @property
    def audio_rate(self) -> int:
        """The track's own rate, Hz."""
        return self.source.rate

    def sound_span(self, rate: int) -> tuple[float, float]:
        """Return where the track starts and ends, seconds."""
        return 0.0, self._read(None, None) / self.source.rate

    def sound(self, start_s: float, stop_s: float, rate: int) -> Sound:
        """Return mono sound float32 [S] at ``rate`` Hz; outside the track it is silence.

        Raises:
            MediaFaultError: no such file or dataset, or it is refused or damaged.
        """
        if rate != self.source.rate:
            status = self.path.stat() if self.path.is_file() else None
            key = None if status is None else (status.st_size, status.st_mtime_ns)
            return cut(_resampled(self.source, rate, key), start_s, stop_s - start_s, rate)
        first, count = round(start_s * rate), max(1, round((stop_s - start_s) * rate))
        window = np.zeros(count, np.float32)
        low, high = max(first, 0), max(first + count, 0)
        found = self._read(low, high)
        window[low - first : low - first + len(found)] = found
        return window

    def _read(self, low: int | None, high: int | None) -> Any:
        """Return samples ``low`` to ``high``, or without them the track's length."""
        source = self.source
        if not source.path.is_file():
            raise MediaFaultError(Reason.FILE_MISSING, str(source.path))
        try:
            with h5py.File(source.path, "r", locking=False) as file:
                track = _dataset(file, source)
                if high is None:
                    return len(track)
                return _samples(track[low:high])
        except (OSError, RuntimeError, KeyError, ValueError) as error:
            raise MediaFaultError(
                Reason.DECODE_ERROR, f"{source.path}: {first_line(error)}"
            ) from None

    def close(self) -> None:
        """Nothing is kept open."""


def _dataset(file: h5py.File, source: SoundArray) -> h5py.Dataset:
    where, at = f"{source.path}: {source.key!r}", file
    for part in source.key.strip("/").split("/"):
        link = at.get(part, getlink=True) if isinstance(at, h5py.Group) else None
        if link is None:
            raise MediaFaultError(Reason.NO_STREAM, f"{where}: not in the file")
        if not isinstance(link, h5py.HardLink):
            raise MediaFaultError(Reason.REFUSED, f"{where}: a link")
        at = at[part]
    if not isinstance(at, h5py.Dataset):
        raise MediaFaultError(Reason.NO_STREAM, f"{where}: a group")
    if at.external or at.is_virtual:
        raise MediaFaultError(Reason.REFUSED, f"{where}: kept in another file")
    if at.ndim != 1 or at.dtype.kind not in "iuf" or at.dtype.itemsize > 8:
        raise MediaFaultError(Reason.DECODE_ERROR, f"{where}: {at.shape} {at.dtype}, not samples")
    if len(at) > LONGEST_S * source.rate:
        raise MediaFaultError(Reason.REFUSED, f"{where}: {len(at)} samples")
    if at.chunks and at.chunks[0] * at.dtype.itemsize > 1 << 30:
        raise MediaFaultError(Reason.REFUSED, f"{where}: chunks of {at.chunks[0]} samples")
    return at


def _samples(samples: Any) -> Sound:
    found = as_float(samples)
    if not np.isfinite(found).all():
        raise ValueError("NaN or infinity in the samples")
    return found


@lru_cache(maxsize=1)
def _resampled(source: SoundArray, rate: int, _key: tuple[int, int] | None) -> Sound:
    track = SoundFile(source)._read(0, LONGEST_S * source.rate)
    return np.asarray(soxr.resample(track, source.rate, rate, quality=QUALITY), np.float32)
