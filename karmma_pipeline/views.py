"""Views of a clip: temporal windows and spatial crops, each extracted separately.

Views are rows of a store: those of a clip follow one another, window by window and in each crop by
crop, and a row is called ``CLIP.v0``, ``CLIP.v1``, ... A store without views has a row per clip.

N clips, V views of each.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from karmma_pipeline.config import Recipe

_MARK = ".v"

Ids = npt.NDArray[np.bytes_]
Numbers = npt.NDArray[np.int64]
#: The end of the longer side of pictures at which they are cropped; None: the middle.
Side = Literal[0, 1] | None


@dataclass(frozen=True, slots=True)
class View:
    """Which view of its clip a row is: ``window`` of ``windows`` and ``crop`` of ``crops``."""

    window: int
    windows: int
    crop: int
    crops: int

    def span(
        self, start_s: float, stop_s: float, length_s: float | None = None
    ) -> tuple[float, float]:
        """Return the window as a span of its clip.

        Windows are spread evenly: the first begins with the clip and the last ends with it, as in
        the test protocol of SlowFast (arXiv 1812.03982).

        Args:
            start_s: of the clip.
            stop_s: of the clip.
            length_s: of a window; None: that of equal parts, which do not overlap. What is longer
                than the clip is the whole clip.
        """
        room = stop_s - start_s
        length = room / self.windows if length_s is None else length_s
        if self.windows == 1 or length >= room:
            return start_s, stop_s
        first = start_s + (room - length) * self.window / (self.windows - 1)
        return first, min(first + length, stop_s)

    @property
    def side(self) -> Side:
        """Where the pictures are cropped."""
        if self.crops == 1 or self.crop == 1:
            return None
        return 1 if self.crop else 0


class Views(Recipe):
    """How many views a clip has."""

    clips: int = Field(
        1,
        gt=0,
        le=100,
        description="Temporal windows, evenly spaced in the clip. With sampling.mode uniform: "
        "equal segments; with fps: T frames at that rate, possibly overlapping.",
    )
    crops: Literal[1, 3] = Field(
        1, description="Spatial crops: 1 is the centre, 3 adds both ends of the longer side."
    )

    @property
    def count(self) -> int:
        """Views V of a clip."""
        return self.clips * self.crops

    @property
    def middle(self) -> int:
        """The view that stands for a clip where one must: the middle window and crop."""
        return self.clips // 2 * self.crops + self.crops // 2

    def every(self) -> list[View]:
        """Return the views in the order of a clip's rows."""
        sizes = self.clips, self.crops
        return [View(w, sizes[0], c, sizes[1]) for w in range(sizes[0]) for c in range(sizes[1])]

    def names(self, clip_id: str) -> list[str]:
        """Return the ids of a clip's rows."""
        return [f"{clip_id}{_MARK}{view}" for view in range(self.count)]


def frame_windows(stored: int, taken: int) -> Numbers:
    """Return the numbers of the frames that each window of a view's stored frames takes, [W, T].

    Windows are as long as they can be, their frames evenly spaced, and each begins a frame later
    than the one before. Of three times as many frames at the centres of equal parts the middle
    window has those of ``taken`` parts.

    Args:
        stored: frames of a view.
        taken: T frames, not more.
    """
    stride = stored // taken
    first = np.arange(stored - stride * (taken - 1), dtype=np.int64)
    return first[:, None] + stride * np.arange(taken, dtype=np.int64)


def middle_frames(stored: int, taken: int) -> slice:
    """Return the frames of the window that is taken where none is drawn, see `frame_windows`."""
    windows = frame_windows(stored, taken)
    first, last = windows[(len(windows) - 1) // 2][[0, -1]].tolist()
    return slice(first, last + 1, stored // taken)


def clip_names(row_ids: Ids, views: Views | None) -> Ids:
    """Return the ids of the clips that rows are of, without the numbers of their views."""
    if views is None or not len(row_ids):
        return row_ids
    return np.char.rpartition(row_ids, _MARK.encode())[:, 0]


def are_whole(row_ids: Ids, views: Views) -> bool:
    """Tell whether ids are those of all views of each clip, in order."""
    V = views.count
    if len(row_ids) % V:
        return False
    names = clip_names(row_ids, views).reshape(-1, V)
    wanted = [np.char.add(names[:, 0], f"{_MARK}{view}".encode()) for view in range(V)]
    return bool((np.stack(wanted, axis=1).ravel() == row_ids).all())
