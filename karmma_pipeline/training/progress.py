"""How far a run is, what it shows while it runs, and what it hands back."""

import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from karmma_pipeline import logs
from karmma_pipeline.training.recipe import TrainRecipe

T = TypeVar("T")


@dataclass
class TrainingProgress:
    """Where a run stands; all of it is in the training state."""

    epoch: int = 0
    batch: int = 0
    loss_sum: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)

    @property
    def best(self) -> dict[str, float]:
        """The first epoch with the highest validation accuracy of the action."""
        return max(self.history, key=lambda row: row["val_action_top1"], default={})

    def finished(self, recipe: TrainRecipe) -> bool:
        """Whether there is nothing left to train."""
        since = self.epoch - self.best.get("epoch", 0)  # epochs without a better one
        return self.epoch >= recipe.epochs or 0 < recipe.patience <= since

    def close_epoch(self, values: dict[str, float]) -> dict[str, float]:
        """Count an epoch as done; return its row of metrics."""
        row = {
            "epoch": self.epoch + 1,
            "train_loss": self.loss_sum / max(1, self.batch),
            **{f"val_{k}": v for k, v in values.items()},
        }
        self.history.append(row)
        self.epoch, self.batch, self.loss_sum = self.epoch + 1, 0, 0.0
        return row


@dataclass
class TrainReport:
    """Where a run lies and how good it got."""

    run: Path
    best: dict[str, float]
    epochs: int
    already_done: bool = False
    early: bool = False

    def summary(self) -> str:
        """Return the closing lines of the command."""
        done = " (was already done)" if self.already_done else ""
        early = ", stopped early: no better epoch for as long as `patience` says"
        scores = ", ".join(
            f"{k.removeprefix('val_').removesuffix('_top1')} {v:.1f} %"
            for k, v in self.best.items()
            if k.endswith("_top1")
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

    def describe(self) -> str:
        """Say how fast it was since the start."""
        passed = max(1e-9, time.monotonic() - self.started)
        return f"{self.clips / passed:.0f} clips/s, {self.waited / passed:.1%} waiting for data"


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
    return sys.stderr.isatty()
