"""Plans the data set, writes the missing videos in parallel, and its manifest last."""

import json
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from fractions import Fraction
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from karmma_pipeline import files, jobs
from karmma_pipeline.data.manifest import write_manifest
from karmma_pipeline.data.sample import scene
from karmma_pipeline.data.sample.scene import NOUNS, VERBS, Action, write_video
from karmma_pipeline.errors import ConfigError
from karmma_pipeline.logs import progress_bar

CLIPS_PER_VIDEO = 4
VALIDATION_SHARE = 0.25
#: Which videos lack an audio track, and in which the track is silent.
NO_TRACK_EVERY, SILENT_EVERY = 8, 10

_VERSION = 2
_GAP_S = 0.2
_SIZES = ((96, 128), (96, 96), (120, 160), (108, 144))
_RATES = (Fraction(15), Fraction(24), Fraction(25), Fraction(30_000, 1001), Fraction(30))
_FAST = Fraction(60_000, 1001)
# Number of the video with a variable frame rate.
_VARIABLE = 1


@dataclass(frozen=True)
class _SampleVideo:
    number: int
    split: str
    seed: int
    actions: tuple[Action, ...]

    @property
    def name(self) -> str:
        return f"videos/v{self.number:04d}.mp4"

    @property
    def duration_s(self) -> float:
        return self.actions[-1].stop_s + _GAP_S


def write_sample(
    out: Path, clips: int = 1000, seed: int = 0, stop: jobs.StopFlag | None = None
) -> Path:
    """Write the data set and return its manifest; run again, it writes what is missing.

    Raises:
        ConfigError: fewer than 8 clips, or the folder holds a set made with other settings.
        StoppedError: a signal came; finished videos are kept.
    """
    if clips < len(VERBS):
        raise ConfigError(f"clips={clips}: at least {len(VERBS)} are needed, one per direction.")
    _claim(out, {"version": _VERSION, "clips": clips, "seed": seed})
    videos = list(_plan(clips, seed))
    missing = [v for v in videos if not (out / v.name).is_file()]
    workers = max(1, min(jobs.cpu_count(), len(missing)))
    with ProcessPoolExecutor(workers, get_context("spawn"), jobs.become_worker) as pool:
        futures = [pool.submit(_write, out, video) for video in missing]
        bar = progress_bar(as_completed(futures), "videos", total=len(futures), unit="video")
        try:
            for done in bar:
                done.result()
                if stop is not None:
                    stop.check("finished videos are kept")
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    manifest = out / "manifest.csv"
    write_manifest(manifest, [row for video in videos for row in _rows(video)])
    return manifest


def _claim(out: Path, settings: dict[str, int]) -> None:
    path = out / "sample.json"
    if not path.is_file():
        files.write_json(path, settings)
    elif (there := json.loads(path.read_text(encoding="utf-8"))) != settings:
        raise ConfigError(
            f"{out}: holds a sample made with {there}, not {settings}; choose another folder."
        )


def _plan(clips: int, seed: int) -> Iterator[_SampleVideo]:
    validation = max(1, round(clips * VALIDATION_SHARE))
    number = 0
    for split, count in (("train", clips - validation), ("val", validation)):
        rng = np.random.default_rng((seed, number))
        classes = [(i % len(VERBS), i // len(VERBS) % len(NOUNS)) for i in range(count)]
        order = rng.permutation(count)
        for first in range(0, count, CLIPS_PER_VIDEO):
            chosen = [classes[i] for i in order[first : first + CLIPS_PER_VIDEO]]
            video_seed = int(rng.integers(2**31))
            yield _SampleVideo(number, split, video_seed, _actions(chosen, split, rng))
            number += 1


def _actions(
    classes: list[tuple[int, int]], split: str, rng: np.random.Generator
) -> tuple[Action, ...]:
    actions = []
    start = _GAP_S
    for verb, noun in classes:
        stop = start + float(rng.uniform(0.9, 1.5))
        image = int(rng.choice(scene.handwriting(split, noun)))
        actions.append(
            Action(verb, noun, image, round(start, 2), round(stop, 2), int(rng.integers(2**31)))
        )
        start = stop + _GAP_S
    return tuple(actions)


def _write(out: Path, video: _SampleVideo) -> None:
    rng = np.random.default_rng(video.seed)
    height, width = _SIZES[video.number % len(_SIZES)]
    fps = _FAST if video.number % 16 == 5 else _RATES[video.number % len(_RATES)]
    times = np.arange(round(video.duration_s * fps)) / float(fps)
    if video.number == _VARIABLE:
        keep = rng.random(len(times)) < 0.6
        keep[0] = True
        times = times[keep]
    actions = list(video.actions)
    sound = None
    if video.number % NO_TRACK_EVERY != NO_TRACK_EVERY - 1:
        sound = scene.sing(video.duration_s, actions, rng)
        if video.number % SILENT_EVERY == SILENT_EVERY - 1:
            sound[:] = 0
    write_video(out / video.name, scene.draw(times, actions, height, width, rng), times, fps, sound)


def _rows(video: _SampleVideo) -> Iterator[dict[str, object]]:
    for index, action in enumerate(video.actions):
        yield {
            "clip_id": f"v{video.number:04d}_{index}",
            "video": video.name,
            "start": f"{action.start_s:.2f}",
            "stop": f"{action.stop_s:.2f}",
            "verb": VERBS[action.verb],
            "noun": NOUNS[action.noun],
            "split": video.split,
            "group": f"P{video.number % 10:02d}",
        }
