"""PyAV, the decoder that is exact: for what decord cannot read, addresses wrongly or dies of.

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

from karmma_pipeline.extraction.media.container import StreamInfo, open_container
from karmma_pipeline.extraction.media.interface import MediaFaultError
from karmma_pipeline.extraction.types import Numbers, Times, end_of
from karmma_pipeline.modalities import Reason

Picture = npt.NDArray[np.uint8]
# Number, frame, and whether no damage can have touched it.
_Shown = tuple[int, Any, bool]


class PyavVideo:
    """One video stream of a file; only what the file really holds is counted.

    Args:
        path: the file.
        info: of the stream.
        left_half: of each picture, give the left half.

    Attributes:
        starts: start of every frame, seconds on the file's clock [frames].
        stop_s: end of the last frame.

    Raises:
        MediaFaultError: no frame in it can be read.
    """

    decoder = "pyav"

    def __init__(self, path: Path, info: StreamInfo, left_half: bool = False) -> None:
        self.path, self._index, self._parts = path, info.index, 2 if left_half else 1
        self._container = open_container(path)
        rows = list(_packets(self._container.streams[self._index], self._container))
        if not rows:
            self._container.close()
            raise MediaFaultError(Reason.DECODE_ERROR, f"{path}: no frame")
        # Packets come in the order of decoding; pictures are shown in the order of time stamps,
        # which differs where there are B-frames. A frame's number is its place in that order.
        rows.sort()
        self._pts = np.array([pts for pts, _, _ in rows], np.int64)
        self._number = {pts: number for number, pts in enumerate(self._pts.tolist())}
        self._keys = np.flatnonzero([key for _, _, key in rows])
        base = float(self._container.streams[self._index].time_base or 0)
        # Time stamps have the container's unit and may start anywhere. The stream's first one is
        # taken off, and the place where the stream starts on the file's clock put in its stead.
        times = np.asarray(self._pts * base, np.float64)
        self.starts: Times = times - info.first_s + info.delay_s
        self.stop_s = end_of(self.starts, rows[-1][1] * base)

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
            # A packet may leave no picture of its own (a repeated or dropped frame): a player then
            # goes on to show the one before.
            while wanted and shown[0] > wanted[0]:
                yield self._take(wanted, before)
            if wanted and shown[0] == wanted[0]:
                yield self._take(wanted, shown)
            # A key frame between here and the next wanted frame is a shorter way to it than to
            # decode all that lies before. The first one is given first, or this would never end.
            if not wanted or (wanted[0] > goal and self._run_up(wanted[0]) > shown[0]):
                return
            before = shown
        yield self._take(wanted, before)

    def _take(self, wanted: deque[int], shown: _Shown | None) -> tuple[int, Picture]:
        goal = wanted.popleft()
        # The picture before stands in for one missing picture, and not for a hole.
        if shown is None or shown[0] < goal - 1 or not shown[2]:
            raise self._fault(goal)
        picture = _turned(shown[1])
        return goal, picture[:, : picture.shape[1] // self._parts]

    def _fault(self, number: int) -> MediaFaultError:
        return MediaFaultError(Reason.DECODE_ERROR, f"{self.path}: frame {number} is damaged")

    def _run_up(self, number: int) -> int:
        """Return the last key frame up to a frame; where there is none, the first frame."""
        place = int(np.searchsorted(self._keys, number, side="right")) - 1
        return int(self._keys[place]) if place >= 0 else 0

    def _from(self, number: int) -> Iterator[_Shown]:
        """Decode forward from a place that is surely not after a frame."""
        place = int(np.searchsorted(self._keys, number, side="right")) - 1
        # `seek` lands where the container's index says, which may be after the wanted frame: with
        # open GOPs, and where time stamps of packets are rounded or missing. What the decoder gives
        # first tells; if it is too late, go back by 1, 3, 7, ... key frames.
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
        damage = _Damage()
        for packet in until_end(container.demux(stream)):
            damage.pass_on(packet)
            try:
                frames = [] if packet.is_corrupt else packet.decode()
            except (av.error.FFmpegError, ValueError):
                frames = []
                damage.starts(packet)
            for frame in frames:
                # Only time stamps that the first look at the packets has seen are frames; others
                # come from a damaged stretch, or from what an edit list leaves out.
                frame.pts = frame.pts if frame.pts is not None else frame.dts
                number = self._number.get(frame.pts)
                if number is not None:
                    yield number, frame, not (frame.is_corrupt or frame.pts in damage.touched)

    def _reopened(self, key: int) -> tuple[Any, Any]:
        container, stream = self._container, self._container.streams[self._index]
        try:
            container.seek(int(self._pts[key]), stream=stream, backward=True)
        except (av.error.FFmpegError, OSError):
            key = 0
        # The very start is not found by seeking in every format, so the file is opened anew; and
        # opening leaves no state of a failed seek behind.
        if key == 0:
            container.close()
            self._container = container = open_container(self.path)
            stream = container.streams[self._index]
        if not stream.codec_context.is_open:
            stream.codec_context.thread_count = 1
        return container, stream

    def close(self) -> None:
        """Let go of the file."""
        self._container.close()


class _Damage:
    """Which frames a damaged packet may have touched: all up to the next key frame.

    Attributes:
        touched: their time stamps.
    """

    def __init__(self) -> None:
        self.touched: set[int] = set()
        self._open = False
        self._leading: int | None = None

    def starts(self, packet: Any) -> None:
        """Take note of a packet that cannot be decoded."""
        self._open = True
        self.touched.add(_pts(packet))

    def pass_on(self, packet: Any) -> None:
        """Let a packet inherit the damage before it."""
        if packet.is_keyframe and packet.size:
            # What is shown before this key frame may still build on what came before it.
            self._leading = _pts(packet) if self._open else None
            self._open = False
        if packet.is_corrupt:
            self.starts(packet)
        if self._open or (self._leading is not None and _pts(packet) < self._leading):
            self.touched.add(_pts(packet))


def _pts(packet: Any) -> int:
    stamp = packet.pts if packet.pts is not None else packet.dts
    return 0 if stamp is None else int(stamp)


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
