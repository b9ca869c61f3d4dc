"""``karmma plan``: checks the inputs and estimates time and disk, before any GPU hour is spent.

A plan is what its JSON holds; the text for people is made from that.
"""

import math
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from karmma_pipeline.data.manifest import describe_heads
from karmma_pipeline.errors import KarmmaError, counted
from karmma_pipeline.extraction.estimate import cost
from karmma_pipeline.extraction.estimate.survey import Survey
from karmma_pipeline.extraction.progress import per_second
from karmma_pipeline.extraction.recipe import ExtractRecipe, read_clips, with_views
from karmma_pipeline.views import Views

Plan = dict[str, Any]

#: Length of an array task that is suggested.
TASK_HOURS = 4.0

# How many of a kind are named; the JSON has them all.
_EXAMPLES = 3

_size = partial(tqdm.format_sizeof, suffix="B")


def estimate(recipe: ExtractRecipe, *, probe: bool = True, calibrate: bool = True) -> Plan:
    """Look at everything that an extraction will need; nothing is written.

    Args:
        recipe: the extraction.
        probe: open every file once, to tell its length and whether it is whole.
        calibrate: extract a few clips into a temporary folder, to tell the time.

    Returns:
        What `text` says, JSON-plain: see docs/datasets.md.

    Raises:
        KarmmaError: the annotations or the recipe are faulty.
    """
    clips = read_clips(recipe.model_copy(update={"views": Views()}))
    seen = Survey(recipe, clips, probe=probe)
    manifest, views = with_views(clips, recipe.views), recipe.views.count
    problem = ""
    time: Plan = {"problem": "not measured"}
    try:
        cost.check(recipe, manifest)
        if calibrate:
            time = cost.time_per_clip(recipe, manifest, seen)
    except KarmmaError as error:  # a plan without a time is worth printing
        time["problem"] = problem = str(error)
    facts = seen.facts()
    lost = facts["clips_lost_to_faults"]
    disk = cost.disk(recipe, seen)
    if "seconds_per_clip" in time:
        time["hours"] = time["seconds_per_clip"] * views * (len(clips.clips) - lost) / 3600
        time["array_tasks"] = tasks(time["hours"], disk["shards"], TASK_HOURS)
    return {
        "found": list(manifest.notes),
        "left_out": list(manifest.left_out),
        "heads": {head: list(names) for head, names in manifest.heads.items()},
        **facts,
        "disk": disk,
        "cuts": cost.cuts(recipe),
        "time": time,
        "problem": problem,
        "too_many_lost": not recipe.allows(lost * views, len(manifest.clips)),
    }


def tasks(hours: float, shards: int, task_hours: float) -> int:
    """Return how many array tasks make parts of about that length; each needs a shard."""
    return max(1, min(shards, math.ceil(hours / task_hours)))


def text(plan: Plan, recipe: ExtractRecipe, recipe_path: Path) -> str:
    """Return the plan for people: a topic per paragraph."""
    topics = {
        "found": plan["found"],
        "heads": describe_heads(plan["heads"]),
        "clips": _clips(plan),
        "files": _files(plan),
        "present": [
            f"{modality}: {_share(count, plan['clips'])}"
            + (f"; no {modality} stream: {without:,}" if without else "")
            for modality, count in plan["present"].items()
            for without in [plan["no_stream"].get(modality, 0)]
        ],
        "short": [_short(window, recipe) for window in plan["shorter_than_window"]],
        "problems": _problems(plan, recipe),
        "disk": _disk(plan["disk"], recipe),
        "cuts": [
            f"{name}: a clip takes {', '.join(f'{_size(of)} ({cut})' for cut, of in sizes.items())}"
            for name, sizes in plan["cuts"].items()
        ],
        "time": _time(plan["time"], recipe_path),
    }
    return "\n".join(
        f"{'' if i else topic:11}{line}".rstrip()
        for topic, lines in topics.items()
        for i, line in enumerate(lines)
    )


def _share(part: int, whole: int) -> str:
    return f"{part:,} of {whole:,} ({part / whole:.1%})" if whole else f"{part:,}"


def _clips(plan: Plan) -> list[str]:
    splits = ", ".join(f"{split or '(no split)'} {n:,}" for split, n in plan["splits"].items())
    unknown = plan["clips_of_unknown_length"]
    more = f", and {counted(unknown, 'clip')} of unknown length" if unknown else ""
    where = f"{plan['clips']:,} in {counted(plan['videos'], 'video')}"
    return [f"{where}, {_duration(plan['hours'])} in total{more}: {splits}"]


def _files(plan: Plan) -> list[str]:
    files = plan["files"]
    good = files["count"] - sum(len(paths) for paths in files["faulty"].values())
    looked = "opened and complete" if files["probed"] else "found (not opened)"
    lines = [f"{_share(good, files['count'])} {looked}"]
    if plan["decoded"] < plan["clips"]:
        lines.append(
            f"clips decoded: {_share(plan['decoded'], plan['clips'])}; damage inside the "
            "other files is only found during extraction"
        )
    return lines


def _problems(plan: Plan, recipe: ExtractRecipe) -> list[str]:
    """Return a line per kind, with how many there are and the first of them."""
    kinds: dict[str, Collection[str]] = {
        **{f"{state} files": paths for state, paths in plan["files"]["faulty"].items()},
        **{f"clips lost to {reason}": clips for reason, clips in plan["lost"].items()},
        "clips with the same video, start and stop as another clip": [
            " = ".join(pair) for pair in plan["same_video_and_span"]
        ],
        "videos in several splits": plan["videos_in_several_splits"],
        "clips that overlap with another split": [
            " with ".join(pair) for pair in plan["overlaps_between_splits"]
        ],
    }
    lines = []
    for what, items in kinds.items():
        details = items if isinstance(items, Mapping) else {}
        each = [f"{name} ({details[name]})" if details.get(name) else name for name in items]
        more = ", ..." if len(each) > _EXAMPLES else ""
        lines += [f"{what} ({len(each):,}): {', '.join(each[:_EXAMPLES])}{more}"] if each else []
    if plan["lost"]:
        lost = _share(plan["clips_lost_to_faults"], plan["clips"])
        lines.append(f"clips that lose a modality: {lost}; max_failures={recipe.max_failures:g}")
    return lines or ["none found"]


def _short(window: Plan, recipe: ExtractRecipe) -> str:
    sampling, frames = recipe.sampling, window["frames"]
    rule, at = "uniform sampling", ""
    if sampling.mode == "fps":
        rule, at = sampling.short, f" at {sampling.fps:g} Hz ({frames / sampling.fps:.2f} s)"
    repeats = f"; {rule} repeats some" if window["clips"] else ""
    clips = _share(window["clips"], window["of"])
    return f"{window['modality']}: fewer than {frames} frames{at}: {clips}{repeats}"


def _disk(disk: Plan, recipe: ExtractRecipe) -> list[str]:
    lines = []
    for name, sizes in disk["token_bytes"].items():
        each = ", ".join(f"{modality} {_size(size)}" for modality, size in sizes.items())
        lines.append(f"{name}: {_size(sum(sizes.values()))} ({each})")
    total = sum(sum(sizes.values()) for sizes in disk["token_bytes"].values())
    shards = counted(disk["shards"], "shard")
    free = f"{_size(disk['free_bytes'])} free at {recipe.out}"
    return [*lines, f"total {_size(total)}, {shards} per set; {free}"]


def _time(time: Plan, recipe_path: Path) -> list[str]:
    if time["problem"]:
        return [f"unknown: {time['problem']}"]
    about = "about" if time["without_start_up"] else "at most"
    measured = counted(time["measured_on_clips"], "clip")
    rate = f"{per_second(1 / time['seconds_per_clip'])}, measured on {measured}"
    hours, tasks = time["hours"], time["array_tasks"]
    lines = [f"{about} {_duration(hours)} on one {time['device']} of this machine ({rate})"]
    if tasks > 1:
        array = f"sbatch --array=1-{tasks} extract/slurm.sbatch {recipe_path}"
        lines.append(f"{tasks} array tasks of about {_duration(hours / tasks)}: {array}")
    return lines


def _duration(hours: float) -> str:
    minutes = f"{hours * 60:.0f} min" if hours < 2 else f"{hours:,.0f} h"
    return f"{hours * 3600:.0f} s" if hours < 1 / 60 else minutes
