"""Plans the data set, writes the missing videos in parallel, and its manifest last."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from fractions import Fraction
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import numpy.typing as npt

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
class SampleVideo:
    """A video to write: its number, its split, and what it shows."""

    number: int
    split: str
    seed: int
    actions: tuple[Action, ...]

    @property
    def name(self) -> str:
        """Its file below the data set's folder."""
        return f"videos/v{self.number:04d}.mp4"

    @property
    def duration_s(self) -> float:
        """Seconds."""
        return self.actions[-1].stop_s + _GAP_S


def write_sample(
    out: Path, clips: int = 1000, seed: int = 0, stop: jobs.StopFlag | None = None, test: int = 0
) -> Path:
    """Write the data set and return its manifest; run again, it writes what is missing.

    Args:
        out: folder of the videos and the manifest.
        clips: of train and val together, three to one.
        seed: equal ones give equal files.
        stop: asks for a stop.
        test: clips of a third split, test; all splits then leave out the handwriting that the
            demo's networks have learned from.

    Raises:
        ConfigError: fewer than 8 clips, or the folder holds a set made with other settings.
        StoppedError: a signal came; finished videos are kept.
    """
    if clips < len(VERBS):
        raise ConfigError(f"clips={clips}: must be at least {len(VERBS)}, one per direction.")
    validation = max(1, round(clips * VALIDATION_SHARE))
    splits = {"train": clips - validation, "val": validation}
    settings = {"version": _VERSION, "clips": clips, "seed": seed}
    if test:
        splits["test"] = settings["test"] = test
    return _write_all(out, list(plan(splits, seed, apart=test > 0)), settings, stop)


def write_network_clips(out: Path, clips: int, validation: int, seed: int) -> Path:
    """Write clips for training the demo's networks, with splits networks and networks_val."""
    videos = list(plan({"networks": clips, "networks_val": validation}, seed, apart=True))
    settings = {"version": _VERSION, "networks": clips, "networks_val": validation, "seed": seed}
    return _write_all(out, videos, settings, None)


def _write_all(
    out: Path, videos: list[SampleVideo], settings: dict[str, int], stop: jobs.StopFlag | None
) -> Path:
    _claim(out, settings)
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
            f"{out}: contains a sample made with {there}, not {settings}; choose another folder."
        )


def plan(splits: Mapping[str, int], seed: int, *, apart: bool) -> Iterator[SampleVideo]:
    """Yield the videos of a data set.

    Args:
        splits: to their number of clips.
        seed: equal ones give equal videos.
        apart: see `scene.handwriting`.
    """
    number = 0
    for split, count in splits.items():
        rng = np.random.default_rng((seed, number))
        classes = [(i % len(VERBS), i // len(VERBS) % len(NOUNS)) for i in range(count)]
        order = rng.permutation(count)
        pools = [scene.handwriting(split, noun, apart=apart) for noun in range(len(NOUNS))]
        for first in range(0, count, CLIPS_PER_VIDEO):
            chosen = [classes[i] for i in order[first : first + CLIPS_PER_VIDEO]]
            video_seed = int(rng.integers(2**31))
            yield SampleVideo(number, split, video_seed, _actions(chosen, pools, rng))
            number += 1


def _actions(
    classes: list[tuple[int, int]],
    pools: list[npt.NDArray[np.int64]],
    rng: np.random.Generator,
) -> tuple[Action, ...]:
    actions = []
    start = _GAP_S
    for verb, noun in classes:
        stop = start + float(rng.uniform(0.9, 1.5))
        image = int(rng.choice(pools[noun]))
        actions.append(
            Action(verb, noun, image, round(start, 2), round(stop, 2), int(rng.integers(2**31)))
        )
        start = stop + _GAP_S
    return tuple(actions)


def _write(out: Path, video: SampleVideo) -> None:
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


def _rows(video: SampleVideo) -> Iterator[dict[str, object]]:
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
