"""Reads frames and audio of a media file by time, on a common clock.

The clock is a player's: zero where the first stream of the file starts. PyAV reads everything;
decord reads pictures where it is asked to and the file is one that it reads exactly.
T frames, S audio samples.
"""

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from karmma_pipeline.extraction.media.audio_track import SoundTrack
from karmma_pipeline.extraction.media.container import MediaInfo, StreamInfo, read_info
from karmma_pipeline.extraction.media.interface import MediaFaultError, MediaReader, Sound
from karmma_pipeline.extraction.media.pyav_video import PyavVideo
from karmma_pipeline.extraction.types import ROUNDING_S, Decoder, Numbers, Pictures, Times, covering
from karmma_pipeline.modalities import Reason

_BEGINS_ANEW = " (its timestamps restart there; join files with ffmpeg's concat, not with cat)"

if TYPE_CHECKING:
    from karmma_pipeline.extraction.media.decord_video import DecordVideo


class MediaFile(MediaReader):
    """One file, opened lazily, decoded forward.

    Args:
        path: the file.
        stream: number of the stream to read, the only one then; None: the default one of each
            kind.
        decoder: that reads the pictures.
        left_half: of side-by-side pictures, give the left one.
    """

    def __init__(
        self,
        path: Path,
        stream: int | None = None,
        decoder: Decoder = "pyav",
        *,
        left_half: bool = False,
        sound_kept_s: float | None = None,
    ) -> None:
        self.path, self._stream, self._decoder = path, stream, decoder
        self._left_half, self._sound_kept_s = left_half, sound_kept_s
        self._tracks: dict[int, SoundTrack] = {}  # at each rate that networks want

    @cached_property
    def _info(self) -> MediaInfo:
        return read_info(self.path, self._stream)

    def _stream_info(self, kind: Literal["video", "audio"]) -> StreamInfo:
        if kind not in self._info.streams:
            raise MediaFaultError(Reason.NO_STREAM, f"{self.path}: no {kind} stream")
        return self._info.streams[kind]

    @cached_property
    def _video(self) -> "DecordVideo | PyavVideo":
        info = self._stream_info("video")
        if self._decoder == "decord":
            # It needs torch, which takes seconds to load.
            from karmma_pipeline.extraction.media.decord_video import DecordVideo

            return DecordVideo(self.path, info, self._left_half)
        video = PyavVideo(self.path, info, self._left_half)
        self.beyond = _BEGINS_ANEW if video.index.begins_anew else ""
        return video

    @property
    def video_decoder(self) -> str:
        """Which decoder reads the pictures."""
        return self._video.decoder

    @property
    def stop_s(self) -> float:
        """End of the last frame, seconds."""
        return self._video.stop_s

    @property
    def frame_starts(self) -> Times:
        """Start of every frame, seconds [frames]."""
        return self._video.starts

    audio_decoder = "pyav"

    @property
    def audio_rate(self) -> int | None:
        """The track's own rate, Hz; None if the file does not say."""
        audio = self._info.streams.get("audio")
        return None if audio is None else audio.rate

    def numbers(self, times: Times) -> Numbers:
        """Return which frame is shown at each moment, [T]."""
        # An annotation that names a frame's own start must get that frame, and not the one before
        # it for a rounding error.
        return covering(self.frame_starts, times + ROUNDING_S)

    def decode(self, numbers: Numbers) -> Iterator[tuple[int, Pictures]]:
        """Yield frames by number in ascending order, each once: uint8 [H, W, 3], RGB.

        Raises:
            MediaFaultError: one of them cannot be decoded; the file is as good as new.
        """
        try:
            yield from self._video.decode(np.unique(numbers))
        except MediaFaultError:
            self._close_video()
            raise

    def frames(self, times: Times) -> tuple[Pictures, Times]:
        """Return the frames shown at the given moments and the moments at which they start.

        Args:
            times: seconds [T].

        Returns:
            uint8 [T, H, W, 3] in RGB, and seconds [T].

        Raises:
            MediaFaultError: no such stream, or it cannot be decoded.
        """
        wanted, starts = self.numbers(times), self.frame_starts
        decoded = dict(self.decode(wanted))
        return np.stack([decoded[n] for n in wanted.tolist()]), starts[wanted]

    def sound_span(self, rate: int) -> tuple[float, float]:
        """Return where the audio track starts and ends, seconds."""
        start = self._stream_info("audio").delay_s
        return start, start + self._track(rate).length_s

    def sound(self, start_s: float, stop_s: float, rate: int) -> Sound:
        """Return mono sound float32 [S] at ``rate`` Hz; outside the track it is silence.

        Raises:
            MediaFaultError: no such stream, or it cannot be decoded there.
        """
        delay = self._stream_info("audio").delay_s
        return self._track(rate).window(start_s - delay, stop_s - start_s)

    def _track(self, rate: int) -> SoundTrack:
        if rate not in self._tracks:
            info = self._stream_info("audio")
            self._tracks[rate] = SoundTrack(self.path, info, rate, self._sound_kept_s)
        return self._tracks[rate]

    def close(self) -> None:
        """Let go of the file."""
        self._close_video()
        self._tracks.clear()

    def _close_video(self) -> None:
        video = self.__dict__.pop("_video", None)
        if video is not None:
            video.close()
