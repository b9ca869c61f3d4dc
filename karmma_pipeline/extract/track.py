"""The sound track of a media file as one array, in its place on the file's clock.

PyAV decodes it: decord's, measured against PyAV's at three rates, put in samples between packets
(correlation 0.97) and took longer. Channels are averaged, as ``ffmpeg -ac 1`` does for stereo;
soxr resamples. S samples.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt
import soxr

from karmma_pipeline.extract.container import StreamFacts, open_container
from karmma_pipeline.extract.faults import MediaFaultError
from karmma_pipeline.extract.second_decoder import until_end
from karmma_pipeline.modalities import Reason

Sound = npt.NDArray[np.float32]
Span = tuple[float, float]

QUALITY = "HQ"
RESAMPLING = f"channels averaged, soxr {QUALITY}"
"""How tracks are brought to the rate of the recipe, as stores record it."""

LONGEST_S = 48 * 3600
"""Seconds of sound beyond which a track is absurd."""

_GAP_S = 0.05
"""A hole in a track that is longer is silence; a shorter one is rounding of time stamps."""

_CHUNK_S = 4
"""Seconds that are resampled at a time."""


def read_track(path: Path, facts: StreamFacts, rate: int) -> tuple[Sound, tuple[Span, ...]]:
    """Return a sound track, mono [S] at ``rate`` Hz, and its damaged spans.

    Spans are seconds from the track's start; there the track is silent.

    Raises:
        MediaFaultError: no sound in it can be read, or it claims an absurd length.
    """
    damaged: list[Span] = []
    native = facts.rate or rate
    stream = soxr.ResampleStream(native, rate, 1, dtype="float32", quality=QUALITY)
    pieces, waiting, length = [], [], 0
    for piece in _pieces(path, facts, native, damaged):
        waiting.append(piece)
        length += len(piece)
        if length >= _CHUNK_S * native:
            pieces.append(stream.resample_chunk(np.concatenate(waiting)))
            waiting, length = [], 0
    if not pieces and not length:
        raise MediaFaultError(Reason.DECODE_ERROR, f"{path}: no sound in its track")
    waiting.append(np.zeros(0, np.float32))
    pieces.append(stream.resample_chunk(np.concatenate(waiting), last=True))
    return np.concatenate(pieces), tuple(damaged)


def _pieces(path: Path, facts: StreamFacts, native: int, damaged: list[Span]) -> Iterator[Sound]:
    """Yield the track bit by bit at its own rate, with silence where it has holes."""
    zero_s, length = max(0.0, facts.first_s), 0
    with open_container(path) as container:
        stream = container.streams[facts.index]
        if stream.codec_context is None:
            raise MediaFaultError(Reason.DECODE_ERROR, f"{path}: sound in an unknown codec")
        for packet in until_end(container.demux(stream)):
            try:
                frames = packet.decode()
            except (av.error.FFmpegError, ValueError):
                at = float((packet.pts or 0) * packet.time_base) - zero_s
                damaged.append((at, at + float((packet.duration or 0) * packet.time_base)))
                continue
            for frame in frames:
                start_s = length / native if frame.time is None else frame.time - zero_s
                if start_s > LONGEST_S or frame.sample_rate != native:
                    raise MediaFaultError(Reason.DECODE_ERROR, f"{path}: damaged sound")
                hole = round(start_s * native) - length
                if hole > _GAP_S * native:
                    yield np.zeros(hole, np.float32)
                    length += hole
                yield _mono(frame)
                length += frame.samples


def _mono(frame: Any) -> Sound:
    samples = frame.to_ndarray()
    channels = len(frame.layout.channels)
    if not frame.format.is_planar:
        samples = samples.reshape(-1, channels).T
    return as_float(samples).mean(axis=0) if channels > 1 else as_float(samples)[0]


def as_float(samples: npt.NDArray[Any]) -> Sound:
    """Return samples of any type as float32, full scale at +-1."""
    if samples.dtype.kind == "f":
        return samples.astype(np.float32, copy=False)
    full = float(2 ** (8 * samples.dtype.itemsize - 1))
    zero = full if samples.dtype.kind == "u" else 0.0
    return ((samples - zero) / full).astype(np.float32)


def cut(track: Sound, start_s: float, length_s: float, rate: int) -> Sound:
    """Return a window of a track [S], with silence where the track does not reach."""
    first, count = round(start_s * rate), max(1, round(length_s * rate))
    window = np.zeros(count, np.float32)
    low, high = max(first, 0), min(first + count, len(track))
    if high > low:
        window[low - first : high - first] = track[low:high]
    return window
