"""Modality dropout as a schedule: what a recipe asks for, and the masks of a training's epochs.

As in `masks`, every mask is a pure function of seed, epoch, clip and settings: the same for teacher
and student, for any number of ranks, and after a resume.

N clips of a training, M modalities.
"""

import csv
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import BeforeValidator, Field, field_validator, model_validator

from karmma_pipeline import config
from karmma_pipeline.config import Recipe
from karmma_pipeline.data.loading.masks import clip_keys, draws, modality_mask, restored
from karmma_pipeline.errors import ConfigError
from karmma_pipeline.modalities import parse_label
from karmma_pipeline.store.source import TokenSource
from karmma_pipeline.store.spec import ClipNumbers

Bools = npt.NDArray[np.bool_]

# Stream of `draws` that shifts the bursts of an epoch.
_SHIFT = 2**32 + 6


class DropoutSchedule(Recipe):
    """Which modalities are dropped when: a rate that may differ and grow, or a list."""

    FREE = frozenset({"patterns"})  # what stands in the file decides

    rate: float | dict[str, float] = Field(
        0.0,
        description="Probability of dropping each present modality, or one per modality, such "
        "as {rgb: 0.1, audio: 0.5}; others are never dropped.",
    )
    ramp_epochs: int = Field(
        0, ge=0, description="Epochs over which the rate moves linearly from ramp_from to rate."
    )
    ramp_from: float = Field(0.0, ge=0, lt=1, description="Rate at the start of the ramp.")
    burst: int = Field(
        1,
        ge=1,
        description="Number of consecutive clips of a recording that lose the same "
        "modalities, as when a sensor fails for a while; 1: clips are independent.",
    )
    patterns: Path | None = Field(
        None,
        description="CSV instead of a rate: clip_id, missing (such as rgb+audio) and "
        "optionally epoch (1, 2, ...; empty: all others). Clips not in the CSV keep all "
        "modalities.",
    )

    @field_validator("rate")
    @classmethod
    def _probabilities(cls, rate: float | dict[str, float]) -> float | dict[str, float]:
        rates = rate.values() if isinstance(rate, dict) else [rate]
        if not all(0 <= one < 1 for one in rates):
            raise ValueError("a rate must be at least 0 and less than 1")
        return rate

    @model_validator(mode="after")
    def _one_of_them(self) -> "DropoutSchedule":
        drawn = self.rate != 0.0 or self.ramp_epochs or self.ramp_from or self.burst > 1
        if self.patterns is not None and drawn:
            raise ValueError("give either patterns or a rate (with ramp and bursts), not both")
        if self.ramp_from and not self.ramp_epochs:
            raise ValueError("ramp_from requires ramp_epochs")
        return self


def _dropout(value: Any) -> float | DropoutSchedule:
    """Read a rate or a schedule, with one sentence for each fault and not one for each type."""
    if isinstance(value, DropoutSchedule):
        return value
    if isinstance(value, dict):
        try:
            return config.build(DropoutSchedule, value, "of the schedule")
        except ConfigError as error:
            raise ValueError(str(error)) from None
    if isinstance(value, bool) or not isinstance(value, float | int):
        raise ValueError("Input should be a rate, such as 0.3, or a schedule, such as {rate: 0.3}")
    if not 0 <= value < 1:
        raise ValueError("Input should be at least 0 and less than 1")
    return float(value)


#: What a recipe says: a rate, or a schedule.
ModalityDropout = Annotated[float | DropoutSchedule, BeforeValidator(_dropout)]


def make_masks(
    dropout: float | DropoutSchedule,
    seed: int,
    store: TokenSource,
    clips: ClipNumbers,
    rows: Callable[[int], ClipNumbers] | None = None,
) -> Callable[[int], Bools]:
    """Return the function that draws the masks of an epoch: its number, from 0, to bool [N, M].

    Args:
        dropout: of the recipe.
        seed: of the run.
        store: where the clips lie.
        clips: int64 [N].
        rows: of an epoch, what is read of each of the clips, see `FeatureLoader`; None: these.

    Raises:
        ConfigError: it names clips or modalities that the store does not have.
    """
    keys = clip_keys(store.names(clips))

    def present(epoch: int) -> Bools:
        return store.present[clips if rows is None else rows(epoch)]

    schedule = DropoutSchedule(rate=dropout) if isinstance(dropout, float) else dropout
    if schedule.patterns is not None:
        return _from_patterns(schedule.patterns, seed, store, clips, present)
    rates = _rates(schedule, store.modalities)
    recordings = _Recordings(store, clips) if schedule.burst > 1 else None

    def masks(epoch: int) -> Bools:
        p = _at(schedule, rates, epoch)
        of = keys if recordings is None else recordings.keys(seed, epoch, keys, schedule.burst)
        return modality_mask(seed, epoch, of, present(epoch), p)

    return masks


def _rates(schedule: DropoutSchedule, modalities: Sequence[str]) -> npt.NDArray[np.float64]:
    if not isinstance(schedule.rate, dict):
        return np.full(len(modalities), schedule.rate)
    if unknown := sorted(set(schedule.rate) - set(modalities)):
        raise ConfigError(
            f"modality_dropout.rate: unknown modality {unknown[0]!r}; the store has "
            f"{', '.join(modalities)}."
        )
    return np.array([schedule.rate.get(m, 0.0) for m in modalities])


def _at(
    schedule: DropoutSchedule, rates: npt.NDArray[np.float64], epoch: int
) -> npt.NDArray[np.float64]:
    """Return the rates of an epoch, [M]; a ramp of n epochs begins to hold its rate in epoch n."""
    if epoch >= schedule.ramp_epochs:
        return rates
    start = np.where(rates > 0, schedule.ramp_from, 0.0)
    return start + (rates - start) * (epoch / schedule.ramp_epochs)


class _Recordings:
    """Which clips follow one another in a recording.

    A store does not name videos: one ends where the group (the participant) is another one or the
    times step back in the list of the clips, which follows that of the data set.
    """

    def __init__(self, store: TokenSource, clips: ClipNumbers) -> None:
        order = np.argsort(clips, kind="stable")
        group, start = store.group[clips[order]], _starts(store)[clips[order]]
        new = np.ones(len(clips), bool)
        new[1:] = (group[1:] != group[:-1]) | (start[1:] < start[:-1])
        first = np.maximum.accumulate(np.where(new, np.arange(len(clips)), 0))
        self._first = np.empty_like(order)  # of each clip: where its recording begins, ...
        self._place = np.empty_like(order)  # ... and which clip of it this is
        self._order = order
        self._first[order], self._place[order] = first, np.arange(len(clips)) - first

    def keys(
        self, seed: int, epoch: int, keys: npt.NDArray[np.uint64], burst: int
    ) -> npt.NDArray[np.uint64]:
        """Return keys with which the clips of a burst draw alike: those of its first clip.

        Where bursts begin is drawn for each recording and epoch, or the same clips would always
        fail together.
        """
        of_recording = keys[self._order[self._first]]
        shift = (draws(seed, epoch, of_recording, _SHIFT) % np.uint64(burst)).astype(np.int64)
        begin = (self._place + shift) // burst * burst - shift
        return keys[self._order[self._first + np.maximum(begin, 0)]]


def _starts(store: Any) -> npt.NDArray[np.float64]:
    """Return when clips begin, s; parts of stores and copies on a device ask what they are of."""
    if (source := getattr(store, "source", None)) is None:
        return np.asarray(store.seconds("start_s"))
    return _starts(source)[getattr(store, "clips", slice(None))]


def _from_patterns(
    path: Path,
    seed: int,
    store: TokenSource,
    clips: ClipNumbers,
    present: Callable[[int], Bools],
) -> Callable[[int], Bools]:
    patterns = read_patterns(path, store)
    names = store.names(clips)
    ids, keys = [clip_id.decode() for clip_id in names], clip_keys(names)

    def masks(epoch: int) -> Bools:
        here = present(epoch)
        kept = np.ones_like(here)
        for number in (0, epoch + 1):
            of_epoch = patterns.get(number, {})
            for row, clip_id in enumerate(ids):
                if clip_id in of_epoch:
                    kept[row] = of_epoch[clip_id]
        return restored(seed, epoch, keys, here, kept & here)

    return masks


def read_patterns(
    path: Path, store: TokenSource, key: str = "modality_dropout.patterns"
) -> dict[int, Mapping[str, Bools]]:
    """Read which modalities clips are to lack.

    Args:
        path: CSV with the columns ``clip_id`` and ``missing``, names joined by ``+``, and perhaps
            ``epoch``, from 1.
        store: whose clips and modalities they are.
        key: of the recipe, for the message.

    Returns:
        Epoch, 0 where a row states none, to clip id to what is left, bool [M].

    Raises:
        ConfigError: the file cannot be read, or a row names a clip, modality or epoch that is none.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file)
            fields = rows.fieldnames or []
            if lacking := {"clip_id", "missing"} - set(fields):
                raise ConfigError(f"{path}: has no column {min(lacking)!r}; it has {fields}.")
            known = {clip_id.decode() for clip_id in store.names().tolist()}
            read: dict[int, dict[str, Bools]] = {}
            for row in rows:
                where = f"{path}, line {rows.line_num}"
                epoch, clip_id, left = _row(row, where, store.modalities)
                if clip_id not in known:
                    raise ConfigError(f"{where}: {store.path} has no clip {clip_id!r}.")
                if clip_id in read.setdefault(epoch, {}):
                    raise ConfigError(f"{where}: {clip_id!r} is listed twice.")
                read[epoch][clip_id] = left
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{key}={str(path)!r}: {error}.") from None
    return dict(read)


def _row(
    row: Mapping[str, str | None], where: str, modalities: Sequence[str]
) -> tuple[int, str, Bools]:
    missing = parse_label(row["missing"] or "")
    if unknown := [name for name in missing if name not in modalities]:
        raise ConfigError(
            f"{where}: missing={unknown[0]!r} is not a modality; the store has "
            f"{', '.join(modalities)}; join several with +."
        )
    epoch = (row.get("epoch") or "").strip()
    if epoch and not (epoch.isdecimal() and int(epoch) > 0):
        raise ConfigError(f"{where}: epoch={epoch!r}: must be 1, 2, ... or empty.")
    return (
        int(epoch or 0),
        (row["clip_id"] or "").strip(),
        np.array([m not in missing for m in modalities]),
    )


def patterns_digest(path: Path, store: TokenSource) -> str:
    """Return what the patterns of a file say as a digest, whatever its rows' order."""
    said = {
        epoch: {clip_id: left.tolist() for clip_id, left in of.items()}
        for epoch, of in read_patterns(path, store).items()
    }
    text = json.dumps([store.modalities, said], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
