"""Opens media files safely, without following references, and inspects their streams.

The clock of a file is a player's: zero where the first of its streams starts.
"""

import errno
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
from av.stream import Disposition

from karmma_pipeline import files
from karmma_pipeline.data.datasets.listing import missing
from karmma_pipeline.extraction.media.interface import MediaFaultError
from karmma_pipeline.modalities import NO_MEDIA, Reason

# Formats that hold media themselves; playlists, which open other files, are not among them.
_FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,asf,asf_o,flv,rm,mxf,gxf,nut,dv,wtv,"
    "ivf,obu,h264,hevc,vvc,m4v,mpegvideo,mjpeg,mjpeg_2000,vc1,dirac,yuv4mpegpipe,nsv,nuv,amv,r3d,"
    "wav,w64,aiff,au,caf,flac,mp3,ogg,aac,ac3,eac3,dts,dtshd,truehd,mlp,amr,ape,tta,wv,mpc,mpc8,"
    "oma,voc,tak,shn,dsf,gif,apng"
)

# How playlists begin: decord brings an older FFmpeg, which may know one where PyAV's does not.
_PLAYLIST = re.compile(
    rb"(\xef\xbb\xbf)?\s*(#EXTM3U|ffconcat|<\?xml|<MPD|<smil|\[playlist\]|v=0\s)", re.IGNORECASE
)

# How files begin that often lie where a video should, see `NO_MEDIA`.
_BEGINNINGS = {
    re.compile(rb"$"): "an empty file",
    re.compile(rb"\xff\xd8\xff|\x89PNG|RIFF.{4}WEBP|II\*\0|MM\0\*|BM", re.DOTALL): "an image",
    re.compile(rb"\x1f\x8b|PK\x03\x04|7z\xbc\xaf|Rar!"): "an archive",
    re.compile(rb"\s*<(!doctype|html|\?xml)", re.I): "a web page",
    re.compile(rb"version https://git-lfs"): "a Git LFS pointer",
    re.compile(rb"\0{64}"): "all zeros",
}


@dataclass(frozen=True)
class StreamInfo:
    """One stream.

    Attributes:
        index: its number in the file.
        first_s: its first time stamp, seconds.
        delay_s: where it starts on the file's clock, seconds.
        rate: of sound, Hz.
        default: it is the one that a player would take.
        alone: the file has no other.
        tick_s: unit of its time stamps, seconds.
        claimed: the file says that it holds something: a number of packets, or a length.
        end_s: where it ends on the file's clock, as the headers state it; None: they do not.
    """

    index: int
    first_s: float
    delay_s: float
    rate: int | None
    default: bool
    alone: bool = False
    tick_s: float = 1.0
    claimed: bool = True
    end_s: float | None = None


@dataclass(frozen=True)
class MediaInfo:
    """What a file holds and says of itself.

    Attributes:
        streams: ``video`` and ``audio``, where it has them; the cover of a sound file is no video.
        fps: mean frames per second of its default video stream; None if it does not say.
    """

    streams: Mapping[str, StreamInfo]
    fps: float | None = None


def open_container(path: Path) -> "av.container.InputContainer":
    """Open a file with PyAV; close it by ``with``.

    Raises:
        MediaFaultError: it is missing, refused as a playlist, or no media file.
    """
    if not (files.exists(path) and path.is_file()):
        raise MediaFaultError(Reason.FILE_MISSING, missing(path))
    # FFmpeg tells formats by content and not by name: a playlist called clip.mp4 would be opened
    # as one, and could name any file or address. Both lists are closed; `file:` keeps a name with
    # a colon in it from being taken for a protocol.
    options = {"format_whitelist": _FORMATS, "protocol_whitelist": "file"}
    try:
        with path.open("rb") as file:
            if _PLAYLIST.match(file.read(4096)):
                raise MediaFaultError(Reason.UNSAFE_FILE, f"{path}: a playlist, not a video")
        # Titles in the character set of the recorder's country are no reason to refuse a video.
        name = f"file:{path.absolute()}"
        return av.open(name, options=options, metadata_errors="replace")
    except PermissionError:
        detail = f"{path}: not readable: {NO_MEDIA['not readable']}"
        raise MediaFaultError(Reason.DECODE_ERROR, detail) from None
    except (av.error.FFmpegError, OSError, ValueError) as error:
        # Without the path, which FFmpeg repeats: long ones would be all that is left of a detail.
        what, said = _what_else(path), getattr(error, "strerror", None) or str(error)
        if getattr(error, "errno", 0) == errno.EINVAL:  # FFmpeg knows it, but it is not in our list
            said = f"an unsupported format ({said})"
        detail = f"{what}: {NO_MEDIA[what]} ({said})" if what else said
        raise MediaFaultError(Reason.DECODE_ERROR, f"{path}: {detail}") from None


def _what_else(path: Path) -> str:
    """Return what a file is that is no media file, a key of `NO_MEDIA`; empty if unknown."""
    try:
        with path.open("rb") as file:
            begin = file.read(64)
    except OSError:
        return ""
    return next((what for mark, what in _BEGINNINGS.items() if mark.match(begin)), "")


def read_info(path: Path, stream: int | None = None) -> MediaInfo:
    """Look at the default streams of a file, or at the named one alone; the clock is the file's.

    Raises:
        MediaFaultError: see `open_container`.
    """
    with open_container(path) as container:
        # A video stream without a codec context has a header that no decoder understands.
        if any(s.codec_context is None for s in container.streams.video):
            raise MediaFaultError(Reason.DECODE_ERROR, f"{path}: damaged header")
        best = {kind: container.streams.best(kind) for kind in ("video", "audio")}
        chosen: dict[str, Any] = dict(best)
        if stream is not None:
            if not 0 <= stream < len(container.streams):
                raise MediaFaultError(Reason.NO_STREAM, f"{path}: no stream {stream}")
            named = container.streams[stream]
            chosen = {named.type: named}
        zero_s = _zero_s(container)
        rate = getattr(best["video"], "average_rate", None)
        streams = {
            kind: _stream_info(chosen[kind], zero_s, default)
            for kind, default in best.items()
            if chosen.get(kind) is not None and not _is_cover(chosen[kind])
        }
        return MediaInfo(streams, float(rate) if rate else None)


def _stream_info(stream: Any, zero_s: float, default: Any) -> StreamInfo:
    known = stream.type == "audio" and stream.codec_context is not None
    # FFmpeg gives a stream without a length of its own that of the file, which others may have.
    alone = len(stream.container.streams) == 1
    return StreamInfo(
        stream.index,
        _first_s(stream),
        delay_s=_start_s(stream) - zero_s,
        rate=stream.sample_rate if known else None,
        default=stream is default,
        alone=alone,
        tick_s=float(stream.time_base or 1),
        claimed=bool(stream.frames or (alone and stream.duration)),
        end_s=_end_s(stream, zero_s, stream.container.duration),
    )


def _end_s(stream: Any, zero_s: float, whole: int | None) -> float | None:
    """Return where a stream ends on the file's clock; where only the file says, when that ends."""
    if stream.duration is not None:
        return _first_s(stream) + float(stream.duration * stream.time_base) - zero_s
    return None if whole is None else whole / av.time_base


def _is_cover(stream: Any) -> bool:
    """Tell whether a stream is the cover picture of a sound file."""
    return stream.type == "video" and bool(stream.disposition & Disposition.attached_pic)


def _zero_s(container: Any) -> float:
    """Return when the first picture or sound of a file starts, on its own time stamps.

    Transport streams and edit lists let time stamps begin anywhere; annotations count from what
    a player shows first. A cover has no time of its own and says nothing.
    """
    streams = [*container.streams.video, *container.streams.audio]
    firsts = [_start_s(s) for s in streams if s.start_time is not None and not _is_cover(s)]
    return min(firsts, default=0.0)


def _start_s(stream: Any) -> float:
    """Return when the first picture is shown, or the first sound heard."""
    # An encoder puts some samples of run-in before zero (priming); decoders leave them out, so
    # that sound with a negative first time stamp starts at zero.
    first_s = _first_s(stream)
    return max(0.0, first_s) if stream.type == "audio" else first_s


def _first_s(stream: Any) -> float:
    return float((stream.start_time or 0) * (stream.time_base or 0))
