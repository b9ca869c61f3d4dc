"""A video with what was recognised written into its pictures, and its own sound."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import suppress
from fractions import Fraction
from itertools import chain
from operator import itemgetter
from pathlib import Path
from typing import Any

import av
import matplotlib
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from karmma_pipeline import files
from karmma_pipeline.data.sources import FileSource
from karmma_pipeline.errors import MediaError
from karmma_pipeline.extraction.media.interface import MediaFaultError
from karmma_pipeline.extraction.media.media_file import OpenMedia
from karmma_pipeline.jobs import StopFlag
from karmma_pipeline.modalities import NOTHING, Reason
from karmma_pipeline.recognition.output import Row, shown_spans

Picture = npt.NDArray[np.uint8]

_CLOCK = Fraction(1, 90_000)
_READABLE = 320  # px; narrower pictures are enlarged
_DARK, _LIGHT, _SEEN, _ABSENT = (16, 18, 22), (240, 240, 240), (46, 200, 110), (120, 120, 120)


def has_pictures(source: Path) -> bool:
    """Tell whether a file has any; one that cannot be read counts as if it had."""
    with OpenMedia() as media:
        try:
            media.of(FileSource(source)).frame_starts  # noqa: B018  (it is looked up)
        except MediaFaultError as fault:
            return fault.reason is not Reason.NO_STREAM
    return True


def write_overlay(source: Path, rows: Sequence[Row], out: Path, stop: StopFlag) -> None:
    """Write an MP4 (H.264) of a video from the first to the last row's end.

    Pictures keep their own times, also where their rate varies.

    Args:
        source: the video.
        rows: its predictions, ascending in time.
        out: the file; replaced as a whole, or not at all.
        stop: looked at between pictures.

    Raises:
        MediaError: the video cannot be read again, or holds no pictures.
        StoppedError: a stop was asked for.
    """
    spans = shown_spans(rows)
    try:
        with files.replacing(out) as temporary, OpenMedia() as media:
            reader = media.of(FileSource(source))
            starts = reader.frame_starts
            wanted = np.flatnonzero((starts >= spans[0][0]) & (starts < spans[-1][1]))
            if not len(wanted):
                raise MediaError(f"{source}: has no frames between {spans[0][0]:.2f} and "
                    f"{spans[-1][1]:.2f} s.")  # fmt: skip
            with av.open(temporary, "w", format="mp4") as file:
                pictures = (
                    (float(starts[number]), _drawn(frame, rows, spans, float(starts[number])))
                    for number, frame in reader.decode(wanted)
                )
                _encode(
                    file, _stopping(pictures, stop), source, float(starts[wanted[0]]), spans[-1][1]
                )
    except MediaFaultError as fault:
        raise MediaError(f"{source}: {fault.reason.label}: {fault.hint}") from None


def _stopping(
    pictures: Iterator[tuple[float, Picture]], stop: StopFlag
) -> Iterator[tuple[float, Picture]]:
    for item in pictures:
        stop.check("the predictions are written, but this video is not")
        yield item


def _encode(
    file: Any,
    pictures: Iterator[tuple[float, Picture]],
    source: Path,
    first_s: float,
    stop_s: float,
) -> None:
    first = next(pictures)  # its size is the video's
    height, width = first[1].shape[:2]
    video = file.add_stream("libx264", rate=30, options={"crf": "20", "preset": "veryfast"})
    video.width, video.height, video.pix_fmt, video.time_base = width, height, "yuv420p", _CLOCK
    video.codec_context.time_base = _CLOCK
    with suppress(av.error.FFmpegError, IndexError, ValueError):
        _copy_sound(file, source, first_s, stop_s)  # sound that MP4 cannot hold is left out
    for moment, picture in chain([first], pictures):
        frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
        frame.pts, frame.time_base = round((moment - first_s) / _CLOCK), _CLOCK
        file.mux(video.encode(frame))
    file.mux(video.encode())


def _copy_sound(file: Any, source: Path, first_s: float, stop_s: float) -> None:
    """Copy the packets of the sound as they are; nothing is encoded anew."""
    with av.open(source, metadata_errors="ignore") as original:
        track = original.streams.audio[0]
        copy = file.add_stream_from_template(track)
        clock = track.time_base or _CLOCK
        begin = round(first_s / clock)
        for packet in original.demux(track):
            if packet.pts is None or packet.dts is None or packet.pts < begin:
                continue
            if packet.pts * clock >= stop_s:
                break
            packet.pts, packet.dts, packet.stream = packet.pts - begin, packet.dts - begin, copy
            file.mux(packet)


def _drawn(
    frame: Picture, rows: Sequence[Row], spans: Sequence[tuple[float, float]], moment: float
) -> Picture:
    """Return a picture with a band below it: H.264 takes even sizes only."""
    # Between windows that leave gaps, what was said last.
    row = rows[max(0, bisect_right(spans, moment, key=itemgetter(0)) - 1)]
    scale = -(-_READABLE // frame.shape[1])  # text on a thumbnail cannot be read
    frame = frame.repeat(scale, axis=0).repeat(scale, axis=1)
    height, width = frame.shape[0] // 2 * 2, frame.shape[1] // 2 * 2
    size = width // 28
    lines = _lines(row)
    band = (round(1.5 * size) * (len(lines) + 1) + size) // 2 * 2
    canvas = Image.new("RGB", (width, height + band), _DARK)
    canvas.paste(Image.fromarray(frame[:height, :width]), (0, 0))
    draw, font = ImageDraw.Draw(canvas), _font(size)
    y = height + size // 2
    for text, probability in lines:
        draw.rectangle(
            (0, y, round(probability * width), y + round(1.3 * size)), fill=(38, 70, 104)
        )
        draw.text((size // 2, y), _fitting(text, font, width - size), fill=_LIGHT, font=font)
        y += round(1.5 * size)
    x = size // 2
    for modality in (*row.seen, *row.reasons):
        colour = _SEEN if modality in row.seen else _ABSENT
        draw.ellipse((x, y + size // 4, x + size // 2, y + 3 * size // 4), fill=colour)
        draw.text((x + size, y), modality, fill=colour, font=font)
        x += 2 * size + round(draw.textlength(modality, font=font))
    return np.asarray(canvas)


def _lines(row: Row) -> list[tuple[str, float]]:
    """Return a line per head with the probability of its best class, and the truth if known."""
    if not row.top:
        return [(NOTHING, 0.0)]
    lines = []
    for head, guesses in row.top.items():
        best, truth = guesses[0], row.truth.get(head)
        said = "" if truth is None else f"  (true: {truth})"
        lines.append((f"{head}: {best.name} {best.probability:.2f}{said}", best.probability))
    return lines


def _fitting(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """Return a text, shortened in its middle where it is wider than so many pixels."""
    kept = len(text)
    shown = text
    while font.getlength(shown) > width and kept > 2:
        kept -= 1
        shown = f"{text[: kept // 2]}…{text[len(text) - kept // 2 :]}"
    return shown


def _font(size: int) -> ImageFont.FreeTypeFont:
    # matplotlib brings a font with letters of most languages; systems without one are common.
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    return ImageFont.truetype(path, size)
