"""Sources: where the media of each modality of a clip are.

Reading is the extraction's business. All sources are hashable and picklable, so that clips travel
to decode processes.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class FileSource:
    """A video or sound file, addressed by time.

    stream: number of the stream in the file; None is the default one of its kind.
    left_half: its pictures show two views side by side; the left one is taken.
    """

    path: Path
    stream: int | None = None
    left_half: bool = False


@dataclass(frozen=True, slots=True)
class FrameSource:
    """Numbered pictures in a folder or inside a tar, addressed by number on a constant grid.

    Picture k is shown from ``(k - base) * stride / fps`` seconds on.

    names: one per plane, with the number to fill in: ``("frame_{:010d}.jpg",)`` for rgb,
        ``("u/frame_{:010d}.jpg", "v/frame_{:010d}.jpg")`` for flow.
    fps: rate of the grid, Hz.
    base: number of the first picture.
    span: first and last picture of the clip, both included, as the data set's annotation
        states them; None: from the clip's times.
    stride: grid steps from one picture to the next.
    dilation: grid steps between the two frames of a flow pair.
    bound_px: flow in px that bytes 0 and 255 stand for, at the pictures' own size.
    """

    path: Path
    names: tuple[str, ...]
    fps: float
    base: int = 1
    span: tuple[int, int] | None = None
    stride: int = 1
    dilation: int = 1
    bound_px: float = 20.0

    def start_s(self, number: Any) -> Any:
        """Return when a picture's interval starts, seconds; of an array of numbers, for each."""
        return (number - self.base) * self.stride / self.fps


@dataclass(frozen=True, slots=True)
class SoundArray:
    """A track in an HDF5 file: mono samples of a video, dataset ``key``, at ``rate`` Hz."""

    path: Path
    key: str
    rate: int


@dataclass(frozen=True, slots=True)
class BoxSource:
    """Object boxes per frame in a Something-Else annotation file (JSON), entry ``key``.

    span: first byte of the entry's list in the file, and a byte after its end but before the
        next entry's list, so that nobody has to read gigabytes for one clip.
    """

    path: Path
    key: str
    span: tuple[int, int] = (0, 0)


@dataclass(frozen=True, slots=True)
class SensorSource:
    """A series of a sensor's samples; what lies in it where, the recipe's ``sensors`` say."""

    path: Path


Source = FileSource | FrameSource | SoundArray | BoxSource | SensorSource
