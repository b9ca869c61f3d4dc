"""Looks at sources cheaply: is it there, is it whole, how long, what is in it.

They are opened by the code that extraction uses, in processes of their own: FFmpeg has died on cut
headers, and a network disk may hang. A file is whole if it has the size that its own structure
states, and if its first picture and first sound can be decoded; any other is measured, by going
through it once.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import islice
from math import inf
from pathlib import Path
from typing import Any, Literal

import av
from pebble import ProcessExpired

from karmma_pipeline import files, jobs
from karmma_pipeline.data.datasets.listing import missing
from karmma_pipeline.data.sources import BoxSource, FileSource, SensorSource, Source
from karmma_pipeline.extraction.media.audio_track import set_order
from karmma_pipeline.extraction.media.container import StreamInfo, open_container, read_info
from karmma_pipeline.extraction.media.interface import MediaFaultError, MediaReader, first_line
from karmma_pipeline.extraction.media.media_file import OpenMedia
from karmma_pipeline.extraction.media.packet_index import check_clear, prepare, until_end
from karmma_pipeline.extraction.media.stated_size import stated_size
from karmma_pipeline.jobs.processes import WorkerPool
from karmma_pipeline.logs import progress_bar
from karmma_pipeline.modalities import Reason

State = Literal["fine", "missing", "truncated", "damaged"]
#: What becomes of something: its reason, as extraction has it, and the decoder's own words.
Outcome = tuple[Reason, str]

#: Key of a source's losses: it cannot be had at all.
WHOLE = "whole"

# Seconds for a source: a tar of a million pictures is listed, what is left of a file is read.
_TIMEOUT_S = 300.0

_MAX_PROCESSES = 8

# Packets among which the first picture and the first sound are looked for.
_PROBED = 500

# Packets after a seek to the end, zeros with which none ends, and seconds before the end in which
# the last ones may lie.
_PROBED_LAST = 5_000
_ZEROS = 16
_NEAR_S = 0.5

_STATES: dict[Reason, State] = {Reason.PRESENT: "fine", Reason.FILE_MISSING: "missing"}
_ENDED: dict[type, Reason] = {ProcessExpired: Reason.CRASHED, TimeoutError: Reason.TIMEOUT}


@dataclass(frozen=True, slots=True)
class SourceCheck:
    """Whether a source is whole, and what it says of itself.

    Attributes:
        detail: what is wrong, for people.
        lost: what of it cannot be had, and why: `WHOLE`, or a kind of stream.
        ends: kinds of stream that it holds, and where they end on its clock, seconds (None where
            it does not say); None as a whole if it was not opened.
        begins: kinds of stream of a media file, and where they begin.
        fps: frames per second; None where it does not say.
        sure: a file that proves to be whole; what others hold is known by decoding it, and what a
            sensor's holds.
    """

    state: State = "fine"
    detail: str = ""
    lost: Mapping[str, Outcome] = field(default_factory=dict)
    ends: Mapping[str, float | None] | None = None
    begins: Mapping[str, float] = field(default_factory=dict)
    fps: float | None = None
    sure: bool = True

    @classmethod
    def of(cls, path: Path, lost: Mapping[str, Outcome], **known: Any) -> "SourceCheck":
        """Judge a source by the first thing of it that cannot be had."""
        reason, detail = next(iter(lost.values()), (Reason.PRESENT, ""))
        said = detail.removeprefix(f"{path}").removeprefix(": ")
        return cls(_STATES.get(reason, "damaged"), said, lost, **known)


def check_sources(
    sources: Mapping[object, Any], check: Callable[[Any], SourceCheck], *, probe: bool = True
) -> dict[object, SourceCheck]:
    """Look at every source, with a bar on stderr; keys are the caller's.

    Args:
        sources: what to look at; each has a ``path``.
        check: opens one; a function of a module, for it runs in another process.
        probe: open each, in at most eight processes; else tell only what is not there.
    """
    checks = dict.fromkeys(sources, SourceCheck())
    for key, source in sources.items():
        if not files.exists(source.path):
            lost = {WHOLE: (Reason.FILE_MISSING, missing(source.path))}
            checks[key] = SourceCheck.of(source.path, lost)
    there = {k: s for k, s in sources.items() if probe and checks[k].state == "fine"}
    if not there:  # no process is started for what is not there
        return checks
    with (
        progress_bar(total=len(there), desc="checking", unit="file") as bar,
        WorkerPool(min(_MAX_PROCESSES, jobs.cpu_count(), len(there)), jobs.become_worker) as pool,
    ):
        found = pool.map(check, there.values(), timeout=_TIMEOUT_S).result()
        for key, source in there.items():
            try:
                checks[key] = next(found)
            except Exception as error:  # whatever a library may raise, as extraction has it
                said = f"{type(error).__name__}: {first_line(error)}"
                reason = _ENDED.get(type(error), Reason.DECODE_ERROR)
                checks[key] = SourceCheck.of(source.path, {WHOLE: (reason, said)})
            bar.update()
    return checks


def check_source(source: Source) -> SourceCheck:
    """Open one source as extraction does; whatever is wrong with it is said, not raised."""
    path, size, stated, check = source.path, 0, 0, SourceCheck()
    with suppress(OSError):  # who opens it says why
        size = path.stat().st_size
        stated = stated_size(path, size)
    try:
        with OpenMedia("pyav") as media:
            if isinstance(source, FileSource):
                check = _check_file(source, media, whole=size - 1 <= stated <= size)
            elif isinstance(source, SensorSource):
                check = SourceCheck(sure=False)
            elif not isinstance(source, BoxSource):
                check = _measured(media.of(source))
    except MediaFaultError as fault:
        check = SourceCheck.of(path, {WHOLE: (fault.reason, fault.detail)})
    except (OSError, ValueError) as error:
        check = SourceCheck.of(path, {WHOLE: (Reason.DECODE_ERROR, str(error))})
    cut = f"{size:,} of {stated:,} bytes"
    return replace(check, state="truncated", detail=cut) if stated > size else check


def _check_file(source: FileSource, media: OpenMedia, *, whole: bool) -> SourceCheck:
    info = read_info(source.path, source.stream)
    ends = {kind: stream.end_s for kind, stream in info.streams.items()}
    begins = {kind: stream.delay_s for kind, stream in info.streams.items()}
    # FFmpeg opens a file whose end is missing as if it were whole.
    sure = whole and None not in ends.values() and _is_sound(source.path, info.streams.values())
    check = SourceCheck(ends=ends) if sure else _measured(media.of(source))
    return replace(check, begins=begins, fps=info.fps, sure=sure)


def _measured(reader: MediaReader) -> SourceCheck:
    """Tell where the streams of an open source really end."""
    ends: dict[str, float] = {}
    lost: dict[str, Outcome] = {}
    for kind in ("video", "audio"):
        try:
            ends[kind] = reader.stop_s if kind == "video" else reader.sound_span(16_000)[1]
        except MediaFaultError as fault:
            if fault.reason != Reason.NO_STREAM:
                lost[kind] = fault.reason, fault.detail
    return SourceCheck.of(reader.path, lost, ends=ends)


def _is_sound(path: Path, infos: Iterable[StreamInfo]) -> bool:
    """Tell whether a file's streams begin and end with what its header promises.

    Not so if they are encrypted, if a track is empty or ends early, and if space was set aside for
    a download that has not come.
    """
    with open_container(path) as container:
        streams = [container.streams[info.index] for info in infos]
        if any(stream.codec_context is None for stream in streams):
            return False
        for stream in streams:
            set_order(stream.codec_context) if stream.type == "audio" else prepare(stream)
        # Where each ends on its own time stamps.
        last = {s.index: (s.end_s or 0) + s.first_s - s.delay_s - _NEAR_S for s in infos}
        try:
            if not _begin(path, until_end(container.demux(streams)), set(last)):
                return False
            container.seek(int((min(last.values()) - _NEAR_S) * av.time_base))
            return _end(until_end(container.demux(streams)), last)
        except (av.error.FFmpegError, OSError, ValueError, MediaFaultError):
            return False


def _begin(path: Path, packets: Iterator[Any], waiting: set[int]) -> bool:
    """Tell whether a picture and a sound can be decoded from the first packets."""
    for packet in islice(packets, _PROBED):
        check_clear(packet, path)
        frames = packet.decode()
        if any(getattr(frame, "is_corrupt", False) for frame in frames):
            return False
        waiting -= {packet.stream_index} if frames else set()
        if not waiting:
            return True
    return False


def _end(packets: Iterator[Any], last: dict[int, float]) -> bool:
    """Tell whether the last packets lie where the header says that their streams end."""
    for packet in islice(packets, _PROBED_LAST):
        stamp = packet.dts if packet.pts is None else packet.pts
        if packet.size and not any(bytes(packet)[-_ZEROS:]):
            return False
        if packet.stream.type == "audio":  # pictures would ask for all since their key frame
            packet.decode()
        if stamp is not None and stamp * packet.time_base >= last.get(packet.stream_index, inf):
            del last[packet.stream_index]
    return not last
