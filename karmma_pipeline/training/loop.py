"""One training loop for teacher, baselines and student: fetch, loss, step, log, save."""

import math
import time
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, field
from typing import Any, NoReturn, cast

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from karmma_pipeline import files
from karmma_pipeline.data.loading.clips import ClipModality, non_finite, non_finite_error
from karmma_pipeline.data.loading.loader import Batch, FeatureLoader
from karmma_pipeline.data.loading.masks import draws
from karmma_pipeline.errors import KarmmaError, StoppedError
from karmma_pipeline.jobs import StopFlag
from karmma_pipeline.models.fusion import TokenModel
from karmma_pipeline.models.saved import ModelCard, save_model
from karmma_pipeline.runs import RunFolder
from karmma_pipeline.store import TokenSource
from karmma_pipeline.training.clips import NEW_FOLDER
from karmma_pipeline.training.objective import Objective
from karmma_pipeline.training.optimization import (
    SCALE,
    Gradient,
    adamw,
    learning_rate,
    moving_average,
)
from karmma_pipeline.training.progress import (
    EpochTimer,
    TrainingProgress,
    TrainReport,
    on_screen,
    progress_bar,
)
from karmma_pipeline.training.ranks import Ranks
from karmma_pipeline.training.recipe import TrainRecipe
from karmma_pipeline.training.state import TensorboardWriter, save_state
from karmma_pipeline.training.validate import validate

# Stream of `draws` that seeds dropout.
_DROPOUT = 2**32 + 4


@dataclass(frozen=True)
class TrainingSetup:
    """What a training consists of.

    sources: digests of what it learns from, by name. unseen: see `validate`.
    """

    recipe: TrainRecipe
    run: RunFolder
    store: TokenSource
    model: TokenModel
    card: ModelCard
    train: FeatureLoader
    val: FeatureLoader
    device: torch.device
    ranks: Ranks
    sources: dict[str, str]
    unseen: dict[str, int] = field(default_factory=dict)


class Trainer:
    """State and loop of one training run.

    Args:
        setup: what is trained on what.
        state: a training state to resume from.
    """

    def __init__(self, setup: TrainingSetup, state: dict[str, Any] | None = None) -> None:
        self.setup, recipe = setup, setup.recipe
        self.model = setup.model.to(setup.device)
        self.ema = moving_average(self.model, recipe.ema) if recipe.ema else None
        self.optimiser = adamw(self.model, recipe.optimiser, recipe.suffix.lr)
        self.bfloat16 = recipe.precision == "bfloat16"
        self.progress = TrainingProgress()
        if state:
            self._restore(state)
        self.saved_at = time.monotonic()

    def fit(self, objective: Objective, stop: StopFlag) -> TrainReport:
        """Train to the last epoch.

        Raises:
            StoppedError: a stop was asked for; the state is saved.
            StoreError: clips have tokens that are NaN or infinite; they are named.
            KarmmaError: the loss is not finite though the tokens are.
        """
        setup, progress = self.setup, self.progress
        self.gradient = Gradient(self.model, len(objective.terms))
        setup.run.write_metrics(progress.history)
        total = setup.recipe.epochs * len(setup.train)
        with (
            files.disk_errors(setup.run.metrics),
            closing(setup.train),
            self._tensorboard() as tensorboard,
            progress_bar(total, self._step_number(), setup.card.name, setup.ranks.main) as bar,
        ):
            while not progress.finished(setup.recipe):
                timer = EpochTimer()
                self._train_epoch(objective, stop, timer, bar)
                row = self._close_epoch(stop, timer, bar)
                if tensorboard is not None:
                    tensorboard.write(row, progress.epoch)
        early = progress.epoch < setup.recipe.epochs
        return TrainReport(setup.run.path, progress.best, progress.epoch, early=early)

    def _train_epoch(
        self, objective: Objective, stop: StopFlag, timer: EpochTimer, bar: "tqdm[Any]"
    ) -> None:
        progress = self.progress
        self.model.train()
        for batch in timer.timed(self.setup.train.epoch(progress.epoch, progress.batch)):
            # Stops are looked at between steps only, and all ranks leave after the same one: the
            # state saved here is that of a whole number of steps, from which the rest follows.
            stopping, counts = self.setup.ranks.agree_to_stop(stop, objective.counts(batch))
            if stopping:
                self._save()
                stop.check(f"epoch {progress.epoch + 1}, step {progress.batch} is saved")
            progress.loss_sum += self._step(objective, batch, counts)
            progress.batch += 1
            timer.clips += len(batch.clip_index)
            if time.monotonic() - self.saved_at >= self.setup.recipe.save_every_s:
                self._save()
            bar.update()
        if progress.epoch + 1 < self.setup.recipe.epochs:
            self.setup.train.prefetch(progress.epoch + 1)  # while this one is validated

    def _step(self, objective: Objective, batch: Batch, counts: Tensor) -> float:
        """Move the weights by one batch; nothing that is not finite ever reaches them."""
        terms, norm = self._find_gradient(objective, batch, counts)
        loss = terms.pop("loss")
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self._refuse(batch, loss, norm)
        self.progress.add_step(gradient_norm=norm, **terms)
        self.optimiser.step()
        if self.ema is not None:
            self.ema.update_parameters(self.model)
        return loss

    def _find_gradient(
        self, objective: Objective, batch: Batch, counts: Tensor
    ) -> tuple[dict[str, float], float]:
        """Return the loss, its parts, and the gradient's norm, of the whole batch of all ranks."""
        self._prepare_step()
        clips = len(batch.clip_index)
        size = max(1, -(-clips // self.setup.recipe.accumulate))
        for start in range(0, clips, size):
            # ``counts`` are of the whole batch of all ranks, not of this piece: each piece adds its
            # share, so that pieces and ranks of unequal size sum to the loss of the batch.
            piece = batch.rows(slice(start, start + size)) if size < clips else batch
            terms = objective.loss(self._logits(self.model, piece), piece, counts)
            terms["loss"].backward()  # type: ignore[no-untyped-call]
            self.gradient.add_loss([terms[name] for name in objective.terms])
        self.setup.ranks.sum(self.gradient.buffer)
        values, norm = self.gradient.clip(self.setup.recipe.optimiser.clip_norm)
        return dict(zip(objective.terms, values, strict=True)), norm

    def _prepare_step(self) -> None:
        """Set learning rate and dropout, both pure functions of the step's number."""
        recipe, step, rate = self.setup.recipe, self._step_number(), self._learning_rate()
        for group in self.optimiser.param_groups:
            group["lr"] = rate * group.get(SCALE, 1.0)
        if recipe.draws:
            # Seeded anew in every step, so that no generator's state has to be saved to resume.
            rank = np.array([self.setup.ranks.rank], np.uint64)
            torch.manual_seed(int(draws(recipe.seed, step, rank, _DROPOUT)[0]))
        self.gradient.zero()

    def _learning_rate(self, step: int | None = None) -> float:
        recipe = self.setup.recipe
        step = self._step_number() if step is None else step
        return learning_rate(recipe.optimiser, step, recipe.epochs * len(self.setup.train))

    def _refuse(self, batch: Batch, loss: float, norm: float) -> NoReturn:
        """Say which clips made a step that is not finite, or that the weights diverge.

        Loss and norm are sums over all ranks, so every rank is here, and all leave together.
        """
        self._refuse_clips(non_finite(self.setup.store, batch))
        raise KarmmaError(self._diverged(batch, loss, norm))

    def _refuse_clips(self, mine: list[ClipModality]) -> None:
        bad = [one for of_rank in self.setup.ranks.gather(mine) for one in of_rank]
        if bad:
            raise non_finite_error(self.setup.store, bad, NEW_FOLDER)

    def _diverged(self, batch: Batch, loss: float, norm: float) -> str:
        with torch.no_grad():
            logits = self._logits(self.model, batch) if len(batch.clip_index) else {}
        bad = torch.zeros(len(batch.clip_index), dtype=torch.bool)
        for scores in logits.values():
            bad |= ~scores.isfinite().all(dim=1).cpu()
        rows = bad if bad.any() else ~bad
        ids = self.setup.store.clip_ids[batch.clip_index[rows].numpy()]
        names = ", ".join(i.decode() for i in ids)
        self.setup.run.log(f"loss={loss}, gradient norm={norm}; clips: {names}")
        return (
            f"{self.setup.run.path}: loss={loss} and gradient norm={norm} at epoch "
            f"{self.progress.epoch + 1}, step {self.progress.batch}, although the features are "
            "finite; this step is discarded. Lower optimiser.lr, or try precision float32. "
            f"Clips: {names[:400]}{' ... (all in log.txt)' if len(names) > 400 else '.'}"
        )

    def _logits(self, model: torch.nn.Module, batch: Batch) -> dict[str, Tensor]:
        device = self.setup.device
        with torch.autocast(device.type, torch.bfloat16, enabled=self.bfloat16):
            return model(batch.tokens_on(device), batch.mask)

    @property
    def _eval_model(self) -> TokenModel:
        """The weights that are validated and saved as a model."""
        return self.model if self.ema is None else cast("TokenModel", self.ema.module)

    def _close_epoch(self, stop: StopFlag, timer: EpochTimer, bar: "tqdm[Any]") -> dict[str, Any]:
        setup, model, how = self.setup, self._eval_model.eval(), timer.measured()
        if not self.progress.history and self.progress.batch:
            self._save()  # models without any state are those of a run whose states were removed
        try:
            values, bad = validate(
                lambda b: self._logits(model, b), setup.val, setup.ranks, stop, setup.unseen
            )
        except StoppedError:
            self._save()  # after the last step: the next start begins with the validation
            raise
        self._refuse_clips(bad)
        if values["loss"] is not None and not math.isfinite(values["loss"]):
            raise KarmmaError(
                f"{setup.run.path}: the validation loss is {values['loss']} after epoch "
                f"{self.progress.epoch + 1}; the weights have diverged. Lower optimiser.lr."
            )
        row = self.progress.close_epoch(
            values,
            setup.recipe.select_by,
            lr=self._learning_rate(self._step_number() - 1),
            device=_name(setup.device),
            ranks=setup.ranks.size,
            threads=torch.get_num_threads(),
            **how,
        )
        self._save_epoch(model, is_best=self.progress.best is row)
        bar.set_postfix({k: _percent(v) for k, v in row.items() if k.endswith("_top1")})
        tell = setup.run.log if on_screen() else setup.run.note
        tell(self._describe(row))
        return row

    def _save_epoch(self, model: TokenModel, is_best: bool) -> None:
        """Write models, metrics and, last, the state.

        Killed in between, the state before is resumed from: it trains to this place again and
        writes the same bytes over what is there.
        """
        setup = self.setup
        if setup.ranks.main:
            save_model(setup.run.path / "last", model, setup.card)
            if is_best:
                save_model(setup.run.path / "best", model, setup.card)
        setup.run.write_metrics(self.progress.history)
        self._save()

    def _describe(self, row: dict[str, Any]) -> str:
        val_loss = "unknown" if row["val_loss"] is None else f"{row['val_loss']:.4f}"
        return (
            f"epoch {self.progress.epoch}/{self.setup.recipe.epochs}: "
            f"train loss {row['train_loss']:.4f}, val loss {val_loss}, "
            f"val action {_percent(row['val_action_top1'])}"
            f"{' (best)' if self.progress.best is row else ''}; "
            f"{_rate(row['clips_per_s'])} clips/s, {row['waiting_for_data']:.1%} waiting for data"
        )

    def _tensorboard(self) -> AbstractContextManager[TensorboardWriter | None]:
        if not self.setup.ranks.main:
            return nullcontext()
        return TensorboardWriter(self.setup.run.path / "tensorboard", self.progress.epoch + 1)

    def _step_number(self) -> int:
        return self.progress.epoch * len(self.setup.train) + self.progress.batch

    def _save(self) -> None:
        self.saved_at = time.monotonic()
        self.setup.run.check()
        if not self.setup.ranks.main:
            return
        state = {
            "model": self.model.state_dict(),
            "average": self.ema.state_dict() if self.ema is not None else None,
            "optimiser": self.optimiser.state_dict(),
            "progress": dict(vars(self.progress)),
            "sources": self.setup.sources,
        }
        save_state(self.setup.run.path / "state", self._step_number(), state)

    def _restore(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        if self.ema is not None:
            self.ema.load_state_dict(state["average"])
        self.progress = TrainingProgress(**state["progress"])


def _percent(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.1f} %"


def _rate(clips_per_s: float) -> str:
    """Return a rate that does not read 0 where a clip takes seconds, as with whole backbones."""
    return f"{clips_per_s:.0f}" if clips_per_s >= 10 else f"{clips_per_s:.2g}"


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
