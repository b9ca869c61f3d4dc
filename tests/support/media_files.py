"""Small media files with a frame counter and a timed click burnt in."""

import struct
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NoReturn

import av
import cv2
import numpy as np

CLOCK = 90_000
RATE = 16_000
BITS = 12
LONG_BITS, LONG_RATE = 17, 8_000
Maker = Callable[..., Path]


def counter_picture(number: int) -> np.ndarray:
    """A 48x96 picture that shows a number as 12 black or white blocks."""
    bits = [(number >> i) & 1 for i in range(BITS)]
    row = np.repeat(np.array(bits, np.uint8) * 220 + 16, 8)
    return np.repeat(np.tile(row, (48, 1))[..., None], 3, axis=2)


def read_counter(picture: np.ndarray) -> int:
    gray = picture[8:40].mean(axis=(0, 2)).reshape(BITS, 8)[:, 2:6].mean(axis=1)
    return sum(1 << i for i, level in enumerate(gray) if level > 128)


def panned(px: float) -> np.ndarray:
    """A 48x96 cut out of a texture that has moved to the right."""
    noise = np.random.default_rng(0).integers(0, 256, (16, 96, 3), np.uint8)
    texture = cv2.resize(noise, (384, 64), interpolation=cv2.INTER_CUBIC)
    moved = cv2.warpAffine(texture, np.array([[1, 0, px], [0, 1, 0]], np.float32), (384, 64))
    return np.ascontiguousarray(moved[8:56, 200:296])


def write_video(
    path: Path,
    times: Sequence[float] | None = None,
    seconds: float = 2.0,
    fps: float = 25,
    click_s: float | None = None,
    sound: bool = True,
    video: bool = True,
    video_delay_s: float = 0.0,
    pan_px_s: float | None = None,
    audio_delay_s: float = 0.0,
    codec: str = "libx264",
    index_first: bool = False,
    size: tuple[int, int] = (96, 48),
) -> Path:
    """Write pictures at ``times`` or ``fps``: a counter, or a texture that moves to the right."""
    shown = np.arange(round(seconds * fps)) / fps if times is None else np.asarray(times)
    clock = CLOCK if codec.startswith("lib") else 25  # older codecs count frames
    options = {"movflags": "faststart"} if index_first else {}
    with av.open(str(path), "w", options=options) as container:
        stream: Any = None
        track = None
        if video:
            stream = container.add_stream(codec, rate=25)
            stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
            stream.time_base = stream.codec_context.time_base = Fraction(1, clock)
        if sound:
            track = container.add_stream("aac", rate=RATE, layout="mono")
        if stream is not None:
            for number, t in enumerate(shown):
                picture = counter_picture(number) if pan_px_s is None else panned(pan_px_s * t)
                scaled: Any = cv2.resize(picture, size, interpolation=cv2.INTER_NEAREST)
                frame = av.VideoFrame.from_ndarray(scaled, format="rgb24")
                frame.pts = round((t + video_delay_s) * clock)
                frame.time_base = Fraction(1, clock)
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        if track is not None:
            wave = np.zeros((1, round((seconds + video_delay_s) * RATE)), np.float32)
            if click_s is not None:
                at = round(click_s * RATE)
                wave[0, at : at + 80] = np.sin(np.arange(80) * 1.2)
            samples = av.AudioFrame.from_ndarray(wave, format="fltp", layout="mono")
            samples.sample_rate, samples.pts = RATE, round(audio_delay_s * RATE)
            container.mux(track.encode(samples))
            container.mux(track.encode())
    return path


def long_video(path: Path, minutes: int, rate: Fraction, click_s: float) -> Path:
    """Write many tiny pictures fast: the number is 17 bright or dark columns of 4 px."""
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("mpeg4", rate=rate)
        track: Any = container.add_stream("aac", rate=LONG_RATE, layout="mono")
        stream.width, stream.height, stream.pix_fmt = 4 * LONG_BITS + 12, 16, "yuv420p"
        stream.gop_size, stream.bit_rate = 120, 200_000
        count = int(minutes * 60 * rate)
        bits = (np.arange(count)[:, None] >> np.arange(LONG_BITS)) & 1
        rows = np.pad(np.repeat(bits.astype(np.uint8) * 200 + 20, 4, axis=1), ((0, 0), (0, 12)))
        picture = np.full((24, stream.width), 128, np.uint8)
        for row in rows:
            picture[:16] = row
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="yuv420p")))
        container.mux(stream.encode())
        wave = np.zeros((1, minutes * 60 * LONG_RATE), np.float32)
        at = round(click_s * LONG_RATE)
        wave[0, at : at + 40] = np.sin(np.arange(40) * 1.2)
        samples = av.AudioFrame.from_ndarray(wave, format="fltp", layout="mono")
        samples.sample_rate, samples.pts = LONG_RATE, 0
        container.mux(track.encode(samples))
        container.mux(track.encode())
    return path


def read_long_counter(picture: np.ndarray) -> int:
    gray = picture[4:12, : 4 * LONG_BITS].mean(axis=(0, 2)).reshape(LONG_BITS, 4).mean(axis=1)
    return sum(1 << i for i, level in enumerate(gray) if level > 128)


_UPRIGHT = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
_MATRICES = {  # x' = a x + c y, y' = b x + d y
    "90": (0, 1, -1, 0),
    "180": (-1, 0, 0, -1),
    "270": (0, -1, 1, 0),
    "hflip": (-1, 0, 0, 1),
    "vflip": (1, 0, 0, -1),
    "transpose": (0, 1, 1, 0),
    "anti": (0, -1, -1, 0),
}


def turn(path: Path) -> Path:
    """Flag an MP4 as filmed upright: players turn it by 90 degrees clockwise."""
    return mirror(path, "90")


def mirror(path: Path, way: str) -> Path:
    """Write a display matrix into an MP4: players turn or mirror its pictures."""
    data = path.read_bytes()
    at = data.index(_UPRIGHT, data.index(b"tkhd"))
    a, b, c, d = (value << 16 for value in _MATRICES[way])
    matrix = struct.pack(">9i", a, b, 0, c, d, 0, 48 << 16, 0, 1 << 30)
    path.write_bytes(data[:at] + matrix + data[at + 36 :])
    return path


def over_report(path: Path) -> Path:
    """Make an MP4's headers claim ten times its length."""
    data = bytearray(path.read_bytes())
    for box, offset in ((b"mvhd", 20), (b"mdhd", 20), (b"tkhd", 24)):
        at = data.find(box)
        while at >= 0:
            place = slice(at + offset, at + offset + 4)
            data[place] = struct.pack(">I", 10 * struct.unpack(">I", data[place])[0])
            at = data.find(box, at + 4)
    path.write_bytes(data)
    return path


def write_frames(folder: Path, numbers: Iterable[int], name: str = "frame_{:010d}.jpg") -> Path:
    """Write counter pictures as JPEG files under their numbers."""
    for number in numbers:
        path = folder / name.format(number)
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), counter_picture(number), [cv2.IMWRITE_JPEG_QUALITY, 95])
    return folder


def write_flow(
    folder: Path, numbers: Iterable[int], px: tuple[float, float], bound_px: float
) -> Path:
    """Write u and v pictures of a motion that is the same everywhere, 48x96."""
    for number in numbers:
        for plane, value in zip("uv", px, strict=True):
            byte = round(255 * (value + bound_px) / (2 * bound_px))
            path = folder / plane / f"frame_{number:010d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(path), np.full((48, 96), byte, np.uint8))
    return folder


def pack(folder: Path, tar: Path) -> Path:
    """Put a folder into a tar as the official ones are: members start with ``./``."""
    with tarfile.open(tar, "w") as archive:
        archive.add(folder, ".")
    return tar


def remux(
    source: Path,
    target: Path,
    options: dict[str, str] | None = None,
    keep: Callable[[str, int], bool] = lambda kind, number: True,
) -> Path:
    """Copy packets into another container; ``keep`` tells by kind and number which."""
    seen: Counter[str] = Counter()
    with av.open(str(source)) as read, av.open(str(target), "w", options=options or {}) as write:
        own = {s.index: write.add_stream_from_template(s) for s in read.streams}
        for packet in read.demux():
            if packet.dts is not None:
                kind = packet.stream.type
                seen[kind] += 1
                packet.stream = own[packet.stream.index]
                if keep(kind, seen[kind] - 1):
                    write.mux(packet)
    return target


def write_sound(path: Path, codec: str, seconds: float = 2.0) -> Path:
    """Write noise as a file of nothing but sound."""
    noise = np.random.default_rng(0).normal(0, 0.1, (1, round(seconds * RATE)))
    with av.open(str(path), "w", format={".aac": "adts"}.get(path.suffix)) as container:
        track: Any = container.add_stream(codec, rate=RATE, layout="mono")
        samples = av.AudioFrame.from_ndarray(noise.astype(np.float32), format="fltp", layout="mono")
        samples.sample_rate, samples.pts = RATE, 0
        container.mux(track.encode(samples))
        container.mux(track.encode())
    return path


def broken_library(source: object) -> NoReturn:
    """Look at a source as a library with a bug does; other processes find it by this module."""
    raise IndexError("list index out of range")
