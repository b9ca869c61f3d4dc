"""The three trainings: teacher, baseline, distilled student; they differ in one loss function."""

from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from karmma_pipeline.data.loader import Batch, FeatureLoader
from karmma_pipeline.data.opening import open_source
from karmma_pipeline.data.store import TokenSource
from karmma_pipeline.errors import ManifestError
from karmma_pipeline.jobs import StopFlag
from karmma_pipeline.models.device import pick_device
from karmma_pipeline.models.fusion import FusionModel
from karmma_pipeline.models.saved import ModelCard
from karmma_pipeline.runs import RunFolder
from karmma_pipeline.train.loop import LossStep, Trainer, TrainReport
from karmma_pipeline.train.objective import cross_entropy, distillation
from karmma_pipeline.train.recipe import BaselineRecipe, DistillRecipe, TeacherRecipe, TrainRecipe
from karmma_pipeline.train.table import TeacherTable, teacher_table

_STATISTICS_CLIPS = 2048
"""Clips over which the scale of features is measured."""


def train_teacher(recipe: TeacherRecipe, stop: StopFlag | None = None) -> TrainReport:
    """Train a teacher with cross-entropy under modality dropout."""
    return _train(recipe, "teacher", lambda *_: _ce_step(recipe), stop)


def train_baseline(recipe: BaselineRecipe, stop: StopFlag | None = None) -> TrainReport:
    """Train the student's architecture with cross-entropy alone."""
    return _train(recipe, "baseline", lambda *_: _ce_step(recipe), stop)


def distill(recipe: DistillRecipe, stop: StopFlag | None = None) -> TrainReport:
    """Train a student with the paper's combination of distillation and cross-entropy."""

    def make(store: TokenSource, clips: np.ndarray, device: torch.device) -> LossStep:
        table = teacher_table(
            recipe.out / "teacher_table",
            recipe.teacher / "best",
            recipe.teacher_store,
            store,
            clips,
            device,
            stop or StopFlag(),
        )
        return _distill_step(recipe, table)

    return _train(recipe, "student", make, stop)


def _ce_step(recipe: TrainRecipe) -> LossStep:
    def step(logits: dict[str, Tensor], batch: Batch) -> Tensor:
        return cross_entropy(logits, _on(logits, batch.labels), recipe.label_smoothing)

    return step


def _distill_step(recipe: DistillRecipe, table: TeacherTable) -> LossStep:
    def step(logits: dict[str, Tensor], batch: Batch) -> Tensor:
        teacher, valid = table.look_up(batch.clip_index, batch.mask)
        device = next(iter(logits.values())).device
        kl = distillation(logits, _on(logits, teacher), valid.to(device), recipe.temperature)
        ce = cross_entropy(logits, _on(logits, batch.labels), recipe.label_smoothing)
        return recipe.alpha * kl + (1 - recipe.alpha) * ce

    return step


def _on(logits: dict[str, Tensor], other: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the other tensors of each head, on the device of its logits."""
    return {head: other[head].to(scores.device) for head, scores in logits.items()}


def _train(
    recipe: TrainRecipe,
    kind: Literal["teacher", "student", "baseline"],
    make_step: Callable[[TokenSource, np.ndarray, torch.device], LossStep],
    stop: StopFlag | None,
) -> TrainReport:
    device = pick_device(recipe.device)
    store = open_source(recipe.store, recipe.loader, device, stop)
    train, val = (_clips(store, split) for split in (recipe.train_split, recipe.val_split))
    run = RunFolder(recipe.out, recipe)
    torch.manual_seed(recipe.seed)
    card = ModelCard(
        kind=kind,
        name=recipe.name or recipe.out.name,
        size=recipe.size,
        modalities={m: store.shape(m) for m in store.modalities},
        heads=store.heads,
        provenance=store.provenance,
        store_digest=store.digest,
        training=recipe.model_dump(mode="json"),
    )
    model = card.build()
    if recipe.standardise:
        _standardise(model, store, train)
    loaders = (
        FeatureLoader(
            store,
            train,
            recipe.batch_size,
            seed=recipe.seed,
            p=recipe.modality_dropout,
            shuffle=True,
            threads=recipe.loader.threads,
            ahead=recipe.loader.ahead,
            pin=device.type == "cuda",
        ),
        FeatureLoader(
            store,
            val,
            recipe.batch_size,
            threads=recipe.loader.threads,
            ahead=recipe.loader.ahead,
            pin=device.type == "cuda",
        ),
    )
    trainer = Trainer(recipe, run, model, card, loaders, device)
    return trainer.fit(make_step(store, train, device), stop or StopFlag())


def _clips(store: TokenSource, split: str) -> np.ndarray:
    """Return the clips of a split that have at least one modality."""
    in_split = store.split == split
    if not in_split.any():
        known = ", ".join(sorted(set(store.split.tolist()))) or "none"
        raise ManifestError(f"{store.path}: no clip is in split={split!r}; there are: {known}.")
    return np.flatnonzero(in_split & store.present.any(axis=1))


def _standardise(model: FusionModel, store: TokenSource, clips: np.ndarray) -> None:
    for column, m in enumerate(store.modalities):
        present = clips[store.present[clips, column]]
        if not len(present):
            continue
        every = max(1, len(present) // _STATISTICS_CLIPS)
        tokens = store.gather(m, torch.from_numpy(present[::every])).double().flatten(0, 1)
        std, mean = torch.std_mean(tokens, dim=0)
        floor = 1e-3 * std.mean().clamp(min=1e-6)  # channels that hardly move stay small
        model.standardise(m, mean.float(), torch.maximum(std, floor).float())
