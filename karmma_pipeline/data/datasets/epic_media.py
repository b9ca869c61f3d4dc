"""Where EPIC-KITCHENS-100's videos, frames, flow and sound lie, in every layout in use.

- official downloader: ``P01/videos/P01_01.MP4``, ``P01/rgb_frames/P01_01.tar``,
  ``P01/flow_frames/P01_01.tar``
- EPIC-55's server: ``videos/train/P01/P01_01.MP4``, ``frames_rgb_flow/rgb/train/P01/P01_01.tar``
- unpacked: the same paths without ``.tar``, or ``P01/P01_01/``
- sound: in the MP4, or ``EPIC-KITCHENS-100_audio.hdf5``, 24 kHz mono, a data set per video

The rule where several exist: RGB from the MP4, then tar, then folder; flow from the released
frames, and only without them computed from RGB; sound from the MP4, then the HDF5 file.
"""

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Literal

import h5py
from pydantic import Field

from karmma_pipeline.config import Recipe
from karmma_pipeline.data.datasets.listing import (
    MISSING,
    PICTURE_SUFFIXES,
    VIDEO_SUFFIXES,
    Listing,
    SourceCounts,
)
from karmma_pipeline.data.sources import FileSource, FrameSource, SoundArray, Source
from karmma_pipeline.errors import ManifestError

AUDIO_ARRAY = "EPIC-KITCHENS-100_audio.hdf5"
AUDIO_ARRAY_RATE = 24_000
RGB_NAMES = ("frame_{:010d}.jpg",)
FLOW_NAMES = ("u/frame_{:010d}.jpg", "v/frame_{:010d}.jpg")

_PARTS = ("train", "test")
_LONGEST_FRAMES = 999_999_999


class Prefer(Recipe):
    """Which of several sources of a modality is used."""

    rgb: Literal["auto", "video", "frames"] = Field(
        "auto", description="auto: the MP4 if it exists, else the released frames."
    )
    flow: Literal["auto", "frames", "computed", "none"] = Field(
        "auto",
        description="auto: the released TV-L1 frames if they exist, else flow computed from RGB.",
    )
    audio: Literal["auto", "video", "array", "none"] = Field(
        "auto", description="auto: the audio track of the MP4, else the HDF5 file."
    )
    flow_root: Path | None = Field(None, description="Folder of the flow frames; null: `root`.")
    audio_array: Path | None = Field(
        None, description=f"HDF5 file of the 24 kHz tracks; null: {AUDIO_ARRAY} in `root`."
    )
    flow_bound_px: float = Field(
        8.0,
        gt=0,
        description="Flow in px encoded by bytes 0 and 255 of the released flow frames. 8 is "
        "the value in the extraction command of EPIC-100; that of EPIC-55 is not published.",
    )


def grid_fps(video_id: str) -> int:
    """Return the rate of a video's frame numbers: 60 Hz for EPIC-55's, 50 Hz for the extension."""
    return 60 if is_epic55(video_id) else 50


def is_epic55(video_id: str) -> bool:
    """Tell whether a video is of the first collection: its number has two digits."""
    return len(video_id.partition("_")[2]) == 2


class EpicMedia:
    """Finds the sources of videos, and counts what it found once per video."""

    def __init__(self, root: Path, prefer: Prefer) -> None:
        self.root, self.prefer = root, prefer
        for key in ("flow_root", "audio_array"):
            path = getattr(prefer, key)
            if path is not None and not path.exists():
                raise ManifestError(f"dataset.media.{key}={path}: does not exist.")
        self._listing, self._counts = Listing(), SourceCounts()
        self._places: dict[str, dict[str, Path | None]] = {}

    def lines(self) -> list[str]:
        """Return what was found, for people."""
        return self._counts.lines()

    def sources(
        self, participant: str, video: str, frames: tuple[int, int], end_s: float | None
    ) -> dict[str, Source]:
        """Return the source of each modality of a clip.

        Args:
            participant: such as ``P01``.
            video: such as ``P01_01``.
            frames: first and last frame number of the clip, as annotated.
            end_s: duration of the video; frames after it do not exist.
        """
        if video not in self._places:
            self._places[video] = self._find(participant, video)
        places, prefer = self._places[video], self.prefer
        media: dict[str, Source] = {}
        rgb = places["rgb"]
        if rgb is not None:
            media["rgb"] = _rgb(rgb, video, frames, end_s)
        if places["flow"] is not None:
            media["flow"] = _flow(places["flow"], video, frames, end_s, prefer.flow_bound_px)
        elif prefer.flow in {"auto", "computed"}:
            media["flow"] = media["rgb"]
        if places["audio"] is not None:
            media["audio"] = FileSource(places["audio"])
        elif places["array"] is not None:
            media["audio"] = SoundArray(places["array"], video, AUDIO_ARRAY_RATE)
        return media

    def _find(self, participant: str, video: str) -> dict[str, Path | None]:
        """Look for a video's files; what is wanted and not there is named by its usual path."""
        prefer, expected = self.prefer, f"{participant}/videos/{video}.MP4"
        mp4 = self._listing.video(self.root, _videos(participant, video))
        rgb = mp4 if prefer.rgb != "frames" else None
        if rgb is None and prefer.rgb != "video":
            rgb = self._frames(self.root, participant, video, "rgb")
        self._count("rgb", rgb, self.root / expected)
        flow = None
        if prefer.flow in {"auto", "frames"}:
            flow = self._frames(prefer.flow_root or self.root, participant, video, "flow")
        if flow is None and prefer.flow == "frames":
            flow = self.root / participant / "flow_frames" / f"{video}.tar"
            self._counts.add("flow", MISSING, flow)
        elif flow is not None:
            self._count("flow", flow, flow)
        elif prefer.flow != "none":
            self._counts.add("flow", "computed from rgb", rgb or self.root / expected)
        missing = self.root / (
            f"{participant}/rgb_frames/{video}.tar" if prefer.rgb == "frames" else expected
        )
        audio, array = self._sound(mp4, video, self.root / expected)
        return {"rgb": rgb or missing, "flow": flow, "audio": audio, "array": array}

    def _sound(
        self, mp4: Path | None, video: str, expected: Path
    ) -> tuple[Path | None, Path | None]:
        if self.prefer.audio == "none":
            return None, None
        if mp4 is not None and self.prefer.audio != "array":
            self._counts.add("audio", "in the video file", mp4)
            return mp4, None
        if self.prefer.audio != "video" and (video in self._tracks or self.prefer.audio == "array"):
            kind = "in the HDF5 file" if video in self._tracks else MISSING
            self._counts.add("audio", kind, self._array)
            return None, self._array
        self._counts.add("audio", MISSING, expected)
        return expected, None

    @property
    def _array(self) -> Path:
        return self.prefer.audio_array or self.root / AUDIO_ARRAY

    @cached_property
    def _tracks(self) -> frozenset[str]:
        if not self._array.is_file():
            return frozenset()
        try:
            with h5py.File(self._array, "r", locking=False) as file:
                return frozenset(file)
        except (OSError, RuntimeError) as error:
            raise ManifestError(
                f"{self._array}: truncated or not an HDF5 file ({error}); download it again or set "
                "dataset.media.audio to video."
            ) from None

    def _frames(self, root: Path, participant: str, video: str, kind: str) -> Path | None:
        """Return a tar or folder of frames; a folder only if the kind's pictures are in it."""
        for candidate in _frame_places(participant, video, kind):
            path = root / candidate
            is_folder = self._listing.names(path.parent).get(path.name)
            fits = is_folder is (path.suffix != ".tar")
            if fits and (not is_folder or self._has_pictures(path, kind)):
                return path
        return None

    def _has_pictures(self, folder: Path, kind: str) -> bool:
        """Tell whether pictures of a kind lie in a folder, or in one inside of it."""
        names = self._listing.names(folder)
        listed = [names, *(self._listing.names(folder / n) for n, deep in names.items() if deep)]
        if kind == "flow":
            return any("u" in some for some in listed)
        endings = {Path(name).suffix.lower() for some in listed for name in some}
        return bool(endings & PICTURE_SUFFIXES)

    def _count(self, modality: str, path: Path | None, expected: Path) -> None:
        hint = ""
        if path is None:
            kind, hint = MISSING, self._listing.beside(expected)
        elif path.suffix == ".tar":
            kind = "as frames in a tar"
        else:
            kind = "as video files" if path.suffix else "as frames in a folder"
        self._counts.add(modality, kind, path or expected, hint)


def _videos(participant: str, video: str) -> Iterator[str]:
    yield f"{participant}/videos/{video}"
    yield from (f"videos/{part}/{participant}/{video}" for part in _PARTS)
    yield f"videos/{participant}/{video}"
    yield f"{participant}/{video}"
    yield f"videos/{video}"
    yield video


def _frame_places(participant: str, video: str, kind: str) -> Iterator[str]:
    for suffix in (".tar", ""):
        yield f"{participant}/{kind}_frames/{video}{suffix}"
        yield from (f"frames_rgb_flow/{kind}/{p}/{participant}/{video}{suffix}" for p in _PARTS)
        yield from (f"{kind}/{p}/{participant}/{video}{suffix}" for p in _PARTS)
        yield f"{kind}/{participant}/{video}{suffix}"
        yield f"{participant}/{video}{suffix}"


def _rgb(path: Path, video: str, frames: tuple[int, int], end_s: float | None) -> Source:
    if path.suffix.lower() in VIDEO_SUFFIXES:
        return FileSource(path)
    fps = grid_fps(video)
    return FrameSource(path, RGB_NAMES, fps, span=_within(frames, _frame_count(end_s, fps)))


def _flow(
    path: Path, video: str, frames: tuple[int, int], end_s: float | None, bound_px: float
) -> FrameSource:
    """Return the released flow: EPIC-55's has every second frame, over a gap of three frames.

    A flow picture's number is ``(frame - 1) // stride + 1``, as the challenge's code has it.
    """
    fps = grid_fps(video)
    stride, dilation = (2, 3) if is_epic55(video) else (1, 1)
    first, last = ((number - 1) // stride + 1 for number in frames)
    count = (_frame_count(end_s, fps) - 1 - dilation) // stride + 1
    span = _within((first, last), count)
    return FrameSource(
        path, FLOW_NAMES, fps, span=span, stride=stride, dilation=dilation, bound_px=bound_px
    )


def _frame_count(end_s: float | None, fps: int) -> int:
    return _LONGEST_FRAMES if end_s is None else int(end_s * fps)


def _within(span: tuple[int, int], count: int) -> tuple[int, int]:
    """Cut a span of numbers from 1 on at the last that exists; one stays."""
    first = max(1, span[0])
    return first, max(first, min(span[1], count))
