"""Sensors: where their samples lie in files, and which windows of them become tokens.

A modality of its own name (``accelerometer``, ``gaze``, ``skeleton``) has a file per clip or per
recording: rows of C channels with time stamps, or at a stated rate. S samples of a series, N
windows of a clip, W samples of a window.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from karmma_pipeline.config import Recipe

#: How files of series end, in lower case.
SERIES_SUFFIXES = (".csv", ".tsv", ".txt", ".npy", ".npz", ".mat", ".h5", ".hdf5", ".parquet")

Column = Annotated[NonNegativeInt | str, Field()]

#: Seconds of a unit of time stamps.
UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}


class Sensor(Recipe):
    """One sensor: its files, its clock, and its windows; all of it stands in the store."""

    channels: PositiveInt | tuple[Column, ...] = Field(
        description="Columns that are read, by name or number from 0: [ax, ay, az] or [3, 4, 5].\n"
        "A number C: all, and a file with others than C is refused. Of arrays with more than two\n"
        "axes, numbers run through all but that of time, the last axis fastest.",
        examples=[["ax", "ay", "az"]],
    )
    rate_hz: float = Field(
        gt=0,
        description="Rate of the windows' samples; the series is resampled to it, band-limited,\n"
        "on the clip's own clock: the first sample of a clip is at its start.",
        examples=[50],
    )
    variable: str | None = Field(
        None,
        description="Array in a MAT, HDF5 or NPZ file; null: the only one of numbers in it.",
    )
    axis: int = Field(0, description="Axis of time in an array; the others are channels.")
    time: Column | None = Field(
        None,
        description="Time stamps: a column by name or number, or another array of the file. null:\n"
        "there are none, and source_hz says how far samples are apart.",
    )
    unit: Literal["s", "ms", "us", "ns"] = Field("s", description="Of the time stamps.")
    from_first: bool = Field(
        False, description="Count time stamps from the file's first one, such as Unix times."
    )
    source_hz: float | None = Field(
        None,
        gt=0,
        description="The series' own rate. Beside time stamps: what they must agree with; null:\n"
        "their median distance counts.",
    )
    rate_tolerance: float = Field(
        0.05,
        gt=0,
        description="Share by which time stamps may disagree with source_hz; beyond, bad_clock.",
    )
    offset_s: float = Field(
        0.0,
        description="Seconds that are added to the series' times: where its zero lies on the\n"
        "clips' clock.",
    )
    max_gap_s: float = Field(
        0.25,
        gt=0,
        description="Longest hole (no sample, or NaN in one of the channels) that is bridged by a\n"
        "line; one and a half samples always are. A clip with a longer one lacks the modality\n"
        "(gap), and so does one that reaches farther out of the series (out_of_range).",
    )
    windows: PositiveInt = Field(16, le=4_096, description="Windows N of a clip; each is a token.")
    window: PositiveInt = Field(
        le=1_000_000, description="Samples W of a window, at rate_hz.", examples=[25]
    )
    hop: PositiveInt | None = Field(
        None,
        description="Samples from the start of a window to that of the next, around the clip's\n"
        "centre. null: as spreads the windows evenly from its start to its stop.",
    )
    short: Literal["absent", "repeat_last"] = Field(
        "absent",
        description="A clip shorter than a window, or than all of them at a stated hop. absent:\n"
        "it lacks the modality (too_short). repeat_last: from its start, its last sample repeated.",
    )
    centre: tuple[NonNegativeInt, ...] = Field(
        (),
        description="Places among the channels, from 0, of a point that is subtracted from all\n"
        "points in every sample: [9, 10, 11] centres a skeleton of x, y, z per joint on joint 3.",
    )

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        if self.time is None and self.source_hz is None:
            raise ValueError("name the time stamps' column as time, or state source_hz")
        if isinstance(self.channels, tuple) and len({*self.channels}) != len(self.channels):
            raise ValueError(f"channels={list(self.channels)}: names one twice")
        if not self.channel_count:
            raise ValueError("channels=[]: name at least one")
        if self.centre and (
            max(self.centre) >= self.channel_count or self.channel_count % len(self.centre)
        ):
            raise ValueError(
                f"centre={list(self.centre)}: must name a whole point among the "
                f"{self.channel_count} channels, which are points of as many coordinates"
            )
        return self

    @property
    def channel_count(self) -> int:
        """Channels C that are read."""
        return self.channels if isinstance(self.channels, int) else len(self.channels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Windows N, samples W of each, channels C."""
        return self.windows, self.window, self.channel_count


def check_series_file(path: Path) -> None:
    """Refuse a file that cannot be a series by how it ends.

    Raises:
        ValueError: no such kind is read, or what reads it is not installed.
    """
    if path.suffix.lower() not in SERIES_SUFFIXES:
        raise ValueError(f"no series ends so; known are {' '.join(SERIES_SUFFIXES)}")
    if path.suffix.lower() == ".parquet" and find_spec("pyarrow") is None:
        raise ValueError(
            "Parquet files need pyarrow: pip install 'karmma-pipeline[parquet]', or save a CSV"
        )
