"""Index of the packets of a video stream: display order and times of their frames.

The truth is FFmpeg's linear scan. Where every packet carries a time stamp of its own, the packets
tell; in containers that have none (AVI, program streams, raw streams) the bitstream's order does,
or else the scan itself. An index is made anew in every process: no file is believed to have kept
one. P packets in the order of decoding, F frames in the order of display.
"""

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import inf
from pathlib import Path
from typing import Any
from zlib import crc32

import av
import numpy as np
import numpy.typing as npt
from av.bitstream import BitStreamFilterContext

from karmma_pipeline.extraction.media.container import open_container
from karmma_pipeline.extraction.media.interface import MediaFaultError
from karmma_pipeline.extraction.types import Numbers, Times
from karmma_pipeline.modalities import NO_MEDIA, Reason

# Indices that a process keeps, for tasks of one video follow one another.
_KEPT = 8

# Formats that store of every packet when it is shown: a seek does not change that.
_TIMED = {"mp4", "matroska", "flv", "mxf", "nut"}

# Codecs whose order of display FFmpeg reads out of the bitstream, and by which filter.
_PARSED = {"h264": "dts2pts", "hevc": "dts2pts"}

# Packets that are decoded to see whether pictures come in the order that packets tell.
_PROBED = 64

# Packets at the end that are decoded to know their order: the filter is wrong about a few.
_TAIL = 32

# Seconds by which time stamps go back that begin anew; less is a writer's carelessness.
_BACK_S = 0.5

# A time stamp that a packet lacks, as FFmpeg writes it too (AV_NOPTS_VALUE).
_NONE = -(2**63)

# Seconds per frame where neither time stamps nor the stream tell.
_FRAME_S = 0.04


@dataclass(frozen=True)
class PacketIndex:
    """The packets and frames of one video stream.

    Attributes:
        timed: the container stores of every packet when it is shown.
        marks: what each packet is known by after a seek [P].
        places: where each lies in the file, bytes; -1 if unknown [P].
        pts: time stamps, for seeking [P].
        keys: packets at which decoding can start, ascending; packet 0 is one.
        hidden: packets whose pictures an edit list leaves out, bool [P].
        order: where the picture of a packet stands among the others, to be compared [P].
        number: of the frame that a packet makes; -1: none that is shown [P].
        packet: that makes a frame [F].
        times: of each frame, ascending, in ticks of the container's clock [F].
        last: duration of the last frame as its packet states it, ticks.
        begins_anew: behind the last frame come others whose time stamps go back.
    """

    timed: bool
    marks: Numbers
    places: Numbers
    pts: Numbers
    keys: Numbers
    hidden: npt.NDArray[np.bool_]
    order: Times
    number: Numbers
    packet: Numbers
    times: Times
    last: int
    begins_anew: bool = False

    @property
    def is_clean(self) -> bool:
        """Whether times prove that whatever follows a key frame is also shown after it."""
        before = self.keys[np.searchsorted(self.keys, np.arange(len(self.order)), "right") - 1]
        return (
            self.timed and not self.hidden.any() and bool((self.order >= self.order[before]).all())
        )

    def entry(self, frame: int, back: int = 0) -> int:
        """Return the packet from which a frame is decoded, or one ``back`` key frames earlier."""
        packet = int(self.packet[frame])
        place = int(np.searchsorted(self.keys, packet, side="right")) - 1
        # Pictures that follow a key frame but are shown before it build on what came before it.
        leads = bool(self.order[packet] < self.order[self.keys[place]])
        return self.before(int(self.keys[place]), leads + back)

    def before(self, key: int, back: int) -> int:
        """Return the packet that is ``back`` key frames before one, at least packet 0."""
        return int(self.keys[max(0, int(np.searchsorted(self.keys, key)) - back)])


@dataclass(frozen=True)
class _Packets:
    """What one pass through a file tells of a stream's packets; stamps may be `_NONE`.

    Attributes:
        timed: see `PacketIndex`.
        unstamped: the container has no times of presentation; what FFmpeg gives is a guess.
    """

    timed: bool
    unstamped: bool
    pts: Numbers
    dts: Numbers
    duration: Numbers
    marks: Numbers
    places: Numbers
    key: npt.NDArray[np.bool_]
    shown: npt.NDArray[np.bool_]
    hidden: npt.NDArray[np.bool_]


# Order of the packets [P], the packets of the frames [F], and the frames' times [F].
_Frames = tuple[Times, Numbers, Times]


def read_index(path: Path, stream: int) -> PacketIndex:
    """Return the index of a video stream, made by going through the file; some are kept.

    Raises:
        MediaFaultError: it has no frame, or the file is gone.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise MediaFaultError(Reason.FILE_MISSING, f"{path}: {error.strerror}") from None
    return _read(path, stream, (status.st_size, status.st_mtime_ns))


# Size and time are part of the key: a file may be replaced.
@lru_cache(maxsize=_KEPT)
def _read(path: Path, number: int, _key: tuple[int, int]) -> PacketIndex:
    with open_container(path) as container:
        stream = container.streams[number]
        packets = _demuxed(path, container, stream)
        if not packets.shown.any():
            raise MediaFaultError(Reason.DECODE_ERROR, f"{path}: no frames")
        codec: Any = stream.codec_context
        rate = codec.framerate or stream.guessed_rate or stream.average_rate
        length_s = float(1 / rate) if rate else _FRAME_S
        tick_s = float(stream.time_base or 1)
        name, reordered = codec.name, bool(codec.has_b_frames)
    found = _Order(path, number, packets, name, reordered, length_s / tick_s).frames()
    if not len(found[1]):
        raise MediaFaultError(Reason.DECODE_ERROR, f"{path}: no frame can be decoded")
    return _assembled(packets, *found, back=_BACK_S / tick_s)


def _assembled(
    packets: _Packets, order: Times, frames: Numbers, times: Times, back: float
) -> PacketIndex:
    # A moment can have one picture: of files that were joined byte by byte, the first's.
    ahead = _goes_ahead(times, back)
    frames, times = frames[ahead], times[ahead]
    number = np.full(len(order), -1, np.int64)
    number[frames] = np.arange(len(frames))
    keys = packets.key & np.isfinite(order)
    keys[0] = True
    return PacketIndex(
        packets.timed,
        packets.marks,
        packets.places,
        np.where(packets.pts == _NONE, 0, packets.pts),
        np.flatnonzero(keys),
        packets.hidden,
        order,
        number,
        frames,
        # A search by time needs them ascending, whatever a damaged file says.
        np.maximum.accumulate(times),
        int(packets.duration[frames[-1]]),
        not bool(ahead[-1]),
    )


def _goes_ahead(times: Times, back: float) -> npt.NDArray[np.bool_]:
    """Tell frames from those that follow a leap back, up to where that began, bool [F]."""
    latest = np.maximum.accumulate(times)
    # The number of the last leap, and of the last frame that is later than all before it.
    count = np.arange(len(times))
    leapt = np.maximum.accumulate(np.where(times < latest - back, count, -1))
    led = np.maximum.accumulate(np.where(times > np.append(-np.inf, latest[:-1]), count, -1))
    return led >= leapt


def mark_of(packet: Any, timed: bool) -> int:
    """Return what a packet is known by: its place, or its content where stamps may change."""
    if timed:
        return hash((packet.pos, packet.size, packet.pts))
    return hash((packet.size, crc32(packet)))


def _demuxed(path: Path, container: Any, stream: Any) -> _Packets:
    names = set(container.format.name.split(","))
    timed = bool(_TIMED & names)
    # Hours have hundreds of thousands of packets: bytes, for Python's numbers take five times as
    # much, and what a process has once taken it hardly gives back.
    numbers, flags = [array("q") for _ in range(5)], [bytearray() for _ in range(3)]
    for packet in until_end(container.demux(stream)):
        if packet.size:
            check_clear(packet, path)
            pts = packet.dts if packet.pts is None and timed else packet.pts
            told = (
                _NONE if pts is None else pts,
                _NONE if packet.dts is None else packet.dts,
                packet.duration or 0,
                mark_of(packet, timed),
                -1 if packet.pos is None else packet.pos,
            )
            said = packet.is_keyframe, packet.is_corrupt, packet.is_discard
            for of, number in zip(numbers, told, strict=True):
                of.append(number)
            for row, is_so in zip(flags, said, strict=True):
                row.append(is_so)
    pts, dts, duration, marks, places = (np.frombuffer(of, np.int64) for of in numbers)
    key, corrupt, hidden = (np.frombuffer(row, bool) for row in flags)
    shown = ~(hidden | corrupt)
    # Where two files were joined FFmpeg misses what never was, and marks the last packet or the one
    # before it. Whether these pictures are whole is for their decoder to say.
    for at in np.flatnonzero(corrupt).tolist():
        if key[at + 1 : at + 3].any() and not corrupt[at + 1 : at + 3].any():
            shown[at] = not hidden[at]
    return _Packets(timed, "avi" in names, pts, dts, duration, marks, places, key, shown, hidden)


def check_clear(packet: Any, path: Path) -> None:
    """Refuse a packet that only the holder of a key can read; some decoders make noise of it.

    Raises:
        MediaFaultError: it is encrypted.
    """
    if packet.has_sidedata("encryption_info"):
        # As streaming sites do it (CENC).
        detail = f"{path}: encrypted: {NO_MEDIA['encrypted']}"
        raise MediaFaultError(Reason.DECODE_ERROR, detail)


def until_end(packets: Iterator[Any]) -> Iterator[Any]:
    """Yield packets up to where the file is cut or unreadable."""
    while True:
        try:
            packet = next(packets)
        except (StopIteration, av.error.FFmpegError, OSError):
            return
        except IndexError:  # a stream that began later: PyAV flushes it too, last, and has none
            return
        yield packet


def decoded(packet: Any, tag: int, shown: bool) -> list[Any]:
    """Decode a packet; frames carry the number of the packet that made them (`tag_of`).

    One that is corrupt is passed over unless its picture is shown all the same.

    Raises:
        FFmpegError, ValueError: it cannot be decoded.
    """
    if packet.is_corrupt and not shown:
        return []
    if packet.size:
        packet.opaque = (tag,)  # a tuple of its own for each: PyAV keeps them by identity
    frames: list[Any] = packet.decode()
    return frames


def tag_of(frame: Any) -> int:
    """Return the number of the packet that made a frame; -1 if the decoder lost it."""
    return -1 if frame.opaque is None else int(frame.opaque[0])


def prepare(stream: Any) -> None:
    """Set up the decoder of a stream, before it is first used."""
    codec = stream.codec_context
    if not codec.is_open:
        codec.thread_count = 1  # the pool has a process per CPU
        codec.copy_opaque = True


@dataclass
class _Order:
    """Finds out in which order the pictures of a stream are shown, and when."""

    path: Path
    stream: int
    packets: _Packets
    codec: str
    reordered: bool
    tick: float

    def frames(self) -> _Frames:
        """Return all that is shown; what only a scan tells is scanned."""
        told, packets = self._told(), self.packets
        if told is not None and ((packets.timed and not self._suspicious()) or self._agrees(told)):
            frames = self._shown(told)
            if packets.timed:
                return told, frames, told[frames]
            return told, frames, self._best_effort(frames, self._triggers(len(frames)))
        if self.codec in _PARSED and not self._goes_back():
            parsed = self._parsed()
            if parsed is not None and self._agrees(parsed):
                frames = self._shown(parsed)
                return parsed, frames, self._best_effort(frames, self._triggers(len(frames)))
        return self._scanned()

    def _told(self) -> Times | None:
        """Return the order by time stamps, None where some lack or cannot be right."""
        packets = self.packets
        own = packets.pts[packets.shown]
        # Of pictures of one time stamp, as clocks too coarse for the rate give, only the order
        # of decoding is known.
        unsure = not packets.timed or self.reordered
        if _NONE in own or (unsure and len(np.unique(own)) < len(own)) or self._goes_back():
            return None
        return np.where(packets.pts == _NONE, -inf, packets.pts)

    def _goes_back(self) -> bool:
        """Tell streams in which another one begins, whose time stamps may be any."""
        return not self.packets.timed and not _ascends(self.packets.dts, or_same=True)

    def _suspicious(self) -> bool:
        """Tell streams whose pictures are reordered but whose stamps are not.

        A copy from an AVI file has its packets' numbers for time stamps.
        """
        return self.reordered and _ascends(self.packets.pts)

    def _shown(self, order: Times) -> Numbers:
        frames = np.argsort(order, kind="stable")
        frames = frames[self.packets.shown[frames]]
        # In a container without times of presentation the order may look clean and not be so.
        if self.packets.timed and self._starts_clean(order):
            return frames
        # A decoder withholds pictures whose references lie before the file's start. They are no
        # frames, for a scan does not give them. What it still holds back comes after all given.
        given = [tag for tag, _ in self._first]
        if not given:
            return frames
        late = order[frames] > max(order[tag] for tag in given)
        return frames[late | np.isin(frames, given)]

    def _starts_clean(self, order: Times) -> bool:
        key = self.packets.key
        following = order[: 1 + next(iter(np.flatnonzero(key[1:])), len(key))]
        return bool(key[0] and (following >= order[0]).all())

    def _agrees(self, order: Times) -> bool:
        """Tell whether the decoder gives the first pictures in this order."""
        return _ascends(order[[tag for tag, _ in self._first]])

    @cached_property
    def _first(self) -> list[tuple[int, int]]:
        """Return which packets make the first pictures, and at which the decoder gave each."""
        return [(tag, at) for tag, _, at in self._decode(_PROBED)]

    def _decode(self, count: int | None = None, first: int = 0) -> Iterator[tuple[int, Any, int]]:
        """Yield tag, frame, and number of the packet at which the decoder gave it."""
        with open_container(self.path) as container:
            stream = container.streams[self.stream]
            prepare(stream)
            for at, packet in enumerate(until_end(container.demux(stream))):
                if count is not None and at >= count:
                    return
                if at < first:
                    continue
                try:
                    frames = decoded(packet, at, self._is_shown(at))
                except (av.error.FFmpegError, ValueError):
                    continue
                yield from ((tag_of(frame), frame, at) for frame in frames if tag_of(frame) >= 0)

    def _is_shown(self, at: int) -> bool:
        return at < len(self.packets.shown) and self.packets.shown[at]

    def _parsed(self) -> Times | None:
        """Return the order that the bitstream states, undecoded; None if it is damaged."""
        packets = len(self.packets.pts)
        order = np.full(packets, inf)
        with open_container(self.path) as container:
            stream = container.streams[self.stream]
            reorder = BitStreamFilterContext(_PARSED[self.codec], stream)
            for at, packet in enumerate(until_end(container.demux(stream))):
                packet.pts, packet.dts = None, at
                try:
                    parsed = reorder.filter(packet if packet.size else None)
                except (av.error.FFmpegError, ValueError):
                    return None
                for done in parsed:
                    if done.pts is not None and done.dts is not None and done.dts < packets:
                        order[done.dts] = done.pts
        self._put_tail_right(order)
        return order

    def _put_tail_right(self, order: Times) -> None:
        """Decode the end of the stream, about which the filter is wrong."""
        last = set(range(max(0, len(order) - _TAIL), len(order)))
        keys = np.flatnonzero(self.packets.key[: max(1, len(order) - 2 * _TAIL)]).tolist()
        for key in [*reversed(keys), 0]:
            given = [tag for tag, _, _ in self._decode(first=key)]
            if last <= set(given) or key == 0:
                order[given] = 2.0 * len(order) + np.arange(len(given))
                return

    def _triggers(self, count: int) -> list[int | None]:
        """Return at which packet the decoder gives each frame; None: after the last one."""
        delay = 0
        for shown, (_, at) in enumerate(self._first):
            delay = at - shown
        packets = len(self.packets.dts)
        return [n + delay if n + delay < packets else None for n in range(count)]

    def _best_effort(self, frames: Numbers, triggers: Sequence[int | None]) -> Times:
        """Return FFmpeg's best_effort_timestamp of frames [F] in their order; gaps are filled."""
        packets = self.packets
        pts = packets.pts[frames]
        copied = not packets.timed and _ascends(packets.pts) and not _ascends(pts)
        if packets.unstamped or copied:
            pts = np.full_like(pts, _NONE)  # FFmpeg's guess: the packets' numbers
        dts = [None if at is None else _stamp(packets.dts[at]) for at in triggers]
        return _filled(list(_corrected([_stamp(own) for own in pts], dts)), self.tick)

    def _scanned(self) -> _Frames:
        """Decode the whole stream once, as what its packets say is not how it is shown."""
        frames: list[int] = []
        triggers: list[int | None] = []
        packets = len(self.packets.pts)
        for tag, _, at in self._decode():
            if tag < packets and (not frames or tag != frames[-1]):
                frames.append(tag)
                triggers.append(at if at < packets else None)
        order = np.full(packets, inf)
        numbers = np.array(frames, np.int64)
        order[numbers] = np.arange(len(frames))
        return order, numbers, self._best_effort(numbers, triggers)


def _ascends(stamps: Numbers | Times, or_same: bool = False) -> bool:
    known = stamps[stamps != _NONE]
    ahead = known[1:] >= known[:-1] if or_same else known[1:] > known[:-1]
    return bool(ahead.all())


def _stamp(number: np.int64) -> int | None:
    return None if number == _NONE else int(number)


def _corrected(pts: Sequence[int | None], dts: Sequence[int | None]) -> Iterator[int | None]:
    """Yield what libavcodec takes as the time of each frame (guess_correct_pts in decode.c)."""
    # It trusts the stamps that go back less often: a frame's own, or those of the packets at
    # which the decoder gave it.
    last_pts, last_dts, wrong_pts, wrong_dts = -inf, -inf, 0, 0
    for own, given in zip(pts, dts, strict=True):
        if given is not None:
            wrong_dts += given <= last_dts
            last_dts = given
        elif own is not None:
            last_dts = own
        if own is not None:
            wrong_pts += own <= last_pts
            last_pts = own
        elif given is not None:
            last_pts = given
        yield own if own is not None and (wrong_pts <= wrong_dts or given is None) else given


def _filled(stamps: list[int | None], tick: float) -> Times:
    """Give frames without a time one frame after the one before, as players do."""
    times: list[float] = []
    for stamp in stamps:
        times.append((times[-1] + tick if times else 0.0) if stamp is None else float(stamp))
    return np.array(times, np.float64)
