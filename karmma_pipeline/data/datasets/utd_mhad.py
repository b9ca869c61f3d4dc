"""UTD-MHAD as downloaded: 27 actions of 8 subjects, seen by a wrist sensor, a Kinect and a camera.

https://personal.utdallas.edu/~kehtar/UTD-MHAD.html (Chen, Jafari, Kehtarnavaz, ICIP 2015). Files
are called ``a{action}_s{subject}_t{trial}_{inertial|skeleton|color}``, a file per sequence, each a
whole clip: their lengths differ, and nothing says how they lie to one another in time. The
published protocol trains on subjects 1, 3, 5, 7 and tests on 2, 4, 6, 8.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from karmma_pipeline.config import Recipe
from karmma_pipeline.data.datasets.listing import Listing
from karmma_pipeline.data.manifest import Clip, Manifest
from karmma_pipeline.data.sources import FileSource, SensorSource, Source
from karmma_pipeline.errors import ManifestError

HEAD = "activity"
ACTIONS = (
    "swipe left", "swipe right", "wave", "clap", "throw", "cross arms", "basketball shoot",
    "draw x", "draw circle clockwise", "draw circle counter clockwise", "draw triangle",
    "bowling", "boxing", "baseball swing", "tennis swing", "arm curl", "tennis serve", "push",
    "knock", "catch",
    "pick up and throw", "jog", "walk", "sit to stand", "stand to sit", "lunge", "squat",
)  # fmt: skip
"""Names of the actions 1 to 27, in the order of their numbers."""

SEQUENCES = 861

_INERTIAL = {"variable": "d_iner", "source_hz": 50.0, "rate_hz": 25.0, "window": 6}
#: What the recipe's ``sensors`` may leave out: d_iner is [S, 6], acceleration in g, then rotation
#: in degrees per second; d_skel is [20, 3, S], joints in metres before the Kinect, the fourth of
#: which is the centre of the hips.
SENSORS: Mapping[str, Mapping[str, Any]] = {
    "accelerometer": {**_INERTIAL, "channels": (0, 1, 2)},
    "gyroscope": {**_INERTIAL, "channels": (3, 4, 5)},
    "skeleton": {
        "variable": "d_skel", "axis": 2, "channels": 60, "source_hz": 30.0, "rate_hz": 15.0,
        "window": 2, "centre": (9, 10, 11),
    },
}  # fmt: skip

_NAME = re.compile(
    r"a(\d{1,2})_s(\d)_t(\d{1,2})_(inertial\.mat|skeleton\.mat|color\.avi)", re.ASCII
)
_FOLDERS = ("Inertial", "Skeleton", "RGB", *(f"RGB-part{i}" for i in range(1, 5)), "")
_MODALITIES = {
    "inertial.mat": ("accelerometer", "gyroscope"),
    "skeleton.mat": ("skeleton",),
    "color.avi": ("rgb", "flow"),
}

Subject = Annotated[int, Field(ge=1, le=8)]


class UtdMhad(Recipe):
    """UTD-MHAD: accelerometer, gyroscope, skeleton and, if they are there, RGB videos."""

    kind: Literal["utd_mhad"] = Field(description="Data set.")
    root: Path = Field(description="Folder with Inertial/, Skeleton/ and optionally RGB/.")
    test_subjects: tuple[Subject, ...] = Field(
        (2, 4, 6, 8),
        description="Subjects of the test split; the default is the published protocol.",
    )
    val_subjects: tuple[Subject, ...] = Field(
        (),
        description="Subjects of the val split, for choosing the epoch without test data; all "
        "other subjects are train. The published protocol has no val split.",
        examples=[[7]],
    )

    @model_validator(mode="after")
    def _apart(self) -> Self:
        both = {*self.val_subjects} & {*self.test_subjects}
        if both:
            raise ValueError(f"val_subjects: {min(both)} is also in test_subjects")
        if not {*range(1, 9)} - {*self.val_subjects, *self.test_subjects}:
            raise ValueError("val_subjects and test_subjects leave no subject for training")
        return self

    def split(self, subject: int) -> str:
        """Return the split of a subject's sequences."""
        if subject in self.test_subjects:
            return "test"
        return "val" if subject in self.val_subjects else "train"


def read(dataset: UtdMhad) -> Manifest:
    """List the sequences by action, subject and trial; a clip's id is ``a1_s1_t1``.

    Raises:
        ManifestError: there are none, or one is of no action.
    """
    media = _media(dataset.root)
    clips = []
    for (action, subject, trial), of in sorted(media.items()):
        clip_id = f"a{action}_s{subject}_t{trial}"
        if not 1 <= action <= len(ACTIONS) or not 1 <= subject <= 8:
            raise ManifestError(
                f"{dataset.root}: {clip_id}: actions are 1 to 27 and subjects 1 to 8."
            )
        labels = {HEAD: action - 1}
        split = dataset.split(subject)
        clips.append(Clip(clip_id, of, 0.0, None, labels, split, f"s{subject}"))
    notes = [f"{len(clips):,} of the {SEQUENCES} sequences"]
    counts = Counter(modality for of in media.values() for modality in of)
    notes += [f"{modality}: {count:,} sequences" for modality, count in counts.items()]
    return Manifest(tuple(clips), {HEAD: ACTIONS}, notes=tuple(notes))


def _media(root: Path) -> dict[tuple[int, ...], dict[str, Source]]:
    """Return action, subject and trial of each sequence, and its sources by modality."""
    listing = Listing()
    found: dict[tuple[int, ...], dict[str, Source]] = defaultdict(dict)
    for folder in _FOLDERS:
        for name in listing.names(root / folder):
            if named := _NAME.fullmatch(name):
                path = root / folder / name
                source = FileSource(path) if path.suffix == ".avi" else SensorSource(path)
                key = tuple(map(int, named.group(1, 2, 3)))
                found[key] |= dict.fromkeys(_MODALITIES[named[4]], source)
    if not found:
        raise ManifestError(
            f"{root}: no sequence found; expected files such as Inertial/a1_s1_t1_inertial.mat."
        )
    return found
