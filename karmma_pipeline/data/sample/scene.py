"""What a clip shows and sounds like: the moving digit, its background, its tone.

T frames, S audio samples, H and W height and width in px.
"""

from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from pathlib import Path

import av
import cv2
import numpy as np
import numpy.typing as npt
from sklearn.datasets import load_digits

from karmma_pipeline import files

Pixels = npt.NDArray[np.uint8]
Waveform = npt.NDArray[np.float32]
Times = npt.NDArray[np.float64]

NOUNS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
VERBS = ("right", "down-right", "down", "down-left", "left", "up-left", "up", "up-right")
SAMPLE_RATE = 16_000

# The rests of division by 8 of the handwriting samples that a split shows.
_SHOWN = {"train": (1, 2, 3, 5, 6, 7), "val": (0, 4)}
# Where there is a test split: apart from it, and from what the demo's networks have learned from.
_APART = {
    "train": (1, 5),
    "val": (0,),
    "test": (4,),
    "networks": (2, 3, 6),
    "networks_val": (7,),
}
# Deviation of a digit's way from its direction in rad: 7 of 100 are nearer to the next one.
_SWERVE = 0.22
_ROWS, _COLUMNS = (697.0, 770.0, 852.0, 941.0), (1209.0, 1336.0, 1477.0)
_KEYPAD = "123456789*0#"


@cache
def _handwriting() -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    digits = load_digits()
    return (digits.images / 16).astype(np.float32), digits.target.astype(np.int64)


def handwriting(split: str, noun: int, *, apart: bool = False) -> npt.NDArray[np.int64]:
    """Return the indices of the handwriting samples of a digit; splits share none.

    Args:
        split: train or val; test, networks and networks_val are apart.
        noun: the digit.
        apart: train and val leave samples to a test split and to the demo's networks.
    """
    indices = np.flatnonzero(_handwriting()[1] == noun)
    return indices[np.isin(indices % 8, (_APART if apart else _SHOWN)[split])]


def tone_hz(noun: int) -> tuple[float, float]:
    """Return the two frequencies of a digit on a telephone's keypad (DTMF, ITU-T Q.23)."""
    key = _KEYPAD.index(str(noun))
    return _ROWS[key // 3], _COLUMNS[key % 3]


@dataclass(frozen=True)
class Action:
    """One clip of a video: which digit moves where, from when to when (seconds)."""

    verb: int
    noun: int
    handwriting: int
    start_s: float
    stop_s: float
    seed: int


def background(rng: np.random.Generator, height: int, width: int) -> npt.NDArray[np.float32]:
    """Return a smooth, rather dark random texture [2H, 2W, 3], larger than the frame."""
    shape = (2 * height, 2 * width)
    texture = np.zeros((*shape, 3), np.float32)
    for cells, weight in ((4, 0.5), (12, 0.3), (40, 0.2)):
        noise = rng.random((cells, cells, 3), dtype=np.float32)
        texture += weight * cv2.resize(noise, shape[::-1], interpolation=cv2.INTER_CUBIC)
    return np.clip(0.45 * texture, 0, 1)


def draw(
    times: Times, actions: list[Action], height: int, width: int, rng: np.random.Generator
) -> Pixels:
    """Return the frames [T, H, W, 3] that a camera sees at the given times (seconds)."""
    texture = background(rng, height, width)
    drift = rng.uniform(-3, 3, 2)  # px per second
    frames = np.empty((len(times), height, width, 3), np.float32)
    for frame, t in zip(frames, times, strict=True):
        y, x = np.array([height, width]) / 2 + drift * (t - times.mean())
        cv2.getRectSubPix(texture, (width, height), (x + width / 2, y + height / 2), patch=frame)
    for action in actions:
        shown = np.flatnonzero((times >= action.start_s) & (times < action.stop_s))
        _move_digit(frames, times, shown, action)
    frames += rng.normal(0, 0.06, frames.shape[:3]).astype(np.float32)[..., None]
    return (np.clip(frames, 0, 1) * 255).astype(np.uint8)


def _move_digit(
    frames: npt.NDArray[np.float32], times: Times, shown: npt.NDArray[np.int64], action: Action
) -> None:
    rng = np.random.default_rng(action.seed)
    height, width = frames.shape[1:3]
    side = height * rng.uniform(0.55, 0.7)
    glyph = _handwriting()[0][action.handwriting]
    turn, size = rng.uniform(-12, 12), side / 8
    angle = action.verb * np.pi / 4 + rng.normal(0, _SWERVE)
    direction = np.array([np.cos(angle), np.sin(angle)])
    travel = height * rng.uniform(0.22, 0.32)
    room = np.array([width, height]) - side - np.abs(direction) * travel
    corner = side / 2 + rng.uniform(0.3, 0.7, 2) * np.maximum(room, 0)
    start = corner + np.maximum(-direction, 0) * travel
    colour = rng.uniform(0.6, 1, 3)
    contrast = rng.uniform(0.6, 1)
    for index in shown:
        progress = (times[index] - action.start_s) / (action.stop_s - action.start_s)
        centre = start + direction * travel * progress
        matrix = cv2.getRotationMatrix2D((3.5, 3.5), turn, size)
        matrix[:, 2] += centre - 3.5
        alpha = contrast * cv2.warpAffine(glyph, matrix, (width, height))[..., None]
        frames[index] += alpha * (colour.astype(np.float32) - frames[index])


def sing(duration_s: float, actions: list[Action], rng: np.random.Generator) -> Waveform:
    """Return mono sound [S] in -1..1 at SAMPLE_RATE: each digit's tone somewhere in noise."""
    sound = rng.normal(0, 0.08, round(duration_s * SAMPLE_RATE)).astype(np.float32)
    for action in actions:
        own = np.random.default_rng((action.seed, 1))
        length = (action.stop_s - action.start_s) * own.uniform(0.3, 0.7)
        start = own.uniform(action.start_s, action.stop_s - length)
        first, last = round(start * SAMPLE_RATE), round((start + length) * SAMPLE_RATE)
        t = np.arange(last - first) / SAMPLE_RATE
        waves = [np.sin(2 * np.pi * (f * t + own.random())) for f in tone_hz(action.noun)]
        level = 10 ** (own.uniform(-42, -20) / 20)
        sound[first:last] += (level * np.hanning(len(t)) ** 0.25 * sum(waves)).astype(np.float32)
    return np.clip(sound, -1, 1)


#: Ticks per second of the video stream, fine enough for a variable frame rate.
CLOCK = 90_000


def write_video(
    path: Path, frames: Pixels, times: Times, fps: Fraction, sound: Waveform | None
) -> None:
    """Write frames uint8 [T, H, W, 3] shown at ``times`` (seconds), and sound [S] if any."""
    with (
        files.replacing(path) as temporary,
        av.open(str(temporary), "w", format="mp4", options={"fflags": "+bitexact"}) as container,
    ):
        height, width = frames.shape[1:3]
        stream = container.add_stream("libx264", rate=fps, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"preset": "ultrafast", "crf": "20", "threads": "1", "flags": "+bitexact"}
        stream.time_base = stream.codec_context.time_base = Fraction(1, CLOCK)
        track = None
        if sound is not None:
            track = container.add_stream("aac", rate=SAMPLE_RATE, layout="mono")
            track.codec_context.options = {"flags": "+bitexact"}
        for image, t in zip(frames, times, strict=True):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = round(t * CLOCK), Fraction(1, CLOCK)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if track is not None and sound is not None:
            samples = av.AudioFrame.from_ndarray(sound[None], format="fltp", layout="mono")
            samples.sample_rate, samples.pts = SAMPLE_RATE, 0
            container.mux(track.encode(samples))
            container.mux(track.encode())
