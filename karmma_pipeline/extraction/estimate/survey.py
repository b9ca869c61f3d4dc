"""What becomes of an extraction's clips: as files foretell it, or as decoding some has shown."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from math import inf
from typing import Any

from karmma_pipeline.data.manifest import Clip, Manifest
from karmma_pipeline.data.sources import FrameSource, SensorSource
from karmma_pipeline.extraction.decode.frame_selection import clamped
from karmma_pipeline.extraction.decode.pool import default_workers, open_pool
from karmma_pipeline.extraction.media.integrity import (
    WHOLE,
    Outcome,
    check_source,
    check_sources,
)
from karmma_pipeline.extraction.media.interface import MediaFaultError
from karmma_pipeline.extraction.media.media_file import source_key
from karmma_pipeline.extraction.recipe import ExtractRecipe
from karmma_pipeline.extraction.types import NATURAL, BatchPlan, DecodeSettings, input_spec
from karmma_pipeline.jobs import StopFlag
from karmma_pipeline.logs import progress_bar
from karmma_pipeline.modalities import Reason
from karmma_pipeline.views import Views

#: Clips in doubt whose media are decoded at most; of sensors all are, which takes little.
TRIED = 500

_BATCH = 16

# How much a clip may reach past its file's stated end at least.
_NEAR_S = 0.1

Span = tuple[float, float | None]
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
        media = (clip.media[m] for clip in self.clips for m in self.modalities if m in clip.media)
        self._sources = {source_key(source): source for source in media}
        self._checks = check_sources(self._sources, check_source, probe=probe)
        self.outcomes: dict[tuple[str, str], Outcome] = {}
        self.decoded: set[str] = set()
        doubtful = [clip for clip in map(self._in_doubt, self.clips) if clip.media]
        beyond = (_sensors(clip) for clip in doubtful[TRIED:])
        self.learn(_decoded(recipe, doubtful[:TRIED] + [clip for clip in beyond if clip.media]))

    def _in_doubt(self, clip: Clip) -> Clip:
        """Foretell what becomes of a clip; return it with the media of which that is not sure."""
        media = {}
        for modality in self.modalities:
            self.outcomes[clip.clip_id, modality], sure = self._foretold(clip, modality)
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
        check = self._checks[source_key(source)]
        kind = "audio" if modality == "audio" else "video"
        lost = check.lost.get(WHOLE) or check.lost.get(kind)
        if lost or check.ends is None:
            return lost or FOUND, check.sure
        if kind not in check.ends:
            return (Reason.NO_STREAM, f"{source.path}: no {kind} stream"), check.sure
        if isinstance(source, FrameSource) and source.span:
            start, stop = source.start_s(source.span[0]), source.start_s(source.span[1] + 1)
        begin, end = check.begins.get(kind, 0), check.ends[kind]
        if end is None:
            return FOUND, False
        near = max(self._recipe.sampling.tolerance_s, _NEAR_S)
        sure = check.sure and begin - near <= start <= end - near and (stop or 0) <= end + near
        if kind == "video" or start >= end:  # sound is padded
            try:
                clamped(start, stop, end, near)
            except MediaFaultError as fault:
                return (fault.reason, fault.detail), sure
        return FOUND, sure

    def learn(self, outcomes: Outcomes) -> None:
        """Put right what was foretold by what decoding has shown."""
        self.outcomes |= outcomes
        self.decoded |= {clip_id for clip_id, _ in outcomes}

    def facts(self) -> dict[str, Any]:
        """Return counts and the ids of clips that are odd, JSON-plain."""
        spans = [self._span(clip) for clip in self.clips]
        lost: dict[str, dict[str, str]] = defaultdict(dict)
        for (clip_id, _), (reason, detail) in self.outcomes.items():
            if reason not in NATURAL:
                lost[reason.label].setdefault(clip_id, detail)
        faulty: dict[str, dict[str, str]] = defaultdict(dict)
        for key, check in self._checks.items():
            if check.state != "fine":
                faulty[check.state][str(self._sources[key].path)] = check.detail
        count = Counter((m, reason) for (_, m), (reason, _) in self.outcomes.items())
        muted = {m: count[m, Reason.NO_STREAM] for m in self.modalities}
        paths = {source.path for source in self._sources.values()}
        return {
            "clips": len(self.clips),
            "videos": len({clip.media[_main(clip)].path for clip in self.clips if clip.media}),
            "hours": round(sum(stop - start for start, stop in spans if stop) / 3600, 4),
            "clips_of_unknown_length": sum(stop is None for _, stop in spans),
            "splits": dict(sorted(Counter(clip.split for clip in self.clips).items())),
            "files": {"probed": self._probed, "count": len(paths), "faulty": faulty},
            "present": {m: count[m, Reason.PRESENT] for m in self.modalities},
            "no_stream": {m: clips for m, clips in muted.items() if clips},
            "decoded": len(self.decoded),
            "clips_lost_to_faults": len({clip_id for of in lost.values() for clip_id in of}),
            "lost": lost,
            "shorter_than_window": list(self._windows(spans)),
            **_overlaps(self.clips, spans),
        }

    def _span(self, clip: Clip) -> Span:
        """Return a clip's start and stop, cut at its file's end; the stop is None if unknown."""
        check = self._checks.get(source_key(clip.media[_main(clip)])) if clip.media else None
        ends = [clip.stop_s, *((check.ends or {}).values() if check else [])][:2]
        stops = [stop for stop in ends if stop is not None]
        return clip.start_s, max(clip.start_s, min(stops)) if stops else None

    def _windows(self, spans: Sequence[Span]) -> Iterator[dict[str, Any]]:
        """Yield how many clips are shorter than what a network looks at, per modality and T."""
        pairs = [pair for of in self._recipe.sets.values() for pair in of.items()]
        for modality, frames in dict.fromkeys((m, input_spec(m, of).times) for m, of in pairs):
            short = [
                (stop - start) * rate < frames - 1e-6
                for clip, (start, stop) in zip(self.clips, spans, strict=True)
                if stop is not None and (rate := self._rate(clip, modality))
            ]
            if short and frames > 1:
                counts = {"clips": sum(short), "of": len(short)}
                yield {"modality": modality, "frames": frames, **counts}

    def _rate(self, clip: Clip, modality: str) -> float | None:
        """Return how many different frames a second can be sampled; None if that is not known."""
        source, sampling = clip.media.get(modality), self._recipe.sampling
        if source is None or isinstance(source, SensorSource):
            return None
        if sampling.mode == "fps":
            return sampling.fps
        grid = source.fps / source.stride if isinstance(source, FrameSource) else None
        rate = grid or self._checks[source_key(source)].fps
        return rate / self._recipe.views.clips if rate else None


def _sensors(clip: Clip) -> Clip:
    media = {m: source for m, source in clip.media.items() if isinstance(source, SensorSource)}
    return replace(clip, media=media)


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
    starts = range(0, len(clips), _BATCH)
    plans = [BatchPlan(0, clips[at : at + _BATCH], [], last=False) for at in starts]
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
            bar.update(len(decoded))
    return outcomes


def _overlaps(clips: Sequence[Clip], spans: Sequence[Span]) -> dict[str, list[Any]]:
    """Find clips with the same video and span, and clips of two splits that overlap in time."""
    by_video: dict[str, list[tuple[float, float, Clip]]] = defaultdict(list)
    for clip, (start, stop) in zip(clips, spans, strict=True):
        if clip.media:
            path = str(clip.media[_main(clip)].path)
            by_video[path].append((start, inf if stop is None else stop, clip))
    same: list[list[str]] = []
    shared = [path for path, some in by_video.items() if len({one[2].split for one in some}) > 1]
    for some in by_video.values():
        some.sort(key=lambda item: item[:2])
        same += ([a[2].clip_id, b[2].clip_id] for a, b in pairwise(some) if a[:2] == b[:2])
    return {
        "same_video_and_span": same,
        "videos_in_several_splits": shared,
        "overlaps_between_splits": [pair for path in shared for pair in _leaks(by_video[path])],
    }


def _leaks(some: Sequence[tuple[float, float, Clip]]) -> Iterator[list[str]]:
    """Yield overlapping clips of different splits: each clip once, with an earlier one."""
    running: list[tuple[float, float, Clip]] = []
    for one in some:
        running = [before for before in running if before[1] > one[0]]
        others = (before[2].clip_id for before in running if before[2].split != one[2].split)
        if other := next(others, ""):
            yield [other, one[2].clip_id]
        running.append(one)
