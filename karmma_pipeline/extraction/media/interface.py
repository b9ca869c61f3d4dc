"""What a reader of media promises to the rest of the extraction, and the fault that it raises.

T moments, S audio samples, H and W a picture's size.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from karmma_pipeline.extraction.types import Numbers, Pictures, Times
from karmma_pipeline.modalities import Reason

Sound = npt.NDArray[np.float32]


class MediaFaultError(Exception):
    """A stream cannot be had.

    Attributes:
        reason: goes into the store.
        detail: goes into failures.csv; a file's path and what the decoder said, for people.
    """

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason.label}: {detail}")
        self.reason, self.detail = reason, detail

    @property
    def hint(self) -> str:
        """What a user can do about it, in one sentence."""
        return self.reason.hint_for(self.detail)


def first_line(error: BaseException) -> str:
    """Return what a decoder's error says first; the rest is its stack."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


class MediaReader:
    """A source of pictures, of sound, or of both, on one clock in seconds.

    A reader overrides what its source holds. All else raises `MediaFaultError` with NO_STREAM:
    whoever asks need not know what kind of source it is.

    Attributes:
        path: the file or folder.
        audio_decoder: what reads its sound.
        stores_flow: its pictures are optical flow, see `motion`.
        beyond: what lies behind the end of its pictures, for people.
    """

    path: Path
    audio_decoder: str = ""
    stores_flow: bool = False
    beyond: str = ""

    def _lacks(self, what: str) -> MediaFaultError:
        return MediaFaultError(Reason.NO_STREAM, f"{self.path}: contains no {what}")

    @property
    def video_decoder(self) -> str:
        """What reads its pictures."""
        raise self._lacks("video")

    @property
    def frame_starts(self) -> Times:
        """Start of every frame's interval, seconds, ascending [frames]."""
        raise self._lacks("video")

    @property
    def stop_s(self) -> float:
        """End of the last frame, seconds."""
        raise self._lacks("video")

    def numbers(self, times: Times) -> Numbers:
        """Return which frame is shown at each moment, [T]."""
        raise self._lacks("video")

    def decode(self, numbers: Numbers) -> Iterator[tuple[int, Pictures]]:
        """Yield frames by number in ascending order, each once: uint8 [H, W, 3], RGB.

        Raises:
            MediaFaultError: one of them cannot be decoded.
        """
        raise self._lacks("video")

    def decode_for_several(self, numbers: Numbers) -> Iterator[tuple[int, Pictures]]:
        """Yield frames as `decode` does, in one go through the file for several clips.

        Raises:
            MediaFaultError: one of them cannot be decoded, which may be one clip's fault alone.
        """
        return self.decode(numbers)

    def span(self, first: int, last: int) -> tuple[float, float]:
        """Return the seconds that numbered pictures ``first`` to ``last``, both included, take."""
        raise self._lacks("numbered images")

    def motion(self, numbers: Numbers) -> npt.NDArray[np.float32]:
        """Return flow that is stored as pictures, float32 [T, 2, H, W]: px per pair of frames.

        Raises:
            MediaFaultError: a picture is damaged.
        """
        raise self._lacks("flow images")

    @property
    def gap_s(self) -> float:
        """Seconds between the two frames of a stored picture of flow."""
        raise self._lacks("flow images")

    @property
    def audio_rate(self) -> int | None:
        """The track's own rate, Hz; None if the file does not say."""
        raise self._lacks("audio")

    def sound_span(self, rate: int) -> tuple[float, float]:
        """Return where the track starts and ends, seconds."""
        raise self._lacks("audio")

    def sound(self, start_s: float, stop_s: float, rate: int) -> Sound:
        """Return mono sound, float32 [S] at ``rate`` Hz; outside the track it is silence.

        Raises:
            MediaFaultError: it cannot be decoded there.
        """
        raise self._lacks("audio")

    def close(self) -> None:
        """Let go of the source."""
