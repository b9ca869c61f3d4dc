"""PyAV, the second decoder: for what decord cannot read, addresses wrongly or dies of.

It counts frames as decord does and is exact for every container: a frame is known by its time
stamp, and where seeking lands too late, it goes back. Frames that a damaged place may have
touched are never given.
"""

from collections import deque
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt

from karmma_pipeline.extract.container import StreamFacts, open_container
from karmma_pipeline.extract.faults import MediaFaultError
from karmma_pipeline.extract.sampling import Numbers, Times
from karmma_pipeline.modalities import Reason

Picture = npt.NDArray[np.uint8]
_Shown = tuple[int, Any, bool]
"""Number, frame, and whether no damage can have touched it."""


_ALONE_S = 0.04
"""How long the only frame of a video counts as shown if the file does not say."""


class PyavVideo:
    """One video stream of a file; only what the file really holds is counted.

    Attributes:
        starts: start of every frame, seconds on the file's clock [frames].
        stop_s: end of the last frame.

    Raises:
        MediaFaultError: no frame in it can be read.
    """

    decoder = "pyav"

    def __init__(self, path: Path, facts: StreamFacts) -> None:
        self.path, self._index = path, facts.index
        self._container = open_container(path)
        rows = list(_packets(self._container.streams[self._index], self._container))
        if not rows:
            self._container.close()
            raise MediaFaultError(Reason.DECODE_ERROR, f"{path}: no frame")
        rows.sort()
        self._pts = np.array([pts for pts, _, _ in rows], np.int64)
        self._number = {pts: number for number, pts in enumerate(self._pts.tolist())}
        self._keys = np.flatnonzero([key for _, _, key in rows])
        base = float(self._container.streams[self._index].time_base or 0)
        times = np.asarray(self._pts * base, np.float64)
        self.starts: Times = times - facts.first_s + facts.delay_s
        step = float(np.median(np.diff(times))) if rows[1:] else _ALONE_S
        self.stop_s = float(self.starts[-1]) + max(rows[-1][1] * base, step)

    def decode(self, numbers: Numbers) -> Iterator[tuple[int, Picture]]:
        """Yield frames by ascending number, uint8 [H, W, 3] in RGB, turned as their file says.

        Raises:
            MediaFaultError: a frame is damaged, or cannot be decoded.
        """
        wanted = deque(numbers.tolist())
        while wanted:
            yield from self._stretch(wanted)

    def _stretch(self, wanted: deque[int]) -> Iterator[tuple[int, Picture]]:
        """Yield the first of the wanted frames, and on until it is quicker to seek again."""
        before: _Shown | None = None
        goal = wanted[0]
        for shown in self._from(wanted[0]):
            while wanted and shown[0] > wanted[0]:  # it left no picture of its own
                yield self._take(wanted, before)
            if wanted and shown[0] == wanted[0]:
                yield self._take(wanted, shown)
            if not wanted or (wanted[0] > goal and self._run_up(wanted[0]) > shown[0]):
                return
            before = shown
        yield self._take(wanted, before)

    def _take(self, wanted: deque[int], shown: _Shown | None) -> tuple[int, Picture]:
        goal = wanted.popleft()
        if shown is None or shown[0] < goal - 1 or not shown[2]:
            raise self._fault(goal)
        return goal, _turned(shown[1])

    def _fault(self, number: int) -> MediaFaultError:
        return MediaFaultError(Reason.DECODE_ERROR, f"{self.path}: frame {number} is damaged")

    def _run_up(self, number: int) -> int:
        """Return the last key frame up to a frame; where there is none, the first frame."""
        place = int(np.searchsorted(self._keys, number, side="right")) - 1
        return int(self._keys[place]) if place >= 0 else 0

    def _from(self, number: int) -> Iterator[_Shown]:
        """Decode forward from a place that is surely not after a frame."""
        place = int(np.searchsorted(self._keys, number, side="right")) - 1
        step = 0
        while place - step > 0:
            shown = self._forward(int(self._keys[place - step]))
            first = next(shown, None)
            if first is not None and first[0] <= number:
                return chain([first], shown)
            step = 2 * step + 1
        return self._forward(0)

    def _forward(self, key: int) -> Iterator[_Shown]:
        """Decode from a key frame on."""
        container, stream = self._reopened(key)
        sound = True
        for packet in until_end(container.demux(stream)):
            try:
                frames = packet.decode()
            except (av.error.FFmpegError, ValueError):
                sound = False
                continue
            for frame in frames:
                frame.pts = frame.pts if frame.pts is not None else frame.dts
                if frame.key_frame:
                    sound = True
                number = self._number.get(frame.pts)
                if number is not None:
                    yield number, frame, sound and not frame.is_corrupt

    def _reopened(self, key: int) -> tuple[Any, Any]:
        container, stream = self._container, self._container.streams[self._index]
        try:
            container.seek(int(self._pts[key]), stream=stream, backward=True)
        except (av.error.FFmpegError, OSError):
            key = 0
        if key == 0:  # from the very start, which not every format finds by seeking
            container.close()
            self._container = container = open_container(self.path)
            stream = container.streams[self._index]
        if not stream.codec_context.is_open:
            stream.codec_context.thread_count = 1
        return container, stream

    def close(self) -> None:
        """Let go of the file."""
        self._container.close()


def _packets(stream: Any, container: Any) -> Iterator[tuple[int, int, bool]]:
    """Yield time stamp, duration and key flag of every packet that makes a picture."""
    for packet in until_end(container.demux(stream)):
        pts = packet.pts if packet.pts is not None else packet.dts
        if packet.size and pts is not None and not packet.is_corrupt and not packet.is_discard:
            yield pts, packet.duration or 0, packet.is_keyframe


def until_end(packets: Iterator[Any]) -> Iterator[Any]:
    """Yield packets up to where the file is cut or unreadable."""
    while True:
        try:
            packet = next(packets)
        except (StopIteration, av.error.FFmpegError, OSError):
            return
        yield packet


def _turned(frame: Any) -> Picture:
    picture: Picture = frame.to_ndarray(format="rgb24")
    if frame.rotation % 360:
        picture = np.ascontiguousarray(np.rot90(picture, frame.rotation // 90))
    return picture
