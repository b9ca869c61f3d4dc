"""Opens media files so that they cannot make us open others, and looks at their streams.

The clock of a file is a player's: zero where the first of its streams starts.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
from av.stream import Disposition

from karmma_pipeline.extraction.media.errors import MediaFaultError
from karmma_pipeline.modalities import Reason

_FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,wav,flac,mp3,ogg,aac"
"""Formats that hold media themselves; playlists, which open other files, are not among them."""

_PLAYLIST = re.compile(
    rb"(\xef\xbb\xbf)?\s*(#EXTM3U|ffconcat|<\?xml|<MPD|<smil|\[playlist\]|v=0\s)", re.IGNORECASE
)
"""How playlists begin: decord brings an older FFmpeg, which may know one where PyAV's does not."""


@dataclass(frozen=True)
class StreamFacts:
    """One stream: its number, its first time stamp in seconds, its start on the file's clock."""

    index: int
    first_s: float
    delay_s: float
    rate: int | None
    default: bool


@dataclass(frozen=True)
class Probe:
    """What a file holds; None where it has no such stream. ``indexed``: seeks are exact."""

    video: StreamFacts | None
    audio: StreamFacts | None
    indexed: bool


def open_container(path: Path) -> "av.container.InputContainer":
    """Open a file with PyAV; close it by ``with``.

    Raises:
        MediaFaultError: it is missing, refused as a playlist, or no media file.
    """
    if not path.is_file():
        raise MediaFaultError(Reason.FILE_MISSING, str(path))
    options = {"format_whitelist": _FORMATS, "protocol_whitelist": "file"}
    try:
        with path.open("rb") as file:
            if _PLAYLIST.match(file.read(4096)):
                raise MediaFaultError(Reason.REFUSED, f"{path}: a list of files, not a video")
        return av.open(f"file:{path.absolute()}", options=options)
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise MediaFaultError(Reason.DECODE_ERROR, f"{path}: {error}") from None


def probe(path: Path, stream: int | None = None) -> Probe:
    """Look at the default streams of a file, or at the named one alone; the clock is the file's.

    Raises:
        MediaFaultError: see `open_container`.
    """
    with open_container(path) as container:
        if any(s.codec_context is None for s in container.streams.video):
            raise MediaFaultError(Reason.DECODE_ERROR, f"{path}: damaged header")
        best = {kind: container.streams.best(kind) for kind in ("video", "audio")}
        chosen: dict[str, Any] = dict(best)
        if stream is not None:
            if not 0 <= stream < len(container.streams):
                raise MediaFaultError(Reason.NO_STREAM, f"{path}: no stream {stream}")
            named = container.streams[stream]
            chosen = {named.type: named}
        zero = _zero_s(container)

        def facts(kind: str) -> StreamFacts | None:
            found = chosen.get(kind)
            if found is None or _is_cover(found):
                return None
            first = _first_s(found)
            # Sound before zero is the encoder's run-in, which decoders leave out.
            delay = max(0.0, first) - zero
            known = kind == "audio" and found.codec_context is not None
            rate = found.sample_rate if known else None
            return StreamFacts(found.index, first, delay, rate, found is best[kind])

        names = set(container.format.name.split(","))
        return Probe(facts("video"), facts("audio"), bool(names & {"mp4", "matroska"}))


def _is_cover(stream: Any) -> bool:
    """Tell whether a stream is the cover picture of a sound file."""
    return stream.type == "video" and bool(stream.disposition & Disposition.attached_pic)


def _zero_s(container: Any) -> float:
    """Return when the first picture or sound of a file starts, on its own time stamps."""
    streams = [*container.streams.video, *container.streams.audio]
    firsts = [_first_s(s) for s in streams if s.start_time is not None and not _is_cover(s)]
    return min((max(0.0, first) for first in firsts), default=0.0)


def _first_s(stream: Any) -> float:
    return float((stream.start_time or 0) * (stream.time_base or 0))
