"""What may differ between two programs that do the same: the whole list, each with its reason.

A program that is changed on purpose gets a line here, and the line names the change. Every file
that no rule names is compared byte by byte.
"""

import csv
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from io import BytesIO
from typing import Any

import torch
import yaml

Normalise = Callable[[bytes], bytes]


def ignored(data: bytes) -> bytes:
    """Compare only that the file is there."""
    return b""


def without(*keys: str) -> Normalise:
    """Compare JSON, or YAML, without some dotted keys; ``*`` is any name or place."""

    def normalise(data: bytes) -> bytes:
        tree = yaml.safe_load(data) if not data.startswith(b"{") else json.loads(data)
        for key in keys:
            _drop(tree, key.split("."))
        return json.dumps(tree, indent=1).encode()

    return normalise


MORE_RESULTS = (
    *("methods", "differences", "warnings", "probes", "probe_notes"),
    *(f"runs.*.{name}" for name in ("trained_on", "chosen_on", "confusion", "calibration")),
    "runs.*.robustness",
)


def renamed(names: Mapping[str, str]) -> Normalise:
    """Compare JSON, or YAML, after keys were given the new names, wherever they stand."""

    def change(tree: Any) -> Any:
        if isinstance(tree, dict):
            return {names.get(key, key): change(value) for key, value in tree.items()}
        return [change(one) for one in tree] if isinstance(tree, list) else tree

    def normalise(data: bytes) -> bytes:
        return json.dumps(change(yaml.safe_load(data)), indent=1).encode()

    return normalise


def replaced(pattern: str, by: str = "") -> Normalise:
    """Compare text after every match of a pattern was replaced."""
    return lambda data: re.sub(pattern, by, data.decode()).encode()


def failures(data: bytes) -> bytes:
    """Compare what failed and why: the older program has no detail, and other names and hints."""
    names = {"time_off": "timestamp_mismatch", "refused": "unsafe_file"}
    rows = csv.DictReader(data.decode().splitlines())
    kept = [(r["clip_id"], r["modality"], r["stage"], r["reason"]) for r in rows]
    return repr([(*row, names.get(reason, reason)) for *row, reason in kept]).encode()


def notes(data: bytes) -> bytes:
    """Compare notes of media; the older program does not note what was wrong with them."""
    rows = [json.loads(line) for line in data.decode().splitlines() if line]
    return repr([{k: v for k, v in row.items() if k != "faults"} for row in rows]).encode()


def state(data: bytes) -> bytes:
    """Compare what a training state says; behind its digest lies a pickle.

    The bytes of a pickle depend on which equal strings are one object.
    """
    tree = torch.load(BytesIO(data[32:]), map_location="cpu", weights_only=True)
    tree.pop("bad", None)  # clips that are not finite, which older programs took as absent
    progress = tree.get("progress", {})
    progress.pop("sums", None)  # of the columns that were added
    for row in progress.get("history", []):
        for column in NEW_COLUMNS:
            row.pop(column, None)
    if "sources" in tree:  # their names held paths
        tree["sources"] = list(tree["sources"].values())
    return "\n".join(_plain(tree)).encode()


NEW_KEYS = (
    *("version", "select_by", "init_from", "allow_unfinished", "precision"),
    *("position_std", "kl_clips", "cross_fitted", "views"),
)
NEW_COLUMNS = (
    "best_epoch",
    "clips_per_s",
    "device",
    "lr",
    "ranks",
    "threads",
    "train_cross_entropy",
    "train_gradient_norm",
    "train_kl",
    "waiting_for_data",
)


def metrics(data: bytes) -> bytes:
    """Compare the columns that the older program has."""
    rows = [json.loads(line) for line in data.decode().splitlines()]
    old = [{k: v for k, v in row.items() if k not in NEW_COLUMNS} for row in rows]
    return "".join(f"{json.dumps(row)}\n" for row in old).encode()


def events(data: bytes) -> bytes:
    """Compare the numbers of a TensorBoard file, without the time of day."""
    from tensorboard.compat.proto.event_pb2 import Event

    lines, at = set(), 0
    while at < len(data):
        size = int.from_bytes(data[at : at + 8], "little")
        event = Event.FromString(data[at + 12 : at + 12 + size])
        lines |= {
            f"{event.step} {value}" for value in event.summary.value if value.tag not in NEW_COLUMNS
        }
        at += 12 + size + 4
    return "\n".join(sorted(lines)).encode()


@dataclass(frozen=True)
class Rule:
    """How some files are compared.

    Attributes:
        files: pattern of their names under the folder of results.
        killed: this counts only where the old program was killed and the new one went on.
    """

    files: str
    normalise: Normalise
    why: str
    killed: bool = False


RULES = (
    Rule("*/log.txt", ignored, "sentences for people, with the time of day"),
    Rule("*/environment.json", without("command", "commit"), "where the program lies"),
    Rule(
        "*/extract.json",
        without(
            "bound",
            "clips_per_s",
            "cpu_seconds",
            "cpu_seconds_decoding",
            "seconds",
            "seconds_gpu_busy",
            "seconds_writing_beside",
            "peak_memory_bytes",
        ),
        "measured",
    ),
    Rule("*/extract.json", ignored, "tells of the last run only", killed=True),
    Rule("*/media_notes/*", ignored, "clips that are read again are noted again", killed=True),
    Rule(
        "*/recipe.yaml",
        without("exclude", "bad_clips", *NEW_KEYS),
        "clips whose tokens are not finite stop a training and may be excluded; newer keys, and "
        "the precision that was settled",
    ),
    Rule("*/recipe.yaml", renamed({"layout": "memory_format"}), "the key has a new name"),
    Rule(
        "*/model.json",
        without(
            "stores", "training.exclude", "training.bad_clips", *(f"training.{k}" for k in NEW_KEYS)
        ),
        "the same; and the order in which stores were joined",
    ),
    Rule("*/metrics.jsonl", metrics, "columns were added"),
    Rule("*/media_notes/*", notes, "details of faults are noted"),
    Rule("*/failures.csv", failures, "a column for details, two reasons' names, hints"),
    Rule("*/state/*.pt", state, "a pickle of the same has no fixed bytes"),
    Rule("*/tensorboard/*", ignored, "a file for each start, the first one torn", killed=True),
    Rule("*/tensorboard/*", events, "the time of day"),
    Rule(
        "out/report/results.json",
        without("commit", *MORE_RESULTS),
        "the program's own version; methods and the differences between them came later",
    ),
    Rule("out/report/index.html", ignored, "reworded: 'Majority class', 'Environment' and others"),
)


NAMES = (
    (r"events\.out\.tfevents\..*", "events"),  # TensorBoard's has the time and the host
    (r"tar_index/[0-9a-f]+\.npy", "tar_index/one.npy"),  # from the tar's own path and time
)
"""Names that two programs do not give alike, and under which name they meet."""

LEFT = (
    *("*/tar_index/.*.tmp", "*/.lock", "*/report/predictions*"),
    *("*/report/figures/*", "*/report/tables/*"),
)
"""What is not compared: leftovers of a killed program, locks, tables that the older one lacks, and
those of methods that once were of runs; all follow from results.json."""


def name_of(path: str) -> str:
    """Return the name under which two programs' files meet."""
    for pattern, name in NAMES:
        path = re.sub(pattern, name, path)
    return path


def normalised(path: str, data: bytes, killed: bool) -> bytes:
    """Return of a file what is to be the same."""
    for rule in RULES:
        if fnmatch(path, rule.files) and killed >= rule.killed:
            data = rule.normalise(data) if data else data
    return data


def _drop(tree: Any, keys: list[str]) -> None:
    names = range(len(tree)) if isinstance(tree, list) else list(tree) if tree else []
    for name in names:
        if keys[0] not in ("*", str(name)):
            continue
        if len(keys) > 1:
            if isinstance(tree[name], dict | list):
                _drop(tree[name], keys[1:])
        elif isinstance(tree, dict):
            del tree[name]


def _plain(value: Any, name: str = "") -> list[str]:
    if isinstance(value, dict):
        return [line for key in value for line in _plain(value[key], f"{name}.{key}")]
    if isinstance(value, list | tuple):
        return [line for i, one in enumerate(value) for line in _plain(one, f"{name}.{i}")]
    if isinstance(value, torch.Tensor):
        return [f"{name} {value.dtype} {value.shape} {value.numpy().tobytes().hex()}"]
    return [f"{name} {value!r}"]
