"""Modalities: names, order, subsets, and reasons for absence.

Nothing here assumes that there are three. ``rgb``, ``flow`` and ``audio`` are the
paper's for EPIC-KITCHENS-100, ``boxes`` stand in for sound in Something-Something V2; a store
may hold others, which sort after them.
"""

import enum
from collections.abc import Iterable
from itertools import combinations

#: Stands in place of a class, in tables, for clips without any modality.
NOTHING = "no modality"

#: Canonical order: a mask's column is the modality's place in this order.
KNOWN = ("rgb", "flow", "audio", "boxes")

_LETTERS = {"rgb": "V", "flow": "F", "audio": "A", "boxes": "B"}


#: With so many modalities each of the 2^M - 1 subsets is gone through; with more, some of them.
ALL_SUBSETS_UP_TO = 6

#: How often an evaluation may pass a clip through a model with more modalities than that.
MOST_PASSES = 60


class Reason(enum.IntEnum):
    """Why a modality of a clip is absent; 0 means that it is present. Stored as uint8."""

    PRESENT = 0
    FILE_MISSING = 1
    NO_STREAM = 2
    DECODE_ERROR = 3
    TIMEOUT = 4
    OUT_OF_MEMORY = 5
    CRASHED = 6
    TOO_SHORT = 7
    OUT_OF_RANGE = 8
    BAD_VALUE = 9
    NOT_IN_DATASET = 10
    TIMESTAMP_MISMATCH = 11
    UNSAFE_FILE = 12
    NO_CHANNEL = 13
    GAP = 14
    BAD_CLOCK = 15

    @property
    def is_passing(self) -> bool:
        """Whether another try may end otherwise, unlike with what a clip is or its data set has."""
        return self not in _FINAL

    @property
    def label(self) -> str:
        """Its name in files and messages, such as ``no_stream``."""
        return self.name.lower()

    @property
    def hint(self) -> str:
        """What a user can do about it, in one sentence."""
        return _HINTS[self]

    def hint_for(self, detail: str) -> str:
        """Return the hint, or what to do with a file that the detail calls something else."""
        told = (
            f"The file is {what}: {remedy}, {_THEN}."
            for what, remedy in NO_MEDIA.items()
            if self is Reason.DECODE_ERROR and f"{what}: {remedy}" in detail
        )
        return next(told, self.hint)


#: What may lie where media should, and its remedy: a detail of ``decode_error`` has both.
NO_MEDIA = {
    "encrypted": "decrypt it, or get a copy without DRM",
    "not readable": "change its permissions",
    "an empty file": "download it again",
    "an image": "put images into a folder and name it in the column frames",
    "an archive": "unpack it",
    "a web page": "download it again",
    "a Git LFS pointer": "fetch the file with git lfs pull",
    "all zeros": "download or copy it again",
}

_FINAL = {Reason.PRESENT, Reason.NO_STREAM, Reason.NOT_IN_DATASET, Reason.TOO_SHORT}

_THEN = "then run the same command again"
_NEW = "with another folder (--set out=FOLDER)"

_HINTS = {
    Reason.PRESENT: "",
    Reason.FILE_MISSING: f"Check the path in the manifest, or download the file; {_THEN}.",
    Reason.NO_STREAM: "The file has no stream of this kind; nothing to do if it was recorded "
    "without one.",
    Reason.DECODE_ERROR: "The file is damaged or in an unknown codec; download or re-encode it, "
    f"{_THEN}.",
    Reason.TIMEOUT: "Decoding took too long; re-encode the file, or raise decode.timeout_s; "
    f"{_THEN} with --retry timeout.",
    Reason.OUT_OF_MEMORY: "Decoding took too much memory; re-encode the file, or raise "
    f"decode.memory_gb; {_THEN} with --retry out_of_memory.",
    Reason.CRASHED: f"The decoder crashed on this file; re-encode it, {_THEN}.",
    Reason.TOO_SHORT: f"The clip contains no frame or sample; correct its start and stop, {_THEN}.",
    Reason.OUT_OF_RANGE: "The clip is outside its file, or outside its audio; correct its start "
    f"and stop, or replace an incomplete file, {_THEN}.",
    Reason.BAD_VALUE: "The tokens are NaN, infinite or too large for store.dtype; try precision "
    f"float32 or store.dtype bfloat16 {_NEW}.",
    Reason.NOT_IN_DATASET: "The manifest has no file for this modality.",
    Reason.TIMESTAMP_MISMATCH: "The file has no frame near a requested time; check for missing "
    f"frames or, if its frame rate is this low, raise sampling.tolerance_s {_NEW}.",
    Reason.UNSAFE_FILE: "The file refers to other files (a playlist, an HDF5 link) or has an "
    f"implausible size; replace it with a file that contains the media itself, {_THEN}.",
    Reason.NO_CHANNEL: "The file lacks an array or a column named in the recipe; correct "
    f"the file, or channels, variable or time of the sensor, {_THEN}.",
    Reason.GAP: "Samples are missing or NaN for longer than max_gap_s; fill the gap in the "
    f"file, {_THEN}, or raise max_gap_s of the sensor and extract to another folder "
    "(--set out=FOLDER).",
    Reason.BAD_CLOCK: "Timestamps do not increase, or disagree with source_hz; correct the "
    f"file, {_THEN}, or correct unit, source_hz or rate_tolerance of the sensor and extract to "
    "another folder (--set out=FOLDER).",
}


def canonical(names: Iterable[str]) -> tuple[str, ...]:
    """Return the names without repeats, known ones first, the others by alphabet."""
    unique = set(names)
    return tuple(m for m in KNOWN if m in unique) + tuple(sorted(unique - set(KNOWN)))


def parse_label(text: str) -> tuple[str, ...]:
    """Read names that are joined by a plus, such as ``rgb + audio``; an empty text has none."""
    return tuple(name for part in text.split("+") if (name := part.strip()))


def subsets(names: Iterable[str]) -> tuple[tuple[str, ...], ...]:
    """Return all non-empty subsets, largest first, each in canonical order.

    For three modalities this is the paper's order: VFA, VF, VA, FA, V, F, A.
    """
    order = canonical(names)
    return tuple(c for size in range(len(order), 0, -1) for c in combinations(order, size))


def evaluated_subsets(names: Iterable[str]) -> tuple[tuple[str, ...], ...]:
    """Return the subsets that an evaluation goes through, largest first.

    With up to 6 modalities those are all; with more, the full set, those that lack one modality and
    those of one alone, as far as they leave one of `MOST_PASSES` for drawn masks.
    """
    order = canonical(names)
    if len(order) <= ALL_SUBSETS_UP_TO:
        return subsets(order)
    chosen = [order]
    if 1 + 2 * len(order) < MOST_PASSES:
        chosen += combinations(order, len(order) - 1)
    if 1 + len(order) < MOST_PASSES:
        chosen += combinations(order, 1)
    return tuple(chosen)


def legend(names: Iterable[str]) -> str:
    """Return what the letters of `label` stand for, such as ``V: rgb, F: flow``; empty if none."""
    return ", ".join(f"{_LETTERS[m]}: {m}" for m in canonical(names) if m in _LETTERS)


def label(subset: Iterable[str], of: Iterable[str] = ()) -> str:
    """Return a short label, ``V+F+A`` as in the paper; unknown names stand as they are.

    Args:
        subset: modalities.
        of: all modalities; if they are more than 6, ``all`` or ``all but V`` says what is missing.
    """
    order, every = canonical(subset), canonical(of)
    without = [m for m in every if m not in order]
    if len(every) > ALL_SUBSETS_UP_TO and len(without) <= 1:
        return f"all but {_LETTERS.get(without[0], without[0])}" if without else "all"
    return "+".join(_LETTERS.get(m, m) for m in order)
