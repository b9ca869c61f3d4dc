"""What is known of an extraction's clips and files before any of them is decoded."""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt

from karmma_pipeline.data.manifest import BoxSource, Clip, FileSource, FrameSource, Manifest, Source
from karmma_pipeline.extraction.decode.frame_selection import clamped
from karmma_pipeline.extraction.media.integrity import FileCheck, check_files
from karmma_pipeline.extraction.media.interface import MediaFaultError
from karmma_pipeline.extraction.recipe import ExtractRecipe
from karmma_pipeline.extraction.types import input_spec

# How much a clip may reach past its file's stated end before it is told.
_NEAR_S = 0.1

EXAMPLES = 3
"""How many of a kind are named; the JSON has them all."""


@dataclass
class Window:
    """Clips that are shorter than what a network looks at: they are filled with repeats."""

    modality: str
    frames: int
    seconds: float | None
    short: int = 0
    of: int = 0


@dataclass
class Survey:
    """Counts, and the first few examples of everything that is wrong.

    Attributes:
        clips: number of clips.
        hours: their length together; unknown lengths are left out.
        unknown: clips whose length only decoding tells.
        splits: clips per split.
        kinds: files per kind of source.
        states: state of a file to the paths in it, all but the fine ones.
        probed: whether files were opened.
        present: modality to bool [clips]: what will probably be there.
        wanted: the same if no file were missing, cut or damaged.
        lost: clips that will lose a modality to a fault that is known by now.
        faulty: their places in the list of clips.
        no_stream: modality to clips whose file was recorded without it.
        starts_after_video_end: clips that start after their file's end.
        ends_after_video_end: clips that stop after their file's end, and are cut there.
        beyond_tolerance: clips that stop farther after it than the recipe tolerates: their
            pictures are out of range.
        windows: see `Window`.
        duplicates: pairs of clip ids with the same video and span.
        shared_videos: videos with clips in more than one split.
        split_leaks: pairs of clip ids of different splits that overlap in time.
    """

    clips: int
    hours: float = 0.0
    median_s: float = 0.0
    unknown: int = 0
    videos: int = 0
    splits: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    states: dict[str, list[Path]] = field(default_factory=lambda: defaultdict(list))
    details: dict[Path, str] = field(default_factory=dict)
    probed: bool = False
    present: dict[str, npt.NDArray[np.bool_]] = field(default_factory=dict)
    wanted: dict[str, npt.NDArray[np.bool_]] = field(default_factory=dict)
    lost: int = 0
    faulty: set[int] = field(default_factory=set)
    no_stream: Counter[str] = field(default_factory=Counter)
    starts_after_video_end: list[str] = field(default_factory=list)
    ends_after_video_end: list[str] = field(default_factory=list)
    beyond_tolerance: list[str] = field(default_factory=list)
    windows: list[Window] = field(default_factory=list)
    duplicates: list[tuple[str, str]] = field(default_factory=list)
    shared_videos: list[str] = field(default_factory=list)
    split_leaks: list[tuple[str, str]] = field(default_factory=list)


def survey(recipe: ExtractRecipe, manifest: Manifest, *, probe: bool = True) -> Survey:
    """Look at every clip and, once, at every distinct file.

    Args:
        recipe: which modalities, windows and sampling.
        manifest: the clips.
        probe: open the files; else only look whether they are there.
    """
    modalities = list(dict.fromkeys(m for choices in recipe.sets.values() for m in choices))
    paths: dict[Path, str] = {}
    for clip in manifest.clips:
        for modality in modalities:
            source = clip.media.get(modality)
            if source is not None:
                paths.setdefault(source.path, _kind(source))
    checks = check_files(list(paths)) if probe else {p: _there(p) for p in paths}
    result = Survey(len(manifest.clips), probed=probe)
    result.kinds.update(paths.values())
    for path, check in checks.items():
        if check.state != "fine":
            result.states[check.state].append(path)
            result.details[path] = check.detail
    spans = [_span(clip, checks) for clip in manifest.clips]
    _count_clips(result, manifest.clips, spans)
    _count_presence(result, manifest.clips, modalities, checks)
    _count_ends(result, manifest.clips, recipe.sampling.tolerance_s, checks)
    result.lost = len(result.faulty)
    result.windows = list(_windows(recipe, manifest.clips, spans, checks))
    _find_overlaps(result, manifest.clips, spans)
    return result


def _there(path: Path) -> FileCheck:
    return FileCheck("fine") if path.exists() else FileCheck("missing")


def _kind(source: Source) -> str:
    if isinstance(source, FileSource):
        return "media files"
    if isinstance(source, FrameSource):
        return "frame tars" if source.path.suffix == ".tar" else "frame folders"
    return "box files" if isinstance(source, BoxSource) else "sound arrays"


def _main(clip: Clip) -> Source | None:
    """Return the source whose clock a clip's times are on, as far as one can tell."""
    return clip.media.get("rgb") or next(iter(clip.media.values()), None)


def _end(clip: Clip, checks: Mapping[Path, FileCheck]) -> float | None:
    source = _main(clip)
    check = checks.get(source.path) if isinstance(source, FileSource) else None
    return None if check is None else check.duration_s


def _span(clip: Clip, checks: Mapping[Path, FileCheck]) -> tuple[float, float | None]:
    """Return a clip's start and stop, cut at its file's end; the stop is None if unknown."""
    end = _end(clip, checks)
    if end is None:
        return clip.start_s, clip.stop_s
    if clip.start_s >= end:
        return clip.start_s, end if clip.stop_s is None else clip.start_s
    return clamped(clip.start_s, clip.stop_s, end, tolerance_s=float("inf"))


def _count_clips(
    result: Survey, clips: Sequence[Clip], spans: Sequence[tuple[float, float | None]]
) -> None:
    lengths = [stop - start for start, stop in spans if stop is not None]
    result.hours = sum(lengths) / 3600
    result.median_s = float(np.median(lengths)) if lengths else 0.0
    result.unknown = len(spans) - len(lengths)
    result.splits.update(clip.split for clip in clips)
    result.videos = len({source.path for clip in clips if (source := _main(clip)) is not None})


def _count_presence(
    result: Survey,
    clips: Sequence[Clip],
    modalities: Sequence[str],
    checks: Mapping[Path, FileCheck],
) -> None:
    for modality in modalities:
        present = result.present[modality] = np.zeros(len(clips), np.bool_)
        wanted = result.wanted[modality] = np.zeros(len(clips), np.bool_)
        for number, clip in enumerate(clips):
            source = clip.media.get(modality)
            if source is None:
                continue
            check = checks[source.path]
            wanted[number] = True
            if check.state != "fine":
                result.faulty.add(number)
            elif check.lacks("audio" if modality == "audio" else "video"):
                result.no_stream[modality] += 1
                wanted[number] = False
            else:
                present[number] = True


def _count_ends(
    result: Survey, clips: Sequence[Clip], tolerance_s: float, checks: Mapping[Path, FileCheck]
) -> None:
    """Tell the clips that reach out of their file: what plays on is cut, or nothing is left."""
    for number, clip in enumerate(clips):
        end = _end(clip, checks)
        if end is None:
            continue
        try:
            clamped(clip.start_s, clip.stop_s, end, max(tolerance_s, _NEAR_S))
        except MediaFaultError:
            if clip.start_s >= end:
                result.starts_after_video_end.append(clip.clip_id)
                gone = set(result.present)
            else:
                result.beyond_tolerance.append(clip.clip_id)
                gone = result.present.keys() & {"rgb", "flow"}  # sound is padded
            _lose(result, number, gone)
        else:
            if clip.stop_s is not None and clip.stop_s - end > _NEAR_S:
                result.ends_after_video_end.append(clip.clip_id)


def _lose(result: Survey, number: int, modalities: Collection[str]) -> None:
    if modalities:
        result.faulty.add(number)
    for modality in modalities:
        result.present[modality][number] = False


def _windows(
    recipe: ExtractRecipe,
    clips: Sequence[Clip],
    spans: Sequence[tuple[float, float | None]],
    checks: Mapping[Path, FileCheck],
) -> Iterator[Window]:
    """Yield a window per distinct (modality, T) that looks at several moments."""
    wanted = dict.fromkeys(
        (modality, input_spec(modality, choice).times)
        for choices in recipe.sets.values()
        for modality, choice in choices.items()
    )
    fixed = recipe.sampling.mode == "fps"
    for modality, frames in wanted:
        if frames < 2:
            continue
        seconds = frames / recipe.sampling.fps if fixed else None
        window = Window(modality, frames, seconds)
        for clip, (start, stop) in zip(clips, spans, strict=True):
            rate = None if fixed else _rate(clip.media.get(modality), checks)
            least = seconds if seconds is not None else frames / rate if rate else None
            if modality in clip.media and stop is not None and least is not None:
                window.of += 1
                window.short += stop - start < least - 1e-9
        if window.of:
            yield window


def _rate(source: Source | None, checks: Mapping[Path, FileCheck]) -> float | None:
    if isinstance(source, FrameSource):
        return source.fps / source.stride
    return checks[source.path].fps if isinstance(source, FileSource) else None


def _find_overlaps(
    result: Survey, clips: Sequence[Clip], spans: Sequence[tuple[float, float | None]]
) -> None:
    """Find clips with the same video and span, and clips of two splits that overlap in time."""
    by_video: dict[Path, list[tuple[float, float, Clip]]] = defaultdict(list)
    for clip, (start, stop) in zip(clips, spans, strict=True):
        source = _main(clip)
        if source is not None:
            end = float("inf") if stop is None else stop
            by_video[source.path].append((start, end, clip))
    for path, some in by_video.items():
        some.sort(key=lambda item: item[:2])
        result.duplicates += [
            (one[2].clip_id, two[2].clip_id) for one, two in pairwise(some) if one[:2] == two[:2]
        ]
        if len({clip.split for _, _, clip in some}) > 1:
            result.shared_videos.append(str(path))
            result.split_leaks += _leaks(some)


def _leaks(some: Sequence[tuple[float, float, Clip]]) -> Iterator[tuple[str, str]]:
    """Yield overlapping clips of different splits: each clip once, with the earlier one."""
    latest: dict[str, tuple[float, str]] = {}
    for start, stop, clip in some:
        for split, (end, other) in latest.items():
            if split != clip.split and end > start:
                yield other, clip.clip_id
                break
        if stop > latest.get(clip.split, (0.0, ""))[0]:
            latest[clip.split] = (stop, clip.clip_id)
