"""How far a run is, what it shows while it runs, and what it hands back."""

import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TypeVar

from tqdm import tqdm

from karmma_pipeline import logs
from karmma_pipeline.training.recipe import TrainRecipe

T = TypeVar("T")

HOW = ("clips_per_s", "waiting_for_data", "device", "ranks", "threads")
"""Columns of the metrics that say how and how fast an epoch was computed; all others say what came
out, and are the same however often a run was stopped."""


@dataclass
class TrainingProgress:
    """Where a run stands; all of it is in the training state."""

    epoch: int = 0
    batch: int = 0
    loss_sum: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)
    sums: dict[str, float] = field(default_factory=dict)
    """Over the steps of this epoch: the loss terms, the gradient norm, and the number of steps."""

    @classmethod
    def read(cls, metrics: Path) -> Self:
        """Read from a run's ``metrics.jsonl`` how far it is; of a run without one, nowhere."""
        lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.is_file() else []
        rows = [row for row in map(_row, lines) if {"epoch", "val_action_top1"} <= row.keys()]
        return cls(max((int(row["epoch"]) for row in rows), default=0), history=rows)

    @property
    def best(self) -> dict[str, Any]:
        """The best epoch so far, whose weights lie in ``best``."""
        if self.history and "best_epoch" in self.history[-1]:
            return self.history[int(self.history[-1]["best_epoch"]) - 1]
        # Earlier versions chose the first of those with the highest accuracy of the action.
        return max(self.history, key=lambda row: row["val_action_top1"], default={})

    def finished(self, recipe: TrainRecipe) -> bool:
        """Whether there is nothing left to train."""
        since = self.epoch - self.best.get("epoch", 0)  # epochs without a better one
        return self.epoch >= recipe.epochs or 0 < recipe.patience <= since

    def add_step(self, **values: float) -> None:
        """Count what a step measured into the means of its epoch."""
        for key, value in {**values, "steps": 1.0}.items():
            self.sums[key] = self.sums.get(key, 0.0) + value

    def close_epoch(
        self, values: Mapping[str, float | None], select_by: str, **more: Any
    ) -> dict[str, Any]:
        """Count an epoch as done; return its row of metrics.

        Args:
            values: of validation; None where no clip has a label.
            select_by: the metric that chooses the best epoch.
            more: columns of the row besides.
        """
        steps = self.sums.pop("steps", 1.0)
        row = {
            "epoch": self.epoch + 1,
            "train_loss": self.loss_sum / max(1, self.batch),
            **{f"train_{k}": of / steps for k, of in self.sums.items()},
            **{f"val_{k}": v for k, v in values.items()},
            **more,
        }
        best = self.best
        better = not best or _rank(row, select_by) > _rank(best, select_by)
        row["best_epoch"] = row["epoch"] if better else best["epoch"]
        self.history.append(row)
        self.epoch, self.batch, self.loss_sum, self.sums = self.epoch + 1, 0, 0.0, {}
        return row


def _rank(row: dict[str, Any], select_by: str) -> tuple[float, float]:
    """Return what is compared of epochs: the metric, and among equals the lower loss."""
    loss = math.inf if row["val_loss"] is None else row["val_loss"]
    if select_by == "epoch":
        return row["epoch"], 0.0
    return (-loss if select_by == "loss" else row[f"val_{select_by}"]), -loss


def _row(line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return {}  # the last line of a killed run
    return row if isinstance(row, dict) else {}


@dataclass(repr=False)
class TrainReport:
    """Where a run lies and how good it got."""

    run: Path
    best: dict[str, Any]
    epochs: int
    already_done: bool = False
    early: bool = False

    def __repr__(self) -> str:
        return self.summary()

    def summary(self) -> str:
        """Return the closing lines of the command."""
        done = " (already done)" if self.already_done else ""
        early = ", stopped early after `patience` epochs without improvement"
        scores = ", ".join(
            f"{k.removeprefix('val_').removesuffix('_top1')} {v:.1f} %"
            for k, v in self.best.items()
            if k.endswith("_top1") and v is not None
        )
        return (
            f"best epoch {self.best['epoch']:.0f} of {self.epochs}{early if self.early else ''}; "
            f"validation top-1: {scores}\n"
            f"run: {self.run}{done}, model: {self.run / 'best'}"
        )


class EpochTimer:
    """Measures how long steps take and how much of that is waiting for batches."""

    def __init__(self) -> None:
        self.waited = self.clips = 0.0
        self.started = time.monotonic()

    def timed(self, batches: Iterable[T]) -> Iterator[T]:
        """Hand on batches and measure the wait for each."""
        asked = time.monotonic()
        for batch in batches:
            self.waited += time.monotonic() - asked
            yield batch
            asked = time.monotonic()

    def measured(self) -> dict[str, float]:
        """Return clips per second since the start, and the share of waiting for data."""
        passed = max(1e-9, time.monotonic() - self.started)
        return {"clips_per_s": self.clips / passed, "waiting_for_data": self.waited / passed}


def progress_bar(total: int, done: int, name: str, shown: bool) -> "tqdm[Any]":
    """Return a bar of steps; on a screen only, a batch job's log gets a line per epoch."""
    return logs.progress_bar(
        total=total,
        initial=done,
        desc=name,
        unit="step",
        disable=None if shown else True,
        dynamic_ncols=True,
    )


def on_screen() -> bool:
    """Whether somebody watches the bar."""
    return logs.CONSOLE.isatty()
