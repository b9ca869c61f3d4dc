"""Opens the sources of clips: each once per task, whatever clips and modalities need it."""

from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from karmma_pipeline.data.sources import FileSource, FrameSource, SoundArray, Source
from karmma_pipeline.extraction.media.audio_track import Sound, SoundFile
from karmma_pipeline.extraction.media.errors import MediaFaultError
from karmma_pipeline.extraction.media.image_frames import FrameFiles
from karmma_pipeline.extraction.media.media_file import Decoder, MediaFile
from karmma_pipeline.modalities import Reason

Reader = MediaFile | FrameFiles | SoundFile
Video = MediaFile | FrameFiles


class SoundReader(Protocol):
    """What has sound: a `MediaFile` or a `SoundFile`."""

    path: Path
    audio_decoder: str

    @property
    def audio_rate(self) -> int | None:
        """The track's own rate, Hz."""

    def sound_span(self, rate: int) -> tuple[float, float]:
        """Return where it starts and ends, seconds."""

    def sound(self, start_s: float, stop_s: float, rate: int) -> Sound:
        """Return a window, float32 [S]."""


class Readers:
    """The open sources of one task; a context manager that closes them.

    Args:
        decoder: the one that media files try first.
        index_folder: where lists of tars are kept for other processes; None: nowhere.
    """

    def __init__(self, decoder: Decoder = "decord", index_folder: Path | None = None) -> None:
        self._decoder, self._index_folder = decoder, index_folder
        self._open: dict[object, Reader] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for reader in self._open.values():
            reader.close()

    def of(self, source: Source) -> Reader:
        """Return the reader of a source.

        Raises:
            MediaFaultError: there is nothing to read.
        """
        key = _key(source)
        if key not in self._open:
            self._open[key] = self._opened(source)
        return self._open[key]

    def _opened(self, source: Source) -> Reader:
        match source:
            case FileSource():
                return MediaFile(
                    source.path, source.stream, self._decoder, left_half=source.left_half
                )
            case FrameSource():
                return FrameFiles(source, self._index_folder)
            case SoundArray():
                return SoundFile(source)
        raise NotImplementedError(f"{type(source).__name__} cannot be read yet")


def _key(source: Source) -> object:
    """Return what clips of one video have in common: their spans differ."""
    if isinstance(source, FrameSource):
        return (source.path, source.names, source.fps, source.base, source.stride, source.dilation)
    return source


def video_reader(reader: Reader) -> Video:
    """Return a reader that has pictures.

    Raises:
        MediaFaultError: it has none.
    """
    if isinstance(reader, SoundFile):
        raise MediaFaultError(Reason.NO_STREAM, f"{reader.path}: holds sound only")
    return reader


def sound_reader(reader: Reader) -> SoundReader:
    """Return a reader that has sound.

    Raises:
        MediaFaultError: it has none.
    """
    if isinstance(reader, FrameFiles):
        raise MediaFaultError(Reason.NO_STREAM, f"{reader.path}: holds pictures only")
    return reader
