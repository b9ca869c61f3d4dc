"""Compares random clips of many kinds of files with FFmpeg's own linear scan of them.

Files are made by the ``ffmpeg`` program over a grid of codec, container, GOP structure, cut, edit
list, frame rate, rotation and streams. The pictures that reach a network must be those that
``ffmpeg -fps_mode passthrough`` writes, at the times that ``ffprobe -show_frames`` states. From the
repository: ``PYTHONPATH=.:tests python -m fuzz.seek [--clips 30] [--seed 0] [--only avi]``.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import av
import numpy as np
from support.media_files import counter_picture, mirror, panned

from karmma_pipeline.data.manifest import Clip
from karmma_pipeline.data.sources import FileSource
from karmma_pipeline.extraction.decode.worker import decode_clips
from karmma_pipeline.extraction.recipe import Audio, Flow, Sampling
from karmma_pipeline.extraction.types import ROUNDING_S, DecodeSettings, InputSpec
from karmma_pipeline.models.backbones import FrameTransform

SIZE = 96
FRAMES = 300
MOMENTS = 6
# Mean difference up to which two pictures are one: versions convert colours differently.
SAME = 10.0

VIEW = FrameTransform(resize=(SIZE, SIZE), crop=(SIZE, SIZE), mean=(0, 0, 0), std=(1, 1, 1))
RGB = InputSpec("rgb", MOMENTS, VIEW, (SIZE, SIZE), per_frame=True)

X264 = ["-c:v", "libx264", "-preset", "veryfast"]
X265 = ["-c:v", "libx265", "-preset", "ultrafast"]
QUIET = "log-level=error:"
CODECS: dict[str, list[str]] = {
    "h264": X264,
    "h264_gop25": [*X264, "-g", "25"],
    "h264_bf0": [*X264, "-bf", "0", "-g", "50"],
    "h264_open": [*X264, "-x264-params", "open-gop=1:keyint=40:bframes=3:b-pyramid=normal"],
    "h264_refresh": [*X264, "-x264-params", "intra-refresh=1:keyint=40"],
    "h264_intra": [*X264, "-g", "1"],
    "h264_fields": [*X264, "-g", "40", "-flags", "+ildct+ilme", "-x264-params", "tff=1"],
    "h264_slices": [*X264, "-g", "30", "-x264-params", "slices=3:ref=4:bframes=5:b-adapt=2"],
    "hevc": [*X265, "-x265-params", QUIET],
    "hevc_open": [*X265, "-x265-params", QUIET + "keyint=40:open-gop=1:bframes=4"],
    "hevc_closed": [*X265, "-x265-params", QUIET + "keyint=40:open-gop=0"],
    "hevc_bf0": [*X265, "-x265-params", QUIET + "keyint=40:bframes=0"],
    "mpeg4": ["-c:v", "mpeg4", "-g", "40", "-bf", "0", "-q:v", "3"],
    "mpeg4_bf": ["-c:v", "mpeg4", "-g", "40", "-bf", "2", "-q:v", "3"],
    "mpeg2": ["-c:v", "mpeg2video", "-g", "15", "-bf", "2", "-q:v", "3"],
    "mpeg2_bf0": ["-c:v", "mpeg2video", "-g", "30", "-bf", "0", "-q:v", "3"],
    "mpeg1": ["-c:v", "mpeg1video", "-g", "15", "-bf", "2", "-q:v", "3"],
    "vp8": [
        "-c:v",
        "libvpx",
        "-g",
        "40",
        "-auto-alt-ref",
        "1",
        "-lag-in-frames",
        "16",
        "-b:v",
        "1M",
    ],
    "vp9": ["-c:v", "libvpx-vp9", "-g", "40", "-cpu-used", "8", "-b:v", "1M"],
    "av1": ["-c:v", "libsvtav1", "-g", "40", "-preset", "12", "-svtav1-params", "scd=0"],
    "mjpeg": ["-c:v", "mjpeg", "-q:v", "3"],
    "wmv2": ["-c:v", "wmv2", "-g", "30", "-q:v", "3"],
    "msmpeg4": ["-c:v", "msmpeg4v2", "-g", "30", "-q:v", "3"],
    "flv1": ["-c:v", "flv1", "-g", "30", "-q:v", "3"],
    "theora": ["-c:v", "libtheora", "-g", "30", "-q:v", "8"],
    "prores": ["-c:v", "prores_ks"],
    "ffv1": ["-c:v", "ffv1", "-g", "20"],
    "rv20": ["-c:v", "rv20", "-g", "30", "-q:v", "3"],
}
CONTAINERS: dict[str, list[str]] = {
    "h264": ["mp4", "mkv", "avi", "ts", "mpg", "flv", "mov", "nut", "h264", "asf", "frag.mp4"],
    "h264_gop25": ["mp4", "mkv", "avi", "ts", "m2ts", "frag.mp4"],
    "h264_bf0": ["mp4", "avi", "ts", "flv", "h264"],
    "h264_open": ["mp4", "mkv", "avi", "ts", "mpg", "h264", "frag.mp4"],
    "h264_refresh": ["mp4", "mkv", "avi", "ts", "h264"],
    "h264_intra": ["mp4", "avi"],
    "h264_fields": ["mp4", "mkv", "ts", "avi"],
    "h264_slices": ["mp4", "mkv", "avi", "ts"],
    "hevc": ["mp4", "mkv", "ts", "hevc", "mov"],
    "hevc_open": ["mp4", "mkv", "ts", "hevc", "frag.mp4"],
    "hevc_closed": ["mp4", "mkv", "ts"],
    "hevc_bf0": ["mp4", "mkv", "hevc"],
    "mpeg4": ["avi", "mp4", "mkv", "m4v", "ts"],
    "mpeg4_bf": ["avi", "mp4", "mkv", "m4v", "mov"],
    "mpeg2": ["mpg", "ts", "mkv", "avi", "vob", "m2v", "mxf"],
    "mpeg2_bf0": ["mpg", "ts", "mkv"],
    "mpeg1": ["mpg", "avi", "mkv", "m1v"],
    "vp8": ["webm", "mkv", "avi"],
    "vp9": ["webm", "mkv", "mp4"],
    "av1": ["mkv", "mp4", "webm"],
    "mjpeg": ["avi", "mov", "mkv"],
    "wmv2": ["wmv", "avi"],
    "msmpeg4": ["avi", "asf"],
    "flv1": ["flv"],
    "theora": ["ogv", "mkv"],
    "prores": ["mov"],
    "ffv1": ["mkv", "avi"],
    "rv20": ["rm"],
}
RATES = {"25": "25", "ntsc": "30000/1001", "12": "12", "variable": "25"}
VARIABLE = "select='not(mod(n*n,7)-2)+not(mod(n,5))+gt(mod(n,60),40)'"
MATRICES = ["90", "180", "270", "hflip", "vflip", "transpose", "anti"]
# Containers that ``ffmpeg -ss -c copy`` writes no useful cut of.
UNCUT = {"h264", "hevc", "m4v", "m1v", "m2v", "mxf", "rm"}

NO_SOUND = {"h264", "hevc", "m4v", "m1v", "m2v"}
NO_VARIABLE = {*NO_SOUND, "mpg", "vob", "mxf", "rm", "ogv"}


@dataclass(frozen=True)
class Case:
    """One file of the grid."""

    codec: str
    container: str
    rate: str = "25"
    cut: str = ""
    matrix: str = ""
    sound: bool = False
    more: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = [self.codec, self.container, self.rate, self.cut, self.matrix, *self.more]
        return " ".join(part for part in [*parts, "sound" if self.sound else ""] if part)


def cases() -> Iterator[Case]:
    """Yield the grid: every codec in its containers, whole and cut, then what goes across."""
    for number, (codec, containers) in enumerate(CONTAINERS.items()):
        for place, container in enumerate(containers):
            sound = container not in NO_SOUND and (number + place) % 2 == 0
            yield Case(codec, container, sound=sound)
            rate = list(RATES)[1 + (number + place) % 3]
            if rate != "variable" or container not in NO_VARIABLE:
                yield Case(codec, container, rate, sound=not sound and container not in NO_SOUND)
            if container not in UNCUT:
                yield Case(codec, container, cut="3.3", sound=sound)
    for matrix in MATRICES:
        yield Case("h264", "mp4", matrix=matrix)
        yield Case("hevc", "mov", matrix=matrix, cut="2.1")
    for codec in ("h264", "h264_gop25", "hevc", "mpeg4_bf"):
        yield Case(codec, "mp4", sound=True, more=("-itsoffset", "0.5"))
        yield Case(codec, "mp4", cut="5.7", sound=True, more=("-use_editlist", "0"))
        yield Case(codec, "mkv", "variable", cut="4.1", sound=True)
        yield Case(codec, "mp4", more=("two",))
    for codec in ("h264", "h264_gop25", "h264_open", "hevc_open", "mpeg2", "mpeg4"):
        for offset in ("0", "3", "6", "14"):  # of the second part, whose time begins there
            yield Case(codec, "ts", sound=codec != "mpeg4", more=("joined", offset))


def make(case: Case, folder: Path) -> Path:
    """Write the file of a case; how long depends on its rate alone."""
    if "joined" in case.more:
        return joined(case, folder)
    path = folder / f"whole.{case.container}"
    command = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{SIZE}x{SIZE}"]
    command += ["-r", RATES[case.rate], "-i", "-"]
    if "-itsoffset" in case.more:
        command = [*case.more, *command]
    if case.sound:
        command += ["-f", "lavfi", "-t", "12", "-i", "sine=440:sample_rate=16000"]
        command += ["-map", "0:v", "-map", "1:a"]
    if "two" in case.more:  # the second is larger, the first is the default one
        command += ["-map", "0:v", "-map", "0:v", "-s:v:1", "192x192", "-disposition:v:1", "0"]
    if case.rate == "variable":
        command += ["-vf", VARIABLE, "-fps_mode", "passthrough"]
    command += [*CODECS[case.codec], "-pix_fmt", _pixels(case.codec)]
    command += ["-ac", "1", "-ar", "44100"] if case.container == "flv" else []
    command += ["-movflags", "frag_keyframe+empty_moov"] if "frag" in case.container else []
    run(["ffmpeg", *command, str(path)], raw_pictures())
    if case.cut:
        whole, path = path, folder / f"cut.{case.container}"
        options = list(case.more) if "-use_editlist" in case.more else []
        options += ["-movflags", "frag_keyframe+empty_moov"] if "frag" in case.container else []
        cut = ["-ss", case.cut, "-i", str(whole), "-t", "5", "-map", "0", "-c", "copy", *options]
        run(["ffmpeg", *cut, str(path)])
    return mirror(path, case.matrix) if case.matrix else path


def joined(case: Case, folder: Path) -> Path:
    """Write two transport streams, each with half of the pictures, and join them byte by byte."""
    data, half = b"", len(raw_pictures()) // 2
    for offset, given in (("0", raw_pictures()[:half]), (case.more[1], raw_pictures()[half:])):
        command = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{SIZE}x{SIZE}", "-r", "25"]
        command += ["-i", "-", "-f", "lavfi", "-t", "6", "-i", "sine=440:sample_rate=16000"]
        command += ["-map", "0:v", *(["-map", "1:a"] if case.sound else []), *CODECS[case.codec]]
        command += ["-pix_fmt", "yuv420p", "-output_ts_offset", offset]
        run(["ffmpeg", *command, str(folder / "part.ts")], given)
        data += (folder / "part.ts").read_bytes()
    (folder / "joined.ts").write_bytes(data)
    return folder / "joined.ts"


def _pixels(codec: str) -> str:
    return {"prores": "yuv422p10le", "mjpeg": "yuvj420p"}.get(codec, "yuv420p")


@cache
def raw_pictures() -> bytes:
    """Return all pictures: a counter above a texture that moves."""
    textures = [panned(3.0 * n) for n in range(60)]
    return b"".join(
        np.concatenate([counter_picture(n), textures[n % 60]]).tobytes() for n in range(FRAMES)
    )


def run(command: Sequence[str], given: bytes | None = None) -> bytes:
    """Run a program of FFmpeg quietly and return what it prints."""
    name, *rest = command
    quiet = ["-v", "error", *(["-y"] if name == "ffmpeg" else [])]
    done = subprocess.run([name, *quiet, *rest], input=given, capture_output=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr.decode(errors="replace")[-300:])
    return done.stdout


def scan(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return all pictures as FFmpeg shows them, and their times on the file's clock, ascending."""
    told = run(["ffprobe", "-show_frames", "-show_streams", "-of", "json", str(path)])
    tree: dict[str, Any] = json.loads(told)
    streams = [s for s in tree["streams"] if s["codec_type"] in {"video", "audio"}]
    video = next(s for s in streams if s["codec_type"] == "video")
    starts = [
        max(float(s["start_time"]), 0.0) if s["codec_type"] == "audio" else float(s["start_time"])
        for s in streams
        if s.get("start_time", "N/A") != "N/A"
    ]
    if path.suffix == ".webm":  # FFmpeg 8 lets Opus begin with its priming, ffprobe 5.1 did not
        with av.open(str(path)) as container:
            starts = [float((s.start_time or 0) * (s.time_base or 1)) for s in container.streams]
    frames = [f for f in tree["frames"] if f["stream_index"] == video["index"]]
    rates = (video[name].split("/") for name in ("avg_frame_rate", "r_frame_rate"))
    frame_s = next((int(den) / int(num) for num, den in rates if int(num)), 0.04)
    times = filled([f.get("best_effort_timestamp_time") for f in frames], frame_s)
    shown = ["-map", f"0:{video['index']}", "-fps_mode", "passthrough"]
    raw = run(["ffmpeg", "-i", str(path), *shown, "-f", "rawvideo", "-pix_fmt", "rgb24", "-"])
    pictures = np.frombuffer(raw, np.uint8).reshape(-1, SIZE, SIZE, 3)
    if len(pictures) != len(times):
        raise RuntimeError(f"ffmpeg gives {len(pictures)} pictures, ffprobe {len(times)}")
    ahead = leading(times)
    return pictures[ahead], np.maximum.accumulate(times[ahead]) - min(starts, default=0.0)


def leading(times: np.ndarray) -> np.ndarray:
    """Tell frames from those after a leap back by more than half a second, up to where it began."""
    kept, latest, away = [], -np.inf, False
    for time in times.tolist():
        away = time < latest - 0.5 or (away and time <= latest)
        latest = max(latest, time)
        kept.append(not away)
    return np.array(kept)


def filled(stamps: Sequence[str | None], frame_s: float) -> np.ndarray:
    """Give frames without a time one frame after the one before, as ffmpeg does."""
    times: list[float] = []
    for stamp in stamps:
        after = times[-1] + frame_s if times else 0.0
        times.append(after if stamp is None else float(stamp))
    return np.array(times)


def check(case: Case, folder: Path, clips: int, seed: int) -> tuple[int, list[str]]:
    """Compare random clips of a case; return how many there were and what was wrong."""
    path = make(case, folder)
    pictures, times = scan(path)
    if times[-1] > 1e9:
        raise RuntimeError("ffmpeg has cut it so that it starts years late")
    rng = np.random.default_rng([seed, *str(case).encode()])
    begins = rng.uniform(0, max(times[-1] - 0.1, 0.05), clips)
    ends = np.minimum(begins + rng.uniform(0.1, 2.0, clips), times[-1] + 0.02)
    source = {"rgb": FileSource(path)}
    wanted = [
        Clip(str(n), source, float(a), float(b), {})
        for n, (a, b) in enumerate(zip(begins, ends, strict=True))
    ]
    sampling = Sampling(tolerance_s=10)
    settings = DecodeSettings(sampling, Flow(), Audio(), (RGB,))
    wrong = []
    for first in range(0, clips, 5):  # some alone, some together
        groups = [[c] for c in wanted[first : first + 2]] + [wanted[first + 2 : first + 5]]
        for found in (one for group in groups if group for one in decode_clips(group, settings)):
            wrong += differences(found, pictures, times)
    return clips, wrong


def differences(found: Any, pictures: np.ndarray, times: np.ndarray) -> list[str]:
    """Return what is wrong with one decoded clip; nothing, if all is right."""
    if found.reasons:
        return [f"clip {found.clip_id}: {found.reasons[RGB].name} {found.details[RGB]}"]
    asked, real = found.times[RGB]
    numbers = np.searchsorted(times, asked + ROUNDING_S, side="right") - 1
    numbers = np.clip(numbers, 0, len(times) - 1)
    got = found.arrays[RGB].transpose(0, 2, 3, 1).astype(float)
    off = np.abs(got - pictures[numbers]).mean(axis=(1, 2, 3))
    late = np.abs(real - times[numbers])
    if off.max() < SAME and late.max() < 2e-3:
        return []
    worst = int(np.argmax(off > SAME)) if off.max() >= SAME else int(np.argmax(late))
    nearest = int(np.abs(pictures - got[worst]).mean(axis=(1, 2, 3)).argmin())
    frame = numbers[worst]
    return [
        f"clip {found.clip_id}: at {asked[worst]:.3f} s frame {frame} of {times[frame]:.3f} s, "
        f"got {nearest} (off {off[worst]:.1f}) of {real[worst]:.3f} s"
    ]


def main() -> None:
    """Go through the grid; exit 1 if any clip is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=int, default=30, help="random clips per file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="cases whose names hold this")
    arguments = parser.parse_args()
    done = bad = unmade = files = 0
    for case in cases():
        if arguments.only not in str(case):
            continue
        with tempfile.TemporaryDirectory() as folder:
            try:
                count, wrong = check(case, Path(folder), arguments.clips, arguments.seed)
            except (RuntimeError, ValueError, KeyError, StopIteration) as error:
                print(f"{case}: not made: {error!r}"[:200], flush=True)
                unmade += 1
                continue
        files, done, bad = files + 1, done + count, bad + len(wrong)
        for line in wrong[:3]:
            print(f"{case}: {line}", flush=True)
        if wrong:
            print(f"{case}: {len(wrong)} of {count} clips are wrong", flush=True)
    print(f"{files} files, {done} clips, {bad} wrong; {unmade} files could not be made")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
