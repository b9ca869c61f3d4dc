"""decord, the decoder that is tried first: it hangs, crashes and gives up on some files.

It counts frames in the order of their times, each stream from its own start.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch  # noqa: F401  (before decord, which crashes some CUDA builds otherwise)

import decord  # isort: skip

from karmma_pipeline.extraction.media.container import StreamInfo
from karmma_pipeline.extraction.media.interface import MediaFaultError, first_line
from karmma_pipeline.extraction.types import Numbers, Times, end_of
from karmma_pipeline.modalities import Reason

# Full-size frames in memory at a time: a 4K frame takes 25 MB.
_MAX_BATCH = 16

# Share of frames that decord may replace silently by their neighbours: none.
_NO_REPEATS = 1e-9

_LONGEST_S = 1e6
_ERRORS = (decord.DECORDError, decord.DECORDLimitReachedError, RuntimeError, IndexError)

decord.logging.set_level(decord.logging.QUIET)  # faults are reported as reasons


class DecordVideo:
    """The default video stream of a file.

    Args:
        path: the file.
        info: of the stream.
        left_half: of each picture, give the left half.

    Attributes:
        starts: start of every frame, seconds on the file's clock [frames].
        stop_s: end of the last frame.

    Raises:
        MediaFaultError: decord cannot read it, or gives no sound time stamps.
    """

    decoder = "decord"

    def __init__(self, path: Path, info: StreamInfo, left_half: bool = False) -> None:
        self._parts = 2 if left_half else 1
        # One thread: the pool has a process per CPU, and decord's threads would not stop on a
        # fault. `fault_tol` counts frames that it replaces by a neighbour, by default silently.
        try:
            self._reader = decord.VideoReader(
                str(path.absolute()), ctx=decord.cpu(), num_threads=1, fault_tol=_NO_REPEATS
            )
            spans = self._reader.get_frame_timestamp(range(len(self._reader))).astype(np.float64)
        except _ERRORS as error:
            raise MediaFaultError(Reason.DECODE_ERROR, f"{path}: {first_line(error)}") from None
        if not len(spans) or not (np.abs(spans) < _LONGEST_S).all():
            raise MediaFaultError(Reason.DECODE_ERROR, f"{path}: no frame, or no time stamps")
        # decord gives an interval per frame, in float32 and from the stream's own start. Rounding
        # may turn two neighbours around, which a search by time must not meet.
        self.starts: Times = np.maximum.accumulate(spans[:, 0]) + info.delay_s
        self.stop_s = end_of(self.starts, float(spans[-1, 1] - spans[-1, 0]))

    def decode(self, numbers: Numbers) -> Iterator[tuple[int, npt.NDArray[np.uint8]]]:
        """Yield frames by ascending number, uint8 [H, W, 3] in RGB, turned as their file says.

        What a clip gets does not depend on what was read before it.

        Raises:
            MediaFaultError: they cannot be decoded; the reader is of no more use.
        """
        try:
            # From the start each time: a reader left in the middle of a video gives other pictures
            # after some seeks than a fresh one.
            self._reader.seek(0)
            for first in range(0, len(numbers), _MAX_BATCH):
                batch = numbers[first : first + _MAX_BATCH]
                pictures = self._reader.get_batch(batch).asnumpy()
                pictures = pictures[:, :, : pictures.shape[2] // self._parts]
                yield from zip(batch.tolist(), pictures, strict=True)
            # A reader that idles in the middle would go on to fill its queue of decoded frames.
            self._reader.seek(0)
        except _ERRORS as error:
            raise MediaFaultError(Reason.DECODE_ERROR, first_line(error)) from None

    def close(self) -> None:
        """Let go of the file."""
        del self._reader
