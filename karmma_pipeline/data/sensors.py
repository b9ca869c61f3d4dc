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
        description="Columns to read, by name or by index from 0: [ax, ay, az] or [3, 4, 5]. "
        "A single number C: all columns, of which there must be C. In arrays with more than "
        "two axes, all axes but time are flattened, the last one fastest.",
        examples=[["ax", "ay", "az"]],
    )
    rate_hz: float = Field(
        gt=0,
        description="Sampling rate of the windows in Hz. The series is resampled to it "
        "(band-limited) such that the first sample of a clip is at its start.",
        examples=[50],
    )
    variable: str | None = Field(
        None,
        description="Name of the array in a MAT, HDF5 or NPZ file; null: its only numeric array.",
    )
    axis: int = Field(0, description="Time axis of an array; all other axes are channels.")
    time: Column | None = Field(
        None,
        description="Timestamps: a column by name or index, or another array of the file. "
        "null: no timestamps; samples are 1 / source_hz apart.",
    )
    unit: Literal["s", "ms", "us", "ns"] = Field("s", description="Unit of the timestamps.")
    from_first: bool = Field(
        False, description="Subtract the first timestamp of the file, for example of Unix times."
    )
    source_hz: float | None = Field(
        None,
        gt=0,
        description="Sampling rate of the file in Hz. With timestamps, they are checked "
        "against it; null: estimated from their median interval.",
    )
    rate_tolerance: float = Field(
        0.05,
        gt=0,
        description="Relative deviation of the timestamps from source_hz above which the "
        "modality is absent (bad_clock).",
    )
    offset_s: float = Field(
        0.0,
        description="Seconds to add to the series' timestamps to convert them to the clips' clock.",
    )
    max_gap_s: float = Field(
        0.25,
        gt=0,
        description="Longest gap (missing samples, or NaN in a channel) that is interpolated "
        "linearly; gaps of up to 1.5 samples always are. Clips with a longer gap lack the "
        "modality (gap), as do clips that extend farther beyond the series (out_of_range).",
    )
    windows: PositiveInt = Field(
        16, le=4_096, description="Number of windows N per clip; each becomes one token."
    )
    window: PositiveInt = Field(
        le=1_000_000, description="Samples W per window, at rate_hz.", examples=[25]
    )
    hop: PositiveInt | None = Field(
        None,
        description="Samples between the starts of consecutive windows, which are centred in "
        "the clip. null: windows are spread evenly from start to stop.",
    )
    short: Literal["absent", "repeat_last"] = Field(
        "absent",
        description="Clips shorter than a window (or than all windows at the given hop). "
        "absent: they lack the modality (too_short). repeat_last: pad with the last sample.",
    )
    centre: tuple[NonNegativeInt, ...] = Field(
        (),
        description="Channels (indices from 0) of a point that is subtracted from all points "
        "of each sample: [9, 10, 11] centres a skeleton with x, y, z per joint on joint 3.",
    )

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        if self.time is None and self.source_hz is None:
            raise ValueError("set time (the column of timestamps) or source_hz")
        if isinstance(self.channels, tuple) and len({*self.channels}) != len(self.channels):
            raise ValueError(f"channels={list(self.channels)}: duplicate channel")
        if not self.channel_count:
            raise ValueError("channels=[]: name at least one")
        if self.centre and (
            max(self.centre) >= self.channel_count or self.channel_count % len(self.centre)
        ):
            raise ValueError(
                f"centre={list(self.centre)}: must be the channels of one point; the "
                f"{self.channel_count} channels are split into points of this many coordinates"
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
        raise ValueError(f"unknown file extension; known: {' '.join(SERIES_SUFFIXES)}")
    if path.suffix.lower() == ".parquet" and find_spec("pyarrow") is None:
        raise ValueError(
            "Parquet files need pyarrow: pip install 'karmma-pipeline[parquet]', or save a CSV"
        )
