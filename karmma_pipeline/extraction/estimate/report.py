"""``karmma plan``: checks the inputs and estimates time and disk, before any GPU hour is spent."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from karmma_pipeline.data.manifest import Manifest
from karmma_pipeline.errors import KarmmaError
from karmma_pipeline.extraction.estimate import cost
from karmma_pipeline.extraction.estimate.cost import Disk, Time
from karmma_pipeline.extraction.estimate.survey import EXAMPLES, Survey, survey
from karmma_pipeline.extraction.recipe import ExtractRecipe, read_clips
from karmma_pipeline.extraction.report import per_second

TASK_HOURS = 4.0
"""Length of an array task that is suggested."""


@dataclass(frozen=True)
class Estimate:
    """Everything the command says; see `Survey`, `Disk` and `Time`."""

    recipe: ExtractRecipe
    notes: Sequence[str]
    survey: Survey
    disk: Disk
    disk_if_whole: Disk
    time: Time

    @property
    def hours(self) -> float | None:
        """Hours of the whole extraction on one device like this one."""
        if self.time.clip_s is None:
            return None
        return self.time.clip_s * (self.survey.clips - self.survey.lost) / 3600

    @property
    def tasks(self) -> int | None:
        """Suggested number of array tasks."""
        if self.hours is None:
            return None
        return cost.tasks(self.hours, self.disk.shards, TASK_HOURS)

    @property
    def too_many_lost(self) -> bool:
        """Whether the extraction would end with exit code 3."""
        return self.survey.lost > self.recipe.max_failures * self.survey.clips

    def text(self, recipe_path: Path) -> str:
        """Return the plan for people: a topic per paragraph."""
        return "\n".join(f"{topic:11}{line}".rstrip() for topic, line in self._lines(recipe_path))

    def _lines(self, recipe_path: Path) -> Iterator[tuple[str, str]]:
        yield from _topic("found", self.notes)
        yield from _topic("clips", _clips(self.survey))
        yield from _topic("files", _files(self.survey))
        yield from _topic("present", _presence(self.survey, self.recipe))
        yield from _topic("short", _short(self.survey, self.recipe))
        yield from _topic("duplicates", _duplicates(self.survey))
        yield from _topic("splits", _splits(self.survey))
        yield from _topic("disk", _disk(self))
        yield from _topic("time", _time(self, recipe_path))

    def facts(self) -> dict[str, Any]:
        """Return the plan for programs, JSON-plain."""
        one = self.survey
        return {
            "found": list(self.notes),
            "clips": one.clips,
            "hours": round(one.hours, 4),
            "clips_of_unknown_length": one.unknown,
            "splits": dict(sorted(one.splits.items())),
            "files": {
                "probed": one.probed,
                "kinds": dict(sorted(one.kinds.items())),
                "faulty": {
                    state: {str(p): one.details[p] for p in sorted(paths)}
                    for state, paths in sorted(one.states.items())
                },
            },
            "present": {m: int(there.sum()) for m, there in one.present.items()},
            "no_stream": dict(sorted(one.no_stream.items())),
            "clips_lost_to_faults": one.lost,
            "start_after_end": one.starts_after_video_end,
            "stop_after_end": one.ends_after_video_end,
            "stop_too_far_after_end": one.beyond_tolerance,
            "shorter_than_window": [
                {
                    "modality": w.modality,
                    "frames": w.frames,
                    "seconds": w.seconds,
                    "clips": w.short,
                    "of": w.of,
                }
                for w in one.windows
            ],
            "same_video_and_span": [list(pair) for pair in one.duplicates],
            "videos_in_several_splits": one.shared_videos,
            "overlaps_between_splits": [list(pair) for pair in one.split_leaks],
            "disk": {
                "token_bytes": {s: dict(of) for s, of in self.disk.tokens.items()},
                "table_bytes_about": self.disk.tables,
                "total_bytes_about": self.disk.total,
                "total_bytes_about_without_faults": self.disk_if_whole.total,
                "free_bytes": self.disk.free,
                "shards": self.disk.shards,
            },
            "time": {
                "device": self.time.device,
                "measured_on_clips": self.time.clips,
                "seconds_per_clip": self.time.clip_s,
                "without_start_up": self.time.steady,
                "hours": self.hours,
                "problem": self.time.problem,
            },
            "array_tasks": self.tasks,
            "too_many_lost": self.too_many_lost,
        }


def estimate(recipe: ExtractRecipe, *, probe: bool = True, calibrate: bool = True) -> Estimate:
    """Look at everything that an extraction will need; nothing is written.

    Args:
        recipe: the extraction.
        probe: open every file once, to tell its length and whether it is whole.
        calibrate: extract a few clips into a temporary folder, to tell the time.

    Raises:
        KarmmaError: the annotations or the recipe are faulty.
    """
    manifest = read_clips(recipe)
    inputs = survey(recipe, manifest, probe=probe)
    space = cost.disk(recipe, manifest, inputs.present)
    whole = cost.disk(recipe, manifest, inputs.wanted)
    time = _measure(recipe, manifest, inputs) if calibrate else Time(problem="not measured")
    return Estimate(recipe, manifest.notes, inputs, space, whole, time)


def _measure(recipe: ExtractRecipe, manifest: Manifest, inputs: Survey) -> Time:
    """A plan without a time is worth printing: what stands in the way is said in its place."""
    try:
        return cost.time_per_clip(recipe, manifest, inputs.present)
    except KarmmaError as error:
        return Time(problem=str(error))


def _topic(name: str, lines: Sequence[str]) -> Iterator[tuple[str, str]]:
    yield from ((name if i == 0 else "", line) for i, line in enumerate(lines))


def _share(part: int, whole: int) -> str:
    return f"{part:,} of {whole:,} ({part / whole:.1%})" if whole else f"{part:,}"


def _examples(items: Sequence[object]) -> str:
    shown = ", ".join(str(item) for item in items[:EXAMPLES])
    return shown + (", ..." if len(items) > EXAMPLES else "")


def _clips(one: Survey) -> list[str]:
    named = {split or "(no split)": n for split, n in one.splits.items()}
    splits = ", ".join(f"{split} {n:,}" for split, n in named.items())
    lines = [f"{one.clips:,} in {one.videos:,} videos: {splits}"]
    if one.hours:
        together = _duration(one.hours)
        lines.append(f"{together} together, half of them shorter than {one.median_s:.2f} s")
    if one.unknown:
        lines.append(f"{one.unknown:,} are whole files of unknown length")
    return lines


def _files(one: Survey) -> list[str]:
    kinds = ", ".join(f"{n:,} {kind}" for kind, n in one.kinds.most_common())
    bad = sum(len(paths) for paths in one.states.values())
    looked = "opened and found whole" if one.probed else "there (not opened)"
    good = one.kinds.total() - bad
    lines = [f"{kinds}: {f'{good:,}' if bad else 'all'} {looked}"]
    for state, paths in sorted(one.states.items()):
        named = [f"{p} ({one.details[p]})" if one.details[p] else p for p in paths]
        lines.append(f"{len(paths):,} {state}: {_examples(named)}")
    return lines


def _presence(one: Survey, recipe: ExtractRecipe) -> list[str]:
    lines = []
    for modality, there in one.present.items():
        line = f"{modality}: {_share(int(there.sum()), one.clips)} clips"
        if one.no_stream[modality]:
            line += f"; {one.no_stream[modality]:,} were recorded without"
        lines.append(line)
    if one.starts_after_video_end:
        lines.append(f"start after their file's end: {_examples(one.starts_after_video_end)}")
    if one.ends_after_video_end:
        lines.append(
            f"stop after their file's end and are cut there, {len(one.ends_after_video_end):,}: "
            f"{_examples(one.ends_after_video_end)}"
        )
    if one.beyond_tolerance:
        lines.append(
            f"stop more than {recipe.sampling.tolerance_s:g} s after their file's end, "
            f"{len(one.beyond_tolerance):,}: {_examples(one.beyond_tolerance)}"
        )
    if one.lost:
        verdict = "more" if one.lost > recipe.max_failures * one.clips else "no more"
        lines.append(
            f"lost to faults: {_share(one.lost, one.clips)}, {verdict} than "
            f"max_failures={recipe.max_failures:g} allows"
        )
    return lines


def _short(one: Survey, recipe: ExtractRecipe) -> list[str]:
    rule = recipe.sampling.short if recipe.sampling.mode == "fps" else "uniform sampling"
    groups: dict[tuple[int, float | None, int, int], list[str]] = {}
    for w in one.windows:
        groups.setdefault((w.frames, w.seconds, w.short, w.of), []).append(w.modality)
    return [
        f"{'+'.join(modalities)}: {_share(short, of)} clips have fewer than {frames} frames"
        + (f" at {recipe.sampling.fps:g} Hz ({seconds:.2f} s)" if seconds else "")
        + (f"; {rule} repeats some" if short else "")
        for (frames, seconds, short, of), modalities in groups.items()
    ]


def _duplicates(one: Survey) -> list[str]:
    if not one.duplicates:
        return ["no two clips have the same video and span"]
    pairs = [f"{a} = {b}" for a, b in one.duplicates]
    return [f"{len(pairs):,} clips have the video and span of another: {_examples(pairs)}"]


def _splits(one: Survey) -> list[str]:
    if len(one.splits) < 2:
        return ["one split"]
    if not one.shared_videos:
        return ["no video is in two splits"]
    shared = one.shared_videos
    lines = [f"{len(shared):,} videos have clips in several splits: {_examples(shared)}"]
    pairs = [f"{a} with {b}" for a, b in one.split_leaks]
    if pairs:
        lines.append(
            f"{len(pairs):,} clips overlap in time with a clip of another split: {_examples(pairs)}"
        )
    return lines


def _disk(plan: Estimate) -> list[str]:
    space, whole = plan.disk, plan.disk_if_whole.total
    lines = [
        f"{name}: {_bytes(sum(of.values()))} ("
        + ", ".join(f"{modality} {_bytes(size)}" for modality, size in of.items())
        + ")"
        for name, of in space.tokens.items()
    ]
    enough = "" if space.total < space.free else "; THAT IS NOT ENOUGH"
    lines.append(
        f"together {_bytes(space.total)} in shards of {plan.recipe.store.clips_per_shard} clips, "
        f"{space.shards:,} per set; "
        f"{_bytes(space.free)} are free at {plan.recipe.out}{enough}"
    )
    if whole > space.total:
        lines.append(f"{_bytes(whole)} once no clip is lost to faults any more")
    return lines


def _bytes(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.3g} TB"


def _time(plan: Estimate, recipe_path: Path) -> list[str]:
    if plan.hours is None or plan.time.clip_s is None:
        return [f"unknown: {plan.time.problem}"]
    hours = plan.hours
    about = "about" if plan.time.steady else "at most"
    lines = [
        f"{about} {_duration(hours)} on one {plan.time.device} like this "
        f"({per_second(1 / plan.time.clip_s)}, measured on {plan.time.clips} clips)"
    ]
    tasks = plan.tasks or 1
    if tasks > 1:
        lines.append(
            f"{tasks} array tasks of about {_duration(hours / tasks)}: "
            f"sbatch --array=1-{tasks} extract/slurm.sbatch {recipe_path}"
        )
    return lines


def _duration(hours: float) -> str:
    if hours < 1 / 60:
        return f"{hours * 3600:.0f} s"
    return f"{hours * 60:.0f} min" if hours < 2 else f"{hours:,.0f} h"
