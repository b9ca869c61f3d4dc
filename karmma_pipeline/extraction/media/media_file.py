"""Opens the media of clips, and reads frames and audio of a file by time, on a common clock.

The clock is a player's: zero where the first stream of the file starts. PyAV reads everything;
decord reads pictures where it is asked to and the file is one that it reads exactly.
T frames, S audio samples.
"""

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Self

import numpy as np

from karmma_pipeline import files
from karmma_pipeline.data.datasets.listing import missing
from karmma_pipeline.data.sensors import Sensor
from karmma_pipeline.data.sources import (
    BoxSource,
    FileSource,
    FrameSource,
    SensorSource,
    SoundArray,
    Source,
)
from karmma_pipeline.extraction.media.audio_track import SoundArrayReader, SoundTrack
from karmma_pipeline.extraction.media.container import MediaInfo, StreamInfo, read_info
from karmma_pipeline.extraction.media.image_frames import ImageFrames
from karmma_pipeline.extraction.media.interface import MediaFaultError, MediaReader, Sound
from karmma_pipeline.extraction.media.pyav_video import PyavVideo
from karmma_pipeline.extraction.media.sensor_series import SensorSeries, series_of
from karmma_pipeline.extraction.types import ROUNDING_S, Decoder, Numbers, Pictures, Times, covering
from karmma_pipeline.modalities import Reason

if TYPE_CHECKING:
    from karmma_pipeline.extraction.media.decord_video import DecordVideo

_BEGINS_ANEW = " (its timestamps restart there; join files with ffmpeg's concat, not with cat)"


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


# The media files of the last task, for tasks of one video follow one another, each with some of
# its clips: the memory of FFmpeg's tables of a file of hours, given back and asked for again by
# every task, would leave ever more holes.
_kept: dict[object, MediaFile] = {}


class OpenMedia:
    """The open sources of one task; a context manager that closes them.

    Args:
        decoder: that reads the pictures of media files.
        index_folder: where lists of tars are kept for other processes; None: nowhere.
        sound_kept_s: seconds of a track that are kept for clips farther back; None: an hour.
        keep: leave media files open for the next task of this process, which takes them over if
            it is of the same files, and closes them otherwise.
    """

    def __init__(
        self,
        decoder: Decoder = "pyav",
        index_folder: Path | None = None,
        sound_kept_s: float | None = None,
        *,
        keep: bool = False,
    ) -> None:
        self._decoder, self._index_folder = decoder, index_folder
        self._sound_kept_s = sound_kept_s
        self._keep, self._versions = keep, dict[object, object]()
        self._open: dict[object, MediaReader] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for key, reader in self._open.items():
            if self._keep and kind is None and isinstance(reader, MediaFile):
                _kept[self._versions[key]] = reader
            else:
                reader.close()

    def of(self, source: Source) -> MediaReader:
        """Return the reader of a source.

        Raises:
            MediaFaultError: there is nothing to read.
        """
        key = source_key(source)
        if key not in self._open:
            self._open[key] = self._opened(source)
        return self._open[key]

    def series(self, source: SensorSource, sensor: Sensor) -> SensorSeries:
        """Return the samples of a sensor's file.

        Raises:
            MediaFaultError: it cannot be read.
        """
        if not files.exists(source.path):
            raise MediaFaultError(Reason.FILE_MISSING, missing(source.path))
        return series_of(source.path, sensor)

    def _opened(self, source: Source) -> MediaReader:
        if not files.exists(source.path):
            raise MediaFaultError(Reason.FILE_MISSING, missing(source.path))
        match source:
            case FileSource():
                return self._file(source)
            case FrameSource():
                return ImageFrames(source, self._index_folder)
            case SoundArray():
                return SoundArrayReader(source)
        raise NotImplementedError(f"{type(source).__name__} cannot be read yet")

    def _file(self, source: FileSource) -> MediaFile:
        # A file may be replaced between two tasks.
        try:
            status = source.path.stat()
        except OSError as error:
            raise MediaFaultError(Reason.FILE_MISSING, f"{source.path}: {error.strerror}") from None
        settings = self._decoder, self._sound_kept_s
        version = source, *settings, status.st_size, status.st_mtime_ns
        self._versions[source_key(source)] = version
        # Taken out: a file that is open here is read by nobody else in this process.
        if self._keep and (kept := _kept.pop(version, None)) is not None:
            return kept
        for other in list(_kept) if self._keep else ():  # of another video, before there are more
            if (kept := _kept.pop(other, None)) is not None:
                kept.close()
        return MediaFile(
            source.path,
            source.stream,
            self._decoder,
            left_half=source.left_half,
            sound_kept_s=self._sound_kept_s,
        )


def source_key(source: Source) -> object:
    """Return what clips of one video have in common: their spans differ."""
    if isinstance(source, BoxSource):
        return source.path
    if isinstance(source, FrameSource):
        return (source.path, source.names, source.fps, source.base, source.stride, source.dilation)
    return source
