"""What is known of an extraction's clips and files before any of them is decoded."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from karmma_pipeline.data.manifest import (
    BoxSource,
    Clip,
    FileSource,
    FrameSource,
    Manifest,
    SensorSource,
    Source,
)
from karmma_pipeline.extraction.decode.frame_selection import clamped
from karmma_pipeline.extraction.decode.sensor_windows import SeriesProbe, check_series
from karmma_pipeline.extraction.estimate.trial import TRIED, Outcomes, try_clips
from karmma_pipeline.extraction.media.integrity import (
    Checks,
    Kind,
    SourceCheck,
    Span,
    check_source,
    check_sources,
)
from karmma_pipeline.extraction.media.interface import MediaFaultError
from karmma_pipeline.extraction.media.open import source_key
from karmma_pipeline.extraction.recipe import ExtractRecipe
from karmma_pipeline.extraction.types import NATURAL, input_spec
from karmma_pipeline.modalities import Reason

# How much a clip may reach past its file's stated end before it is told.
_NEAR_S = 0.1

PRESENT, ABSENT, NO_STREAM, FAULTY = "present", "absent", "no_stream", "faulty"
STARTS_LATE, STOPS_LATE, CUT = "start_after_end", "stop_too_far_after_end", "stop_after_end"
LOST = [FAULTY, STARTS_LATE, STOPS_LATE]
"""What becomes of a modality of a clip; a clip that is cut at its file's end is there."""

# What is a file's fault, and not that of a clip's times.
_DAMAGE = {Reason.DECODE_ERROR, Reason.CRASHED}

LEAKS = ("videos_in_several_splits", "overlaps_between_splits")
Presence = dict[str, npt.NDArray[np.bool_]]


def survey(
    recipe: ExtractRecipe, manifest: Manifest, *, probe: bool = True
) -> tuple[dict[str, Any], Presence, Presence]:
    """Look at every clip and, once, at every distinct source.

    Args:
        recipe: which modalities, windows and sampling.
        manifest: the clips, each once however many views it has.
        probe: open the files; else only look whether they are there.

    Returns:
        Counts and the ids of clips that are odd, JSON-plain; modality to bool [clips]: what will
        probably be there, and what would be if no file were missing, cut or damaged.
    """
    clips = manifest.clips
    modalities = list(dict.fromkeys(m for choices in recipe.sets.values() for m in choices))
    sources = {
        _key(m, clip.media[m]): clip.media[m]
        for clip in clips
        for m in modalities
        if m in clip.media
    }
    media = {k: s for k, s in sources.items() if not isinstance(s, SensorSource)}
    series = _series(recipe, clips, modalities)
    checks = {
        **check_sources(media, check_source, probe=probe),
        **check_sources(series, check_series, probe=probe),
    }
    spans = [_span(clip, checks) for clip in clips]
    fates = {
        m: np.array([_fate(c, m, checks, recipe.sampling.tolerance_s) for c in clips], "U32")
        for m in modalities
    }
    tried = _try(recipe, clips, fates, checks) if probe else {}
    facts = {
        **_count_clips(clips, spans),
        "files": {"probed": probe, **_count_files(sources, checks)},
        **_count_fates(clips, fates),
        "decoded": _count_outcomes(tried),
        "shorter_than_window": list(_windows(recipe, clips, spans, checks)),
        **_find_overlaps(clips, spans),
    }
    present = {modality: np.isin(of, [PRESENT, CUT]) for modality, of in fates.items()}
    wanted = {modality: ~np.isin(of, [ABSENT, NO_STREAM]) for modality, of in fates.items()}
    return facts, present, wanted


def _key(modality: str, source: Source) -> object:
    """Return what tells sources apart: of one sensor file, each sensor looks at other columns."""
    return (modality, source.path) if isinstance(source, SensorSource) else source_key(source)


def _series(
    recipe: ExtractRecipe, clips: Sequence[Clip], modalities: Sequence[str]
) -> dict[object, SeriesProbe]:
    """Return the files of sensors, by `_key`, with the spans of their clips."""
    spans: dict[tuple[str, Path], dict[Span, None]] = defaultdict(dict)
    for clip in clips:
        for m in modalities:
            if isinstance(source := clip.media.get(m), SensorSource):
                spans[m, source.path][clip.start_s, clip.stop_s] = None
    return {
        (m, path): SeriesProbe(path, recipe.sensors[m], list(of)) for (m, path), of in spans.items()
    }


def _count_files(sources: Mapping[object, Source], checks: Checks) -> dict[str, Any]:
    kinds = Counter({source.path: _kind(source) for source in sources.values()}.values())
    faulty: dict[str, dict[str, str]] = defaultdict(dict)
    for key, source in sources.items():
        if checks[key].state != "fine":
            faulty[checks[key].state][str(source.path)] = checks[key].detail
    return {"kinds": dict(kinds.most_common()), "faulty": dict(sorted(faulty.items()))}


def _kind(source: Source) -> str:
    if isinstance(source, FrameSource):
        return "frame tars" if source.path.suffix == ".tar" else "frame folders"
    if isinstance(source, SensorSource):
        return "sensor files"
    arrays = "box files" if isinstance(source, BoxSource) else "sound arrays"
    return "media files" if isinstance(source, FileSource) else arrays


def _main(clip: Clip) -> tuple[str, Source] | None:
    """Return the modality and source whose clock a clip's times are on, as far as one can tell."""
    first = "rgb" if "rgb" in clip.media else next(iter(clip.media), None)
    return None if first is None else (first, clip.media[first])


def _span(clip: Clip, checks: Checks) -> Span:
    """Return a clip's start and stop, cut at its file's end; the stop is None if unknown."""
    check = checks.get(_key(*main)) if (main := _main(clip)) else None
    ends = [end for end in (check.ends or {}).values() if end is not None] if check else []
    if not ends:
        return clip.start_s, clip.stop_s
    if clip.start_s >= ends[0]:
        return clip.start_s, ends[0] if clip.stop_s is None else clip.start_s
    return clamped(clip.start_s, clip.stop_s, ends[0], tolerance_s=float("inf"))


def _count_clips(clips: Sequence[Clip], spans: Sequence[Span]) -> dict[str, Any]:
    lengths = [stop - start for start, stop in spans if stop is not None]
    return {
        "clips": len(clips),
        "videos": len({main[1].path for clip in clips if (main := _main(clip)) is not None}),
        "hours": round(sum(lengths) / 3600, 4),
        "median_s": float(np.median(lengths)) if lengths else 0.0,
        "clips_of_unknown_length": len(spans) - len(lengths),
        "splits": dict(sorted(Counter(clip.split for clip in clips).items())),
    }


def _count_fates(clips: Sequence[Clip], fates: Mapping[str, Any]) -> dict[str, Any]:
    every = np.stack(list(fates.values()))
    count = {m: Counter(of.tolist()) for m, of in fates.items()}
    return {
        "present": {m: of[PRESENT] + of[CUT] for m, of in count.items()},
        "no_stream": {m: of[NO_STREAM] for m, of in sorted(count.items()) if of[NO_STREAM]},
        "clips_lost_to_faults": int(np.isin(every, LOST).any(axis=0).sum()),
        **{
            fate: [clips[n].clip_id for n in np.flatnonzero((every == fate).any(axis=0)).tolist()]
            for fate in (STARTS_LATE, CUT, STOPS_LATE)
        },
    }


def _count_outcomes(outcomes: Outcomes) -> dict[str, Any]:
    lost: dict[str, dict[str, str]] = defaultdict(dict)
    for (clip_id, _), (reason, detail) in outcomes.items():
        if reason not in NATURAL:
            lost[reason.label][clip_id] = detail
    return {"clips": len({clip_id for clip_id, _ in outcomes}), "lost": dict(sorted(lost.items()))}


def _fate(clip: Clip, modality: str, checks: Checks, tolerance_s: float) -> str:
    """Tell what becomes of a modality of a clip: see `PRESENT` and the others."""
    source = clip.media.get(modality)
    if source is None:
        return ABSENT
    kind: Kind = "audio" if modality == "audio" else "video"
    check = checks[_key(modality, source)]
    if check.ends is None:
        return PRESENT if check.state == "fine" else FAULTY
    if isinstance(source, SensorSource):
        return FAULTY if (clip.start_s, clip.stop_s) in check.lost else PRESENT
    if kind not in check.ends:
        return NO_STREAM
    start, stop, end = clip.start_s, clip.stop_s, check.ends[kind]
    if end == 0:
        return FAULTY
    if isinstance(source, FrameSource) and source.span:
        start, stop = source.start_s(source.span[0]), source.start_s(source.span[1] + 1)
    if end is None or (kind == "audio" and start < end):  # sound is padded
        return PRESENT
    try:
        clamped(start, stop, end, max(tolerance_s, _NEAR_S))
    except MediaFaultError:
        return STARTS_LATE if start >= end else STOPS_LATE
    return PRESENT if stop is None or stop <= end + _NEAR_S else CUT


def _try(
    recipe: ExtractRecipe,
    clips: Sequence[Clip],
    fates: Mapping[str, Any],
    checks: dict[object, SourceCheck],
) -> Outcomes:
    """Decode clips that are in doubt, and put right what was foretold of them and their files."""
    doubtful = ((c, _in_doubt(c, fates, checks, recipe.sampling.tolerance_s)) for c in clips)
    some = islice((replace(clip, media=media) for clip, media in doubtful if media), TRIED)
    outcomes, by_id = try_clips(recipe, list(some)), {c.clip_id: n for n, c in enumerate(clips)}
    for (clip_id, modality), (reason, detail) in outcomes.items():
        number, of = by_id[clip_id], fates[modality]
        of[number] = _decoded_fate(reason, of[number])
        source = clips[number].media[modality]
        key = _key(modality, source)
        if reason in _DAMAGE and checks[key].state == "fine":
            said = detail.removeprefix(f"{source.path}: ")
            checks[key] = replace(checks[key], state="damaged", detail=said)
    return outcomes


def _decoded_fate(reason: Reason, foretold: str) -> str:
    if reason == Reason.PRESENT:
        return CUT if foretold == CUT else PRESENT
    if reason == Reason.NO_STREAM:
        return NO_STREAM
    return foretold if reason == Reason.OUT_OF_RANGE and foretold in LOST else FAULTY


def _in_doubt(
    clip: Clip, modalities: Iterable[str], checks: Checks, tolerance_s: float
) -> dict[str, Source]:
    """Return the media of a clip of which their headers do not tell whether they can be had."""
    found = {}
    for modality in modalities:
        source = clip.media.get(modality)
        check = checks[_key(modality, source)] if isinstance(source, FileSource) else None
        if source is None or check is None or check.ends is None:
            continue
        kind = "audio" if modality == "audio" else "video"
        begin, end = check.begins.get(kind, 0.0), check.ends.get(kind)
        stop = clip.start_s if clip.stop_s is None else clip.stop_s
        if kind == "audio":  # it is there if the middle is
            first = last = (clip.start_s + stop) / 2
        else:
            first, last = clip.start_s + tolerance_s, stop - max(tolerance_s, _NEAR_S)
        if not check.sure or (end is not None and (first < begin or max(last, first) > end)):
            found[modality] = source
    if "audio" in found and "rgb" in clip.media:  # whose span sound takes
        found["rgb"] = clip.media["rgb"]
    return found


def _windows(
    recipe: ExtractRecipe, clips: Sequence[Clip], spans: Sequence[Span], checks: Checks
) -> Iterator[dict[str, Any]]:
    """Yield how many clips are shorter than what a network looks at, per distinct (modality, T)."""
    pairs = (pair for choices in recipe.sets.values() for pair in choices.items())
    for modality, frames in dict.fromkeys((m, input_spec(m, choice).times) for m, choice in pairs):
        seconds = frames / recipe.sampling.fps if recipe.sampling.mode == "fps" else None
        short = []
        for clip, (start, stop) in zip(clips, spans, strict=True):
            source = clip.media.get(modality)
            if source is None or stop is None or isinstance(source, SensorSource):
                continue
            grid = source.fps / source.stride if isinstance(source, FrameSource) else None
            rate = grid or checks[source_key(source)].fps
            if seconds or rate:
                length = (stop - start) / (1 if seconds else recipe.views.clips)
                short.append(length < (seconds or frames / (rate or 1)) - 1e-9)
        if short and frames > 1:
            counts = {"clips": sum(short), "of": len(short)}
            yield {"modality": modality, "frames": frames, "seconds": seconds, **counts}


def _find_overlaps(clips: Sequence[Clip], spans: Sequence[Span]) -> dict[str, Any]:
    """Find clips with the same video and span, and clips of two splits that overlap in time."""
    by_video: dict[Path, list[tuple[float, float, Clip]]] = defaultdict(list)
    for clip, (start, stop) in zip(clips, spans, strict=True):
        if (main := _main(clip)) is not None:
            by_video[main[1].path].append((start, np.inf if stop is None else stop, clip))
    found: dict[str, list[Any]] = {name: [] for name in ("same_video_and_span", *LEAKS)}
    for path, some in by_video.items():
        some.sort(key=lambda item: item[:2])
        same = [[a[2].clip_id, b[2].clip_id] for a, b in pairwise(some) if a[:2] == b[:2]]
        found["same_video_and_span"] += same
        if len({clip.split for _, _, clip in some}) > 1:
            found[LEAKS[0]].append(str(path))
            found[LEAKS[1]] += list(_leaks(some))
    return found


def _leaks(some: Sequence[tuple[float, float, Clip]]) -> Iterator[list[str]]:
    """Yield overlapping clips of different splits: each clip once, with the earlier one."""
    latest: dict[str, tuple[float, str]] = {}
    for start, stop, clip in some:
        for split, (end, other) in latest.items():
            if split != clip.split and end > start:
                yield [other, clip.clip_id]
                break
        if stop > latest.get(clip.split, (0.0, ""))[0]:
            latest[clip.split] = (stop, clip.clip_id)
