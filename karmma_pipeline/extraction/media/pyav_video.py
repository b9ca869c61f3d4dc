"""Frames of a media file, identical to a linear scan by FFmpeg.

A seek is a hint: where it has led is known by comparing packets with those of the scan. Decoding
starts at a key frame that the decoder itself shows to be one, or at an earlier one. Frames that
a damaged place may have touched are never given.
"""

from collections import deque
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt
from av.sidedata.sidedata import SideDataContainer

from karmma_pipeline.extraction.media.container import StreamInfo, open_container
from karmma_pipeline.extraction.media.interface import MediaFaultError
from karmma_pipeline.extraction.media.packet_index import (
    decoded,
    mark_of,
    prepare,
    read_index,
    tag_of,
    until_end,
)
from karmma_pipeline.extraction.types import Numbers, Times, end_of
from karmma_pipeline.modalities import Reason

Picture = npt.NDArray[np.uint8]
# Number, frame, and whether no damage can have touched it.
_Shown = tuple[int, Any, bool]

# Formats that can be entered at any byte, and whose seeks by time are guesses.
_BY_BYTES = {"mpegts", "mpeg", "h264", "hevc", "m4v", "mpegvideo", "mjpeg", "vc1", "obu"}

# Packets after a seek among which the wanted one is looked for.
_SEARCHED = 500

# Codecs whose decoders give nothing before they have recovered from a start in the middle.
_WITHHOLDING = {"h264", "hevc"}

# FFmpeg's number of the picture type that builds on no other.
_INTRA = 1


class _AstrayError(Exception):
    """After a seek, packets come that the scan does not have there."""


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
        self.path, self._number, self._parts = path, info.index, 2 if left_half else 1
        self.index = read_index(path, info.index)
        self._container = open_container(path)
        # The packet that comes next, and where from; after a failed seek there are no more seeks.
        self._at, self._packets = 0, self._demux()
        self._seeks, self._sought = True, False
        # Time stamps may start anywhere. The stream's first one is taken off, and the place where
        # the stream starts on the file's clock put in its stead.
        self.starts: Times = self.index.times * info.tick_s - info.first_s + info.delay_s
        self.stop_s = end_of(self.starts, self.index.last * info.tick_s)

    @property
    def _stream(self) -> Any:
        return self._container.streams[self._number]

    def decode(self, numbers: Numbers) -> Iterator[tuple[int, Picture]]:
        """Yield frames by ascending number, uint8 [H, W, 3] in RGB, turned as their file says.

        Raises:
            MediaFaultError: a frame is damaged, or cannot be decoded.
        """
        wanted = deque(numbers.tolist())
        while wanted:
            try:
                yield from self._stretch(wanted)
            except _AstrayError:
                self._seeks = False

    def _stretch(self, wanted: deque[int]) -> Iterator[tuple[int, Picture]]:
        """Yield the first of the wanted frames, and on until it is quicker to seek again."""
        before: _Shown | None = None
        goal = wanted[0]
        for shown in self._from(goal):
            # A packet may leave no picture of its own (a repeated or dropped frame): a player then
            # goes on to show the one before.
            while wanted and shown[0] > wanted[0]:
                yield self._take(wanted, before)
            if wanted and shown[0] == wanted[0]:
                yield self._take(wanted, shown)
            # A key frame between here and the next wanted frame is a shorter way to it than to
            # decode all that lies before. The first one is given first, or this would never end.
            if not wanted or (wanted[0] > goal and self.index.entry(wanted[0]) > self._at):
                return
            before = shown
        yield self._take(wanted, before)

    def _take(self, wanted: deque[int], shown: _Shown | None) -> tuple[int, Picture]:
        goal = wanted.popleft()
        # The picture before stands in for one missing picture, and not for a hole.
        if shown is None or shown[0] < goal - 1 or not shown[2]:
            raise MediaFaultError(Reason.DECODE_ERROR, f"{self.path}: frame {goal} is damaged")
        picture = upright(shown[1])
        return goal, picture[:, : picture.shape[1] // self._parts]

    def _from(self, goal: int) -> Iterator[_Shown]:
        """Decode forward from a packet from which the wanted frame comes out as in a scan."""
        step = 0
        while (entry := self.index.entry(goal, step)) > 0:
            shown = self._forward(entry)
            first = next(shown, None)
            if first is not None and first[0] <= goal and self._is_sound(first, entry):
                return chain([first], shown)
            step = 2 * step + 1
        return self._forward(0)

    def _is_sound(self, first: _Shown, entry: int) -> bool:
        """Tell whether what the decoder gives from a key packet on needs nothing before it."""
        _, frame, undamaged = first
        if tag_of(frame) == entry:
            return undamaged and (frame.key_frame or frame.pict_type == _INTRA)
        # Pictures that refresh bit by bit have no key frame: some decoders wait until they are
        # whole. Key frames that an edit list hides are decoded and not given.
        withheld = self._stream.codec_context.name in _WITHHOLDING
        return undamaged and (withheld or bool(self.index.hidden[entry]))

    def _forward(self, entry: int) -> Iterator[_Shown]:
        """Decode from a packet on; what is shown before its picture is left out."""
        index, damage = self.index, _Damage()
        least = index.order[entry] if entry else -np.inf
        for place, packet in self._packets_from(entry):
            order = float(index.order[place]) if place < len(index.order) else np.inf
            shown = place < len(index.number) and bool(index.number[place] >= 0)
            damage.pass_on(packet, place, order, shown)
            try:
                frames = decoded(packet, place, shown)
            except (av.error.FFmpegError, ValueError):
                frames = []
                damage.starts(place)
            for frame in frames:
                tag = tag_of(frame)
                if 0 <= tag < len(index.order) and index.number[tag] >= 0:
                    good = not (frame.is_corrupt or tag in damage.touched)
                    if index.order[tag] >= least:
                        yield int(index.number[tag]), frame, good

    def _packets_from(self, entry: int) -> Iterator[tuple[int, Any]]:
        """Yield packets and their numbers from one on, the decoder's end mark included."""
        self._go_to(entry)
        for packet in self._packets:
            place = self._at
            self._at += 1
            if self._sought and packet.size:
                marks = self.index.marks
                if place >= len(marks) or mark_of(packet, self.index.timed) != marks[place]:
                    raise _AstrayError
            yield place, packet

    def _go_to(self, entry: int) -> None:
        """Let a packet be the next one."""
        ahead = entry - self._at
        if self._seeks and entry and not 0 <= ahead < _SEARCHED:
            earlier = self.index.before(entry, 2)
            if self._found(entry, entry) or self._found(entry, earlier):
                return
        if ahead < 0 or self._at <= 0:
            self._reopen()
        self._stream.codec_context.flush_buffers()
        while self._at < entry and next(self._packets, None) is not None:
            self._at += 1

    def _found(self, entry: int, target: int) -> bool:
        """Seek to a packet and go on to another one; False if that is not found."""
        self._at, self._sought = -1, True  # anywhere
        try:
            self._seek(target)
        except (av.error.FFmpegError, OSError):
            return False
        wanted, packets = self.index.marks[entry], self._demux()
        for _, packet in zip(range(_SEARCHED), packets, strict=False):
            if packet.size and mark_of(packet, self.index.timed) == wanted:
                self._at, self._packets = entry, chain([packet], packets)
                return True
        return False

    def _seek(self, target: int) -> None:
        names = set(self._container.format.name.split(","))
        if names & _BY_BYTES:
            # Packets that begin in the middle of a larger one have no place of their own.
            places = self.index.places[: target + 1]
            self._container.seek(int(places.max()), unsupported_byte_offset=True)
        else:
            self._container.seek(int(self.index.pts[target]), stream=self._stream)

    def _reopen(self) -> None:
        # The very start is not found by seeking in every format.
        self._container.close()
        self._container = open_container(self.path)
        self._at, self._packets, self._sought = 0, self._demux(), False

    def _demux(self) -> Iterator[Any]:
        prepare(self._stream)
        return until_end(self._container.demux(self._stream))

    def close(self) -> None:
        """Let go of the file."""
        self._container.close()


class _Damage:
    """Which frames a damaged packet may have touched: all up to the next key frame.

    Attributes:
        touched: the numbers of their packets.
    """

    def __init__(self) -> None:
        self.touched: set[int] = set()
        self._open = False
        self._leading: float | None = None

    def starts(self, place: int) -> None:
        """Take note of a packet that cannot be decoded."""
        self._open = True
        self.touched.add(place)

    def pass_on(self, packet: Any, place: int, order: float, shown: bool) -> None:
        """Let a packet inherit the damage before it, or begin some unless its picture is shown."""
        if packet.is_keyframe and packet.size:
            # What is shown before this key frame may still build on what came before it.
            self._leading = order if self._open else None
            self._open = False
        if packet.is_corrupt and not shown:
            self.starts(place)
        if self._open or (self._leading is not None and order < self._leading):
            self.touched.add(place)


def upright(frame: Any) -> Picture:
    """Return a frame as players show it, uint8 [H, W, 3]: turned and mirrored by its matrix."""
    picture: Picture = frame.to_ndarray(format="rgb24")
    # Not `frame.side_data`: the two would hold one another, and pictures of 4K the memory, until
    # the garbage collector comes by.
    matrix = SideDataContainer(frame).get("DISPLAYMATRIX")  # type: ignore[call-arg]
    if matrix is None:
        return picture
    # x' = a x + c y, y' = b x + d y. Players show quarter turns; others are rounded to one.
    a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].tolist()
    turned = abs(b) + abs(c) > abs(a) + abs(d)
    if turned:
        picture = picture.transpose(1, 0, 2)
    along, down = (c, b) if turned else (a, d)
    picture = picture[:, ::-1] if along < 0 else picture
    return np.ascontiguousarray(picture[::-1] if down < 0 else picture)
