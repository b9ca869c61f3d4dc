"""One training loop for teacher, baselines and student: fetch, loss, step, log, save."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from karmma_pipeline.data.loader import Batch, FeatureLoader
from karmma_pipeline.errors import KarmmaError
from karmma_pipeline.jobs import StopFlag
from karmma_pipeline.metrics import action_correct, topk_correct
from karmma_pipeline.models.fusion import FusionModel
from karmma_pipeline.models.saved import ModelCard, save_model
from karmma_pipeline.runs import RunFolder
from karmma_pipeline.train.recipe import Optimiser, TrainRecipe
from karmma_pipeline.train.state import load_state, save_state

LossStep = Callable[[dict[str, Tensor], Batch], Tensor]
"""Logits and the batch (labels and masks on the device) to a scalar loss."""


@dataclass
class TrainReport:
    """Where a run lies and how good it got."""

    run: Path
    best: dict[str, float]
    already_done: bool = False

    def summary(self) -> str:
        """Return the closing lines of the command."""
        done = " (was already done)" if self.already_done else ""
        scores = ", ".join(f"{k} {v:.1f} %" for k, v in self.best.items() if "top1" in k)
        return f"run: {self.run}{done}\nbest epoch {self.best['epoch']:.0f}: {scores}"


class Trainer:
    """State and loop of one training run; resumes by itself from what its folder holds."""

    def __init__(
        self,
        recipe: TrainRecipe,
        run: RunFolder,
        model: FusionModel,
        card: ModelCard,
        loaders: tuple[FeatureLoader, FeatureLoader],
        device: torch.device,
    ) -> None:
        self.recipe, self.run, self.card, self.device = recipe, run, card, device
        self.train_loader, self.val_loader = loaders
        self.model = model.to(device)
        self.optimiser = _adamw(model, recipe.optimiser)
        self.bfloat16 = recipe.precision == "bfloat16" or (
            recipe.precision == "auto" and device.type == "cuda"
        )
        self.epoch, self.batch = 0, 0
        self.loss_sum = 0.0
        self.best: dict[str, float] = {}

    def fit(self, loss_step: LossStep, stop: StopFlag) -> TrainReport:
        """Train to the last epoch, or go on from the saved state.

        Raises:
            StoppedError: a stop was asked for; the state is saved.
            KarmmaError: the loss or the gradient is not finite; the clips are named.
        """
        self._resume()
        if self.epoch >= self.recipe.epochs:
            return TrainReport(self.run.path, self.best, already_done=True)
        self.run.keep_metrics(self.epoch)
        boards = SummaryWriter(str(self.run.path / "tensorboard"), purge_step=self.epoch)
        total = self.recipe.epochs * len(self.train_loader)
        done = self.epoch * len(self.train_loader) + self.batch
        bar = tqdm(total=total, initial=done, desc=self.card.name, unit="step")
        with boards, bar:
            while self.epoch < self.recipe.epochs:
                self._train_epoch(loss_step, stop, bar)
                values = self._close_epoch()
                bar.set_postfix({k: f"{v:.1f}" for k, v in values.items() if k.startswith("val")})
                for key, value in values.items():
                    boards.add_scalar(key, value, self.epoch)
        return TrainReport(self.run.path, self.best)

    def _train_epoch(self, loss_step: LossStep, stop: StopFlag, bar: "tqdm[Any]") -> None:
        self.model.train()
        for batch in self.train_loader.epoch(self.epoch, self.batch):
            if stop.requested:
                self._save()
                stop.check(f"epoch {self.epoch}, step {self.batch} is saved")
            self.loss_sum += self._step(loss_step, batch)
            self.batch += 1
            bar.update()

    def _step(self, loss_step: LossStep, batch: Batch) -> float:
        step = self.epoch * len(self.train_loader) + self.batch
        total = self.recipe.epochs * len(self.train_loader)
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate(self.recipe.optimiser, step, total)
        with self._autocast():
            logits = self.model(batch.tokens_on(self.device), batch.mask)
        loss = loss_step(logits, batch)
        self.optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.optimiser.clip_norm)
        value = float(loss.detach())
        if not (math.isfinite(value) and math.isfinite(float(norm))):
            raise KarmmaError(
                f"{self.run.path}: loss={value} and gradient norm={float(norm)} at epoch "
                f"{self.epoch}, step {self.batch}; the clips were {self._names(batch)}. Nothing of "
                "this step is kept; look at their features or lower optimiser.lr."
            )
        self.optimiser.step()
        return value

    def _names(self, batch: Batch) -> str:
        ids = self.train_loader.store.clip_ids[batch.clip_index.numpy()]
        return ", ".join(i.decode() for i in ids[:64])

    def _close_epoch(self) -> dict[str, float]:
        values = {
            "train_loss": self.loss_sum / max(1, self.batch),
            **{f"val_{k}": v for k, v in self.validate().items()},
        }
        self.epoch, self.batch, self.loss_sum = self.epoch + 1, 0, 0.0
        save_model(self.run.path / "last", self.model, self.card)
        if not self.best or values["val_action_top1"] > self.best["val_action_top1"]:
            self.best = {"epoch": self.epoch, **values}
            save_model(self.run.path / "best", self.model, self.card)
        self.run.log({"epoch": self.epoch, **values})
        self._save()
        return values

    @torch.inference_mode()
    def validate(self) -> dict[str, float]:
        """Return top-1 in percent per head and of the action, with every native modality."""
        self.model.eval()
        outputs: dict[str, list[Tensor]] = {}
        labels: dict[str, list[Tensor]] = {}
        for batch in self.val_loader.epoch(0):
            with self._autocast():
                logits = self.model(batch.tokens_on(self.device), batch.mask)
            for head, scores in logits.items():
                outputs.setdefault(head, []).append(scores.float().cpu())
                labels.setdefault(head, []).append(batch.labels[head])
        scores = {head: torch.cat(parts).numpy() for head, parts in outputs.items()}
        truth = {head: torch.cat(parts).numpy() for head, parts in labels.items()}
        known = np.logical_and.reduce([t >= 0 for t in truth.values()])
        top1 = {f"{h}_top1": topk_correct(scores[h], truth[h], 1)[truth[h] >= 0] for h in scores}
        top1["action_top1"] = action_correct(scores, truth, 1)[known]
        return {k: 100 * float(v.mean()) if len(v) else 0.0 for k, v in top1.items()}

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16) if self.bfloat16 else nullcontext()

    def _save(self) -> None:
        step = self.epoch * len(self.train_loader) + self.batch
        state = {
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "epoch": self.epoch,
            "batch": self.batch,
            "loss_sum": self.loss_sum,
            "best": self.best,
            "rng": torch.get_rng_state(),
            "rng_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }
        save_state(self.run.path / "state", step, state)

    def _resume(self) -> None:
        state = load_state(self.run.path / "state")
        if state is None:
            return
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.epoch, self.batch = state["epoch"], state["batch"]
        self.loss_sum, self.best = state["loss_sum"], state["best"]
        torch.set_rng_state(state["rng"])
        if state["rng_cuda"] and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(state["rng_cuda"])


def learning_rate(settings: Optimiser, step: int, total: int) -> float:
    """Return the learning rate of a step: linear warm-up, then a cosine to zero."""
    warmup = max(1, round(settings.warmup * total))
    if step < warmup:
        return settings.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return settings.lr * 0.5 * (1 + math.cos(math.pi * progress))


def _adamw(model: nn.Module, settings: Optimiser) -> torch.optim.AdamW:
    """Return AdamW that decays matrices only, not biases, norms and learned tokens."""

    def chosen(matrix: bool) -> Iterator[Tensor]:
        for name, parameter in model.named_parameters():
            if (parameter.dim() > 1 and "token" not in name) is matrix:
                yield parameter

    groups: Iterable[dict[str, Any]] = [
        {"params": list(chosen(matrix=True)), "weight_decay": settings.weight_decay},
        {"params": list(chosen(matrix=False)), "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas)
