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
from karmma_pipeline.errors import ConfigError, KarmmaError, ManifestError, counted
from karmma_pipeline.extraction.estimate import cost
from karmma_pipeline.extraction.estimate.survey import Survey
from karmma_pipeline.extraction.inference.openvino_engine import FASTER
from karmma_pipeline.extraction.recipe import ExtractRecipe, read_clips, with_views
from karmma_pipeline.extraction.report import per_second
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
    problem = cost.problem(recipe, manifest)
    time: Plan = {"seconds_per_clip": None, "problem": "not measured", "faster_with_openvino": []}
    if calibrate:
        try:  # a plan without a time is worth printing
            time["faster_with_openvino"] = cost.faster_with_openvino(recipe)
            time |= cost.time_per_clip(recipe, manifest, seen)
        except KarmmaError as error:
            time["problem"] = str(error)
            # Without such a device here or clips it is unknown; else extraction ends so.
            if not isinstance(error, ConfigError | ManifestError):
                problem = problem or str(error)
    facts, clip_s = seen.facts(), time["seconds_per_clip"]
    lost = facts["clips_lost_to_faults"]
    hours = None if clip_s is None else clip_s * views * (len(clips.clips) - lost) / 3600
    disk = cost.disk(recipe, manifest, {m: of.repeat(views) for m, of in seen.reasons().items()})
    return {
        "found": list(manifest.notes),
        "left_out": list(manifest.left_out),
        "heads": {head: list(names) for head, names in manifest.heads.items()},
        **facts,
        "disk": disk,
        "cuts": cost.cuts(recipe),
        "time": {**time, "hours": hours},
        "array_tasks": None if hours is None else tasks(hours, disk["shards"], TASK_HOURS),
        "problem": problem,
        "too_many_lost": not recipe.allows(lost * views, len(manifest.clips)),
    }


def tasks(hours: float, shards: int, task_hours: float) -> int:
    """Return how many array tasks make parts of about that length; each needs a shard."""
    return max(1, min(shards, math.ceil(hours / task_hours)))


def text(plan: Plan, recipe: ExtractRecipe, recipe_path: Path) -> str:
    """Return the plan for people: a topic per paragraph."""
    same = [" = ".join(pair) for pair in plan["same_video_and_span"]]
    twice = _named("clips have the same video and span as another clip", same)
    topics = {
        "found": plan["found"],
        "heads": describe_heads(plan["heads"]),
        "clips": _clips(plan),
        "files": _files(plan),
        "present": _presence(plan, recipe),
        "short": _short(plan["shorter_than_window"], recipe),
        "duplicates": twice or ["no two clips have the same video and span"],
        "splits": _splits(plan),
        "disk": _disk(plan["disk"], recipe),
        "cuts": [
            f"{name}: a clip takes {', '.join(f'{_size(of)} ({cut})' for cut, of in sizes.items())}"
            for name, sizes in plan["cuts"].items()
        ],
        "time": _time(plan, recipe_path),
    }
    return "\n".join(
        f"{'' if i else topic:11}{line}".rstrip()
        for topic, lines in topics.items()
        for i, line in enumerate(lines)
    )


def _share(part: int, whole: int) -> str:
    return f"{part:,} of {whole:,} ({part / whole:.1%})" if whole else f"{part:,}"


def _named(what: str, items: Collection[str]) -> list[str]:
    """Return a line with their number and the first of them, no line if there are none.

    Args:
        what: they are.
        items: their names; a mapping has a detail of each.
    """
    details = items if isinstance(items, Mapping) else {}
    each = [f"{name} ({details[name]})" if details.get(name) else name for name in items]
    more = ", ..." if len(each) > _EXAMPLES else ""
    return [f"{len(each):,} {what}: {', '.join(each[:_EXAMPLES])}{more}"] if each else []


def _clips(plan: Plan) -> list[str]:
    splits = ", ".join(f"{split or '(no split)'} {n:,}" for split, n in plan["splits"].items())
    length = f"{_duration(plan['hours'])} in total, median length {plan['median_s']:.2f} s"
    unknown = plan["clips_of_unknown_length"]
    more = f"; {unknown:,} are whole files of unknown length" if unknown else ""
    return [f"{plan['clips']:,} in {counted(plan['videos'], 'video')}: {splits}", length + more]


def _files(plan: Plan) -> list[str]:
    files = plan["files"]
    kinds = ", ".join(f"{n:,} {kind}" for kind, n in files["kinds"].items())
    bad = sum(len(paths) for paths in files["faulty"].values())
    good = f"{sum(files['kinds'].values()) - bad:,}" if bad else "all"
    looked = "opened and complete" if files["probed"] else "found (not opened)"
    lines = [f"{kinds}: {good} {looked}"]
    if files["kinds"].keys() - {"sensor files"} and plan["decoded"] < plan["clips"]:
        lines.append(
            f"{_share(plan['decoded'], plan['clips'])} clips were decoded; damage inside the "
            "files of the others is only found during extraction"
        )
    return [*lines, *(line for of in files["faulty"].items() for line in _named(*of))]


def _presence(plan: Plan, recipe: ExtractRecipe) -> list[str]:
    lines = []
    for modality, count in plan["present"].items():
        without = plan["no_stream"].get(modality)
        more = f"; {without:,} recorded without it" if without else ""
        lines.append(f"{modality}: {_share(count, plan['clips'])} clips{more}")
    lines += _named("clips stop after the end of their file", plan["stop_after_end"])
    for reason, clips in plan["lost"].items():
        lines += _named(f"clips lost ({reason})", clips)
    if plan["clips_lost_to_faults"]:
        lost = _share(plan["clips_lost_to_faults"], plan["clips"])
        verdict = f"{'more' if plan['too_many_lost'] else 'no more'} than max_failures"
        lines.append(f"lost to errors: {lost}, {verdict}={recipe.max_failures:g} allows")
    return lines


def _short(windows: list[Plan], recipe: ExtractRecipe) -> list[str]:
    lines = []
    rule = recipe.sampling.short if recipe.sampling.mode == "fps" else "uniform sampling"
    for one in windows:
        at = f" at {recipe.sampling.fps:g} Hz ({one['seconds']:.2f} s)" if one["seconds"] else ""
        line = f"{_share(one['clips'], one['of'])} clips have fewer than {one['frames']} frames"
        repeats = f"; {rule} repeats some" if one["clips"] else ""
        lines.append(f"{one['modality']}: {line}{at}{repeats}")
    return lines


def _splits(plan: Plan) -> list[str]:
    shared = _named("videos with clips in several splits", plan["videos_in_several_splits"])
    pairs = [" with ".join(pair) for pair in plan["overlaps_between_splits"]]
    lines = [*shared, *_named("clips overlap in time with clips of another split", pairs)]
    none = "one split" if len(plan["splits"]) < 2 else "no video is in more than one split"
    return lines or [none]


def _disk(disk: Plan, recipe: ExtractRecipe) -> list[str]:
    lines = []
    for name, sizes in disk["token_bytes"].items():
        each = ", ".join(f"{modality} {_size(size)}" for modality, size in sizes.items())
        lines.append(f"{name}: {_size(sum(sizes.values()))} ({each})")
    total, whole = disk["total_bytes_about"], disk["total_bytes_about_without_faults"]
    lines.append(
        f"total {_size(total)} in shards of {recipe.store.clips_per_shard} clips, "
        f"{disk['shards']:,} per set; {_size(disk['free_bytes'])} free at {recipe.out}"
    )
    return [*lines, *([f"{_size(whole)} if no clip is lost"] if whole > total else [])]


def _time(plan: Plan, recipe_path: Path) -> list[str]:
    time, hours, tasks = plan["time"], plan["time"]["hours"], plan["array_tasks"]
    if hours is None:
        return [f"unknown: {time['problem']}"]
    about = "about" if time["without_start_up"] else "at most"
    measured = (
        f"{per_second(1 / time['seconds_per_clip'])}, measured on {time['measured_on_clips']}"
    )
    lines = [f"{about} {_duration(hours)} on one {time['device']} like this ({measured} clips)"]
    if names := time["faster_with_openvino"]:
        each = ", ".join(f"{name} ({FASTER[name]})" for name in names)
        lines.append(
            f"openvino is installed and was measured to be faster for {each}: set engine: openvino"
        )
    if tasks > 1:
        array = f"sbatch --array=1-{tasks} extract/slurm.sbatch {recipe_path}"
        lines.append(f"{tasks} array tasks of about {_duration(hours / tasks)}: {array}")
    return lines


def _duration(hours: float) -> str:
    minutes = f"{hours * 60:.0f} min" if hours < 2 else f"{hours:,.0f} h"
    return f"{hours * 3600:.0f} s" if hours < 1 / 60 else minutes
