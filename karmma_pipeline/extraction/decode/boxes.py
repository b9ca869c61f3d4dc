"""Object boxes of a clip at its sampled moments, from Something-Else annotation files.

Format (https://github.com/joaanna/something_else): per video a list of frames at 12 Hz, each
``{"name": "2/0001.jpg", "labels": [{"box2d": {x1, y1, x2, y2}, "category": "pillow",
"standard_category": "0000" or "hand"}]}``, corners in px of the video at its published height
of 240 px. Its width follows from the shape of the clip's pictures, at whatever size they are.
"""

import json
import math
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import numpy.typing as npt

from karmma_pipeline.data.manifest import Clip
from karmma_pipeline.data.sources import BoxSource, FileSource, FrameSource, Source
from karmma_pipeline.extraction.decode.frame_selection import picture_span, sample_times
from karmma_pipeline.extraction.media.container import open_container
from karmma_pipeline.extraction.media.interface import MediaFaultError
from karmma_pipeline.extraction.recipe import Sampling
from karmma_pipeline.extraction.types import ROUNDING_S, Times, covering
from karmma_pipeline.modalities import Reason
from karmma_pipeline.models.backbones.front_end import BOX_NUMBERS, BOX_SLOTS

FPS = 12.0
HEIGHT = 240.0
FACTS = {"fps": FPS, "height_px": HEIGHT, "slots": BOX_SLOTS, "numbers": BOX_NUMBERS}
"""What stores record of the boxes."""

Boxes = npt.NDArray[np.float32]


@dataclass(frozen=True)
class _Box:
    track: str
    is_hand: bool
    corners: tuple[float, float, float, float]


def read_boxes(
    clip: Clip, source: BoxSource, sampling: Sampling, count: int
) -> tuple[Boxes, Times]:
    """Return the boxes at a clip's sampled moments.

    A moment has the boxes of the last annotated frame that starts by then. An object keeps its
    slot, from the first on, through the whole clip; hands fill the last slots, by their x1.

    Args:
        clip: the clip; its ``rgb`` tells the shape of the picture.
        source: where its boxes lie.
        sampling: which moments.
        count: how many, T.

    Returns:
        float32 [T, BOX_SLOTS, BOX_NUMBERS] of (x, y, width, height, hand, object, there) in
        0..1, and requested and real times, float64 [2, T].

    Raises:
        MediaFaultError: the annotation, or the shape of the picture, cannot be had.
    """
    starts, frames = _frames(source)
    stop = starts[-1] + 1 / FPS if clip.stop_s is None else clip.stop_s
    if clip.start_s >= starts[-1] + 1 / FPS:
        raise MediaFaultError(
            Reason.OUT_OF_RANGE, f"{source.path}: {source.key}: ends before the clip starts"
        )
    times = sample_times(sampling, *picture_span(clip, clip.start_s, stop, sampling, count), count)
    numbers = covering(starts, times + ROUNDING_S)
    if "rgb" not in clip.media:
        raise MediaFaultError(Reason.NOT_IN_DATASET, "boxes need the frame size of rgb")
    size = HEIGHT * _aspect(clip.media["rgb"]), HEIGHT
    tracks = {box.track for frame in frames for box in frame if not box.is_hand}
    slots = {track: slot for slot, track in enumerate(sorted(tracks))}
    boxes = np.stack([_slotted(frames[n], slots, size) for n in numbers.tolist()])
    return boxes, np.stack([times, starts[numbers]])


def _slotted(frame: Iterable[_Box], slots: dict[str, int], size: tuple[float, float]) -> Boxes:
    table = np.zeros((BOX_SLOTS, BOX_NUMBERS), np.float32)
    free = set(range(BOX_SLOTS))
    for box in sorted(frame, key=lambda box: (box.is_hand, box.corners[0])):
        if not free:
            break
        # A slot may be taken where a track has more boxes in a frame than one, or where there are
        # more tracks than slots: the box then gets the first that is free.
        wanted = max(free) if box.is_hand else slots[box.track]
        slot = wanted if wanted in free else min(free)
        free.remove(slot)
        corners = np.clip(np.array(box.corners) / (size * 2), 0, 1)
        low, high = corners[:2], corners[2:]
        table[slot, :2], table[slot, 2:4] = (low + high) / 2, high - low
        table[slot, 4:] = (box.is_hand, not box.is_hand, 1)
    return table


def _frames(source: BoxSource) -> tuple[Times, list[list[_Box]]]:
    """Return the start of each annotated frame, ascending, and its boxes."""
    where = f"{source.path}: video {source.key}"
    try:
        with source.path.open("rb") as file:
            file.seek(source.span[0])
            text = file.read(source.span[1] - source.span[0]).decode()
        entries = json.JSONDecoder().raw_decode(text.lstrip())[0]
        frames = _numbered(entries)
    except FileNotFoundError:
        raise MediaFaultError(Reason.FILE_MISSING, str(source.path)) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise MediaFaultError(Reason.DECODE_ERROR, f"{where}: {error}") from None
    if not frames:
        raise MediaFaultError(Reason.TOO_SHORT, f"{where}: no frames")
    starts = np.array([(number - 1) / FPS for number, _ in frames])
    return starts, [boxes for _, boxes in frames]


def _numbered(entries: Any) -> list[tuple[int, list[_Box]]]:
    """Return frame number and boxes of each entry; the number is that of the frame's name."""
    numbered = {}
    for place, entry in enumerate(entries, 1):
        stem = Path(str(entry.get("name", ""))).stem
        number = int(stem) if stem.isascii() and stem.isdigit() and len(stem) < 8 else place
        boxes = (_box(label) for label in entry["labels"])
        numbered[max(1, number)] = [box for box in boxes if box is not None]
    return sorted(numbered.items())


def _box(label: Any) -> _Box | None:
    """Return a box, or None for one without area."""
    corners = [float(label["box2d"][corner]) for corner in ("x1", "y1", "x2", "y2")]
    if not all(map(math.isfinite, corners)):
        raise ValueError(f"box2d={label['box2d']}: not finite")
    x1, y1, x2, y2 = corners
    if x2 <= x1 or y2 <= y1:
        return None
    track = str(label.get("standard_category", label["category"]))
    return _Box(track, "hand" in track.lower(), (x1, y1, x2, y2))


@lru_cache(maxsize=16)  # a clip's networks follow one another
def _aspect(source: Source) -> float:
    """Return width by height of a clip's pictures, square pixels."""
    if isinstance(source, FrameSource):
        height, width = _first_picture(source).shape[:2]
        return width / height
    if not isinstance(source, FileSource):
        raise MediaFaultError(Reason.NO_STREAM, "rgb has no frames")
    try:
        with open_container(source.path) as container:
            video = container.streams.best("video")
            if not isinstance(video, av.VideoStream) or not (video.width and video.height):
                raise MediaFaultError(Reason.NO_STREAM, f"{source.path}: no video stream")
            return video.width / video.height * float(video.sample_aspect_ratio or 1)
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise MediaFaultError(Reason.DECODE_ERROR, f"{source.path}: {error}") from None


def _first_picture(source: FrameSource) -> npt.NDArray[Any]:
    try:
        if source.path.suffix == ".tar":
            with tarfile.open(source.path, "r:") as tar:
                member = next(m for m in tar if m.isfile())
                file = tar.extractfile(member)
                data = b"" if file is None else file.read()
        else:
            data = (source.path / source.names[0].format(source.base)).read_bytes()
        picture = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    except FileNotFoundError as error:
        raise MediaFaultError(Reason.FILE_MISSING, str(error.filename)) from None
    except (OSError, tarfile.TarError, StopIteration, cv2.error) as error:
        raise MediaFaultError(Reason.DECODE_ERROR, f"{source.path}: {error}") from None
    if picture is None:
        raise MediaFaultError(Reason.DECODE_ERROR, f"{source.path}: no frames")
    return picture
