"""Opens the sources of clips, each once per task, or once for the tasks of one video."""

from pathlib import Path
from types import TracebackType
from typing import Self

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
from karmma_pipeline.extraction.media.audio_track import SoundArrayReader
from karmma_pipeline.extraction.media.image_frames import ImageFrames
from karmma_pipeline.extraction.media.interface import MediaFaultError, MediaReader
from karmma_pipeline.extraction.media.media_file import MediaFile
from karmma_pipeline.extraction.media.sensor_series import SensorSeries, series_of
from karmma_pipeline.extraction.types import Decoder
from karmma_pipeline.modalities import Reason

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
