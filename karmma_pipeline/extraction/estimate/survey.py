"""What becomes of an extraction's clips: as files foretell it, or as decoding some has shown."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from math import inf
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt

from karmma_pipeline.data.manifest import Clip, Manifest
from karmma_pipeline.data.sources import (
    BoxSource,
    FileSource,
    FrameSource,
    SensorSource,
    SoundArray,
    Source,
)
from karmma_pipeline.extraction.decode.frame_selection import clamped
from karmma_pipeline.extraction.decode.pool import default_workers, open_pool
from karmma_pipeline.extraction.decode.sensor_windows import SeriesProbe, check_series
from karmma_pipeline.extraction.media.integrity import (
    WHOLE,
    Outcome,
    SourceCheck,
    Span,
    check_source,
    check_sources,
)
from karmma_pipeline.extraction.media.interface import MediaFaultError
from karmma_pipeline.extraction.media.open import source_key
from karmma_pipeline.extraction.recipe import ExtractRecipe
from karmma_pipeline.extraction.types import NATURAL, BatchPlan, DecodeSettings, input_spec
from karmma_pipeline.jobs import StopFlag
from karmma_pipeline.logs import progress_bar
from karmma_pipeline.modalities import Reason
from karmma_pipeline.views import Views

#: Clips in doubt that are decoded at most.
TRIED = 500

_BATCH = 16

# How much a clip may reach past its file's stated end before it is told.
_NEAR_S = 0.1

_KINDS = {
    FileSource: "media files",
    FrameSource: "frame folders",
    SoundArray: "sound arrays",
    BoxSource: "box files",
    SeriesProbe: "sensor files",
}

FOUND: Outcome = (Reason.PRESENT, "")
#: What becomes of the modalities of clips, by clip and modality.
Outcomes = Mapping[tuple[str, str], Outcome]


class Survey:
    """A look at every clip and, once, at every distinct source.

    Args:
        recipe: which modalities, windows and sampling.
        manifest: the clips, each once however many views it has.
        probe: open the files, and decode clips of which they do not tell whether they can be had;
            else only look whether the files are there.

    Attributes:
        clips: all clips.
        modalities: those that some network takes.
        outcomes: what will become of them, the clips' reasons as extraction has them.
        decoded: ids of the clips that were decoded to know it.
    """

    def __init__(self, recipe: ExtractRecipe, manifest: Manifest, *, probe: bool = True) -> None:
        self.clips, self._recipe, self._probed = manifest.clips, recipe, probe
        self.modalities = list(dict.fromkeys(m for of in recipe.sets.values() for m in of))
        self._sources: dict[object, Source | SeriesProbe] = {}
        for clip in self.clips:
            for modality in self.modalities:
                self._add(clip, modality)
        self._checks = check_sources(self._sources, _check, probe=probe)
        self.outcomes: dict[tuple[str, str], Outcome] = {}
        self.decoded: set[str] = set()
        doubtful = [clip for clip in map(self._in_doubt, self.clips) if clip.media]
        self.learn(_decoded(recipe, doubtful[:TRIED]))

    def _add(self, clip: Clip, modality: str) -> None:
        source = clip.media.get(modality)
        if isinstance(source, SensorSource):
            new = SeriesProbe(source.path, self._recipe.sensors[modality], [])
            probe: Any = self._sources.setdefault(_key(modality, source), new)
            probe.spans.append((clip.start_s, clip.stop_s))
        elif source is not None:
            self._sources[source_key(source)] = source

    def _in_doubt(self, clip: Clip) -> Clip:
        """Foretell what becomes of a clip; return it with the media of which that is not sure."""
        media = {}
        for modality in self.modalities:
            outcome, sure = self._foretold(clip, modality)
            self.outcomes[clip.clip_id, modality] = outcome
            if not sure:
                media[modality] = clip.media[modality]
        if "audio" in media and "rgb" in clip.media:  # whose span sound takes
            media["rgb"] = clip.media["rgb"]
        return replace(clip, media=media)

    def _foretold(self, clip: Clip, modality: str) -> tuple[Outcome, bool]:
        """Return what the files say of a modality of a clip, and whether that is sure."""
        if modality not in clip.media:
            return (Reason.NOT_IN_DATASET, modality), True
        source, start, stop = clip.media[modality], clip.start_s, clip.stop_s
        check = self._checks[_key(modality, source)]
        kind = "audio" if modality == "audio" else "video"
        lost = [check.lost[key] for key in (WHOLE, kind, (start, stop)) if key in check.lost]
        if lost or check.ends is None or isinstance(source, SensorSource):
            return (lost or [FOUND])[0], check.sure
        if kind not in check.ends:
            return (Reason.NO_STREAM, f"{source.path}: no {kind} stream"), check.sure
        if isinstance(source, FrameSource) and source.span:
            start, stop = source.start_s(source.span[0]), source.start_s(source.span[1] + 1)
        tolerance, length = self._recipe.sampling.tolerance_s, 0 if stop is None else stop - start
        begin, end, slack = check.begins.get(kind, 0), check.ends[kind], max(tolerance, _NEAR_S)
        edges = [start + tolerance, start + length - slack]
        if kind == "audio":  # it is padded, and there if its middle is
            edges = [start + length / 2]
        sure = check.sure and edges[0] >= begin and (end is None or max(edges) <= end)
        if end is not None and not (kind == "audio" and start < end):
            try:
                clamped(start, stop, end, slack)
            except MediaFaultError as fault:
                return (fault.reason, fault.detail), sure
        return FOUND, sure

    def learn(self, outcomes: Outcomes) -> None:
        """Put right what was foretold by what decoding has shown."""
        self.outcomes |= outcomes
        self.decoded |= {clip_id for clip_id, _ in outcomes}

    def reasons(self) -> dict[str, npt.NDArray[np.uint8]]:
        """Return modality to the reason's code of each clip, 0 where it will be there."""
        return {
            m: np.array([self.outcomes[clip.clip_id, m][0] for clip in self.clips], np.uint8)
            for m in self.modalities
        }

    def facts(self) -> dict[str, Any]:
        """Return counts and the ids of clips that are odd, JSON-plain."""
        spans = [self._span(clip) for clip in self.clips]
        lengths = [stop - start for start, stop in spans if stop is not None]
        lost: dict[str, dict[str, str]] = defaultdict(dict)
        for (clip_id, _), (reason, detail) in self.outcomes.items():
            if reason not in NATURAL:
                lost[reason.label].setdefault(clip_id, detail)
        faulty: dict[str, dict[str, str]] = defaultdict(dict)
        for key, source in self._sources.items():
            if self._checks[key].state != "fine":
                faulty[self._checks[key].state][str(source.path)] = self._checks[key].detail
        kinds = Counter({source.path: _kind(source) for source in self._sources.values()}.values())
        failed = {clip_id for of in lost.values() for clip_id in of}
        count = Counter((m, reason) for (_, m), (reason, _) in self.outcomes.items())
        muted = {m: count[m, Reason.NO_STREAM] for m in sorted(self.modalities)}
        return {
            "clips": len(self.clips),
            "videos": len({c.media[_main(c)].path for c in self.clips if c.media}),
            "hours": round(sum(lengths) / 3600, 4),
            "median_s": median(lengths or [0.0]),
            "clips_of_unknown_length": len(spans) - len(lengths),
            "splits": dict(sorted(Counter(clip.split for clip in self.clips).items())),
            "files": {"probed": self._probed, "kinds": dict(kinds.most_common()), "faulty": faulty},
            "present": {m: count[m, Reason.PRESENT] for m in self.modalities},
            "no_stream": {m: clips for m, clips in muted.items() if clips},
            "decoded": len(self.decoded),
            "clips_lost_to_faults": len(failed),
            "lost": lost,
            "stop_after_end": [
                clip.clip_id
                for clip, (_, stop) in zip(self.clips, spans, strict=True)
                if (clip.stop_s or 0) > (stop or 0) + _NEAR_S and clip.clip_id not in failed
            ],
            "shorter_than_window": list(self._windows(spans)),
            **_overlaps(self.clips, spans),
        }

    def _span(self, clip: Clip) -> Span:
        """Return a clip's start and stop, cut at its file's end; the stop is None if unknown."""
        main = _main(clip)
        check = self._checks.get(_key(main, clip.media[main])) if main else None
        end = next(iter((check.ends or {}).values()), None) if check else None
        stops = [s for s in (clip.stop_s, end) if s is not None]
        return clip.start_s, max(clip.start_s, min(stops)) if stops else None

    def _windows(self, spans: Sequence[Span]) -> Iterator[dict[str, Any]]:
        """Yield how many clips are shorter than what a network looks at, per modality and T."""
        sampling, pairs = self._recipe.sampling, (of.items() for of in self._recipe.sets.values())
        wanted = dict.fromkeys((m, input_spec(m, choice).times) for of in pairs for m, choice in of)
        for modality, frames in wanted:
            short = [
                stop - start < needed - 1e-9
                for clip, (start, stop) in zip(self.clips, spans, strict=True)
                if stop is not None and (needed := self._window_s(clip, modality, frames))
            ]
            if short and frames > 1:
                seconds = frames / sampling.fps if sampling.mode == "fps" else None
                counts = {"clips": sum(short), "of": len(short)}
                yield {"modality": modality, "frames": frames, "seconds": seconds, **counts}

    def _window_s(self, clip: Clip, modality: str, frames: int) -> float | None:
        """Return how long a clip must be so that no frame repeats; None if that is not known."""
        source, sampling = clip.media.get(modality), self._recipe.sampling
        if source is None or isinstance(source, SensorSource):
            return None
        if sampling.mode == "fps":
            return frames / sampling.fps
        grid = source.fps / source.stride if isinstance(source, FrameSource) else None
        rate = grid or self._checks[source_key(source)].fps
        return frames * self._recipe.views.clips / rate if rate else None


def _key(modality: str, source: Source) -> object:
    """Return what tells sources apart: of one sensor file, each sensor looks at other columns."""
    return (modality, source.path) if isinstance(source, SensorSource) else source_key(source)


def _check(source: Any) -> SourceCheck:
    return check_series(source) if isinstance(source, SeriesProbe) else check_source(source)


def _kind(source: Source | SeriesProbe) -> str:
    if isinstance(source, FrameSource) and source.path.suffix == ".tar":
        return "frame tars"
    return _KINDS[type(source)]


def _main(clip: Clip) -> str:
    """Return the modality on whose clock a clip's times are, as far as one can tell."""
    return "rgb" if "rgb" in clip.media else next(iter(clip.media), "")


def _decoded(recipe: ExtractRecipe, clips: Sequence[Clip]) -> Outcomes:
    """Decode clips, with the limits of the recipe; nothing is written where it will write."""
    if not clips:  # no process is started for nothing
        return {}
    plain = recipe.model_copy(update={"views": Views()})
    settings = replace(DecodeSettings.of(plain), index_folder=None)
    workers = min(recipe.decode.workers or default_workers(beside_gpu=False), len(clips))
    batches = (clips[at : at + _BATCH] for at in range(0, len(clips), _BATCH))
    plans = [BatchPlan(0, some, [], last=False) for some in batches]
    outcomes = {(clip.clip_id, modality): FOUND for clip in clips for modality in clip.media}
    with (
        open_pool(settings, recipe.decode, workers, _BATCH, StopFlag()) as pool,
        progress_bar(total=len(clips), desc="decode", unit="clip") as bar,
    ):
        for plan, decoded in pool.batches(plans):
            for clip, found in zip(plan.clips, decoded, strict=True):
                for spec, reason in found.reasons.items():  # one network may lack what another has
                    if spec.modality in clip.media:
                        outcomes[clip.clip_id, spec.modality] = reason, found.details.get(spec, "")
                bar.update()
    return outcomes


def _overlaps(clips: Sequence[Clip], spans: Sequence[Span]) -> dict[str, list[Any]]:
    """Find clips with the same video and span, and clips of two splits that overlap in time."""
    by_video: dict[Path, list[tuple[float, float, Clip]]] = defaultdict(list)
    for clip, (start, stop) in zip(clips, spans, strict=True):
        if clip.media:
            path = clip.media[_main(clip)].path
            by_video[path].append((start, inf if stop is None else stop, clip))
    same, shared, leaks = [], [], []
    for path, some in by_video.items():
        some.sort(key=lambda item: item[:2])
        same += [[a[2].clip_id, b[2].clip_id] for a, b in pairwise(some) if a[:2] == b[:2]]
        if len({clip.split for *_, clip in some}) > 1:
            shared.append(str(path))
            leaks += list(_leaks(some))
    return {
        "same_video_and_span": same,
        "videos_in_several_splits": shared,
        "overlaps_between_splits": leaks,
    }


def _leaks(some: Sequence[tuple[float, float, Clip]]) -> Iterator[list[str]]:
    """Yield overlapping clips of different splits: each clip once, with an earlier one."""
    latest: dict[str, tuple[float, str]] = {}
    for start, stop, clip in some:
        others = (one for split, one in latest.items() if split != clip.split)
        if (other := max(others, default=(start, "")))[0] > start:
            yield [other[1], clip.clip_id]
        if stop > latest.get(clip.split, (0.0, ""))[0]:
            latest[clip.split] = (stop, clip.clip_id)
