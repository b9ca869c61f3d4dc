"""Training on a small synthetic store: it learns, resumes exactly, refuses what does not fit."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.tiny_store import write_store
from support.training import (
    SIZE,
    StopAt,
    baseline_recipe,
    results,
    student_recipe,
    teacher_recipe,
)

from karmma_pipeline.data.loading.loader import FeatureLoader
from karmma_pipeline.errors import (
    CheckpointError,
    ConfigError,
    StoppedError,
    StoreError,
)
from karmma_pipeline.jobs import StopFlag
from karmma_pipeline.models.saved import load_model, read_card
from karmma_pipeline.store import FeatureStore
from karmma_pipeline.training import loop
from karmma_pipeline.training.optimization import learning_rate
from karmma_pipeline.training.ranks import Ranks
from karmma_pipeline.training.recipe import Optimiser
from karmma_pipeline.training.stages import distill, train_baseline, train_teacher
from karmma_pipeline.training.teacher_logits import TeacherLogitsCache


@pytest.fixture(scope="module")
def teacher(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "teacher"
    train_teacher(teacher_recipe(store, run))
    return run


def test_it_learns_what_is_there_to_learn(teacher: Path, store: Path, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in (teacher / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 12
    assert max(line["val_action_top1"] for line in lines) > 70  # chance is 8 %
    report = distill(student_recipe(store, teacher, tmp_path / "student"))
    assert report.best["val_action_top1"] > 70
    size = {**SIZE, "absent": "zeros"}
    train_baseline(baseline_recipe(store, tmp_path / "b", modality_dropout=0, size=size))
    assert read_card(tmp_path / "b/best").size.absent == "zeros"
    card = read_card(tmp_path / "student/best")
    assert card.heads["verb"] == ("v0", "v1", "v2", "v3")
    assert card.store_digest == FeatureStore.open(store).digest


def test_a_finished_run_is_not_run_again_and_another_recipe_is_refused(
    teacher: Path, store: Path
) -> None:
    before = (teacher / "best/model.safetensors").stat().st_mtime_ns
    assert train_teacher(teacher_recipe(store, teacher)).already_done
    assert (teacher / "best/model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(ConfigError, match=r"optimiser\.lr was 0\.005, now 0\.1"):
        train_teacher(teacher_recipe(store, teacher, optimiser={"lr": 0.1}))


def test_a_run_goes_on_with_its_tokens_elsewhere(store: Path, tmp_path: Path) -> None:
    done = train_teacher(teacher_recipe(store, tmp_path / "plain", epochs=2))
    settings: dict[str, Any] = {"stage": str(tmp_path / "job1"), "cache": "device"}
    recipe = teacher_recipe(store, tmp_path / "run", epochs=2, loader=settings)
    with pytest.raises(StoppedError):
        train_teacher(recipe, StopAt(4))
    moved = {"stage": str(tmp_path / "job2"), "threads": 0}
    train_teacher(teacher_recipe(store, tmp_path / "run", epochs=2, loader=moved))
    assert results(tmp_path / "run") == results(done.run)
    with pytest.raises(ConfigError, match=r"loader\.label_spaces was 'same', now"):
        train_teacher(teacher_recipe(store, done.run, epochs=2, loader={"label_spaces": "join"}))


def test_the_first_loss_is_that_of_a_plain_computation(store: Path, tmp_path: Path) -> None:
    """The first step, written out without the trainer: model, mask, cross-entropy."""
    recipe = teacher_recipe(store, tmp_path / "r", epochs=1, standardise=False)
    losses: list[float] = []
    original = loop.Trainer._step

    def record(self: loop.Trainer, objective: Any, batch: Any, counts: Any) -> float:
        losses.append(original(self, objective, batch, counts))
        return losses[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Trainer, "_step", record)
        train_teacher(recipe)
    opened = FeatureStore.open(store)
    train = np.flatnonzero(opened.split == "train")
    torch.manual_seed(0)
    model = read_card(tmp_path / "r/best").build()
    loader = FeatureLoader(opened, train, 16, seed=0, p=0.3, shuffle=True)
    batch = next(loader.epoch(0))
    out = model({m: t.float() for m, t in batch.tokens.items()}, batch.mask)
    terms = [torch.nn.functional.cross_entropy(out[h], batch.labels[h]) for h in out]
    assert losses[0] == pytest.approx(sum(t.item() for t in terms) / 2, rel=1e-5)
    assert losses[-1] != losses[0]


def test_warm_up_rises_to_the_peak_and_the_cosine_ends_at_zero() -> None:
    rates = [learning_rate(Optimiser(lr=1.0, warmup=0.1), s, 100) for s in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == max(rates) == pytest.approx(1.0)
    assert rates[55] == pytest.approx(0.5, abs=0.02)
    assert rates[100] == pytest.approx(0, abs=1e-9)


def test_cached_logits_are_what_the_teacher_says_under_each_mask(
    store: Path, teacher: Path, tmp_path: Path
) -> None:
    opened = FeatureStore.open(store)
    clips = np.flatnonzero(opened.split == "train")
    cache = TeacherLogitsCache(teacher / "best", store, opened, clips)
    arguments = (tmp_path, torch.device("cpu"), Ranks(), StopFlag())
    cached = cache.load(*arguments)
    model, _ = load_model(teacher / "best")
    generator = np.random.default_rng(0)
    chosen = torch.from_numpy(generator.choice(clips, 20))
    mask = torch.from_numpy(opened.present[chosen.numpy()] & (generator.random((20, 3)) < 0.6))
    logits, valid = cached.logits(chosen, mask), cached.valid(chosen, mask)
    assert torch.equal(valid, mask.any(dim=1))
    tokens = {m: opened.gather(m, chosen) for m in opened.modalities}
    with torch.inference_mode():
        wanted = model(tokens, mask)
    for head in logits:
        torch.testing.assert_close(
            logits[head][valid].float(), wanted[head][valid], rtol=2e-3, atol=2e-3
        )
    chunk = next(tmp_path.glob("*/00000.*"))
    made = chunk.stat().st_mtime_ns
    cache.load(*arguments)  # reused
    assert chunk.stat().st_mtime_ns == made


def test_teacher_and_student_see_the_same_mask(
    store: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from karmma_pipeline.training import stages
    from karmma_pipeline.training.teacher_logits import TeacherLogits

    seen: dict[str, list[torch.Tensor]] = {"teacher": [], "student": []}
    logits, step = TeacherLogits.logits, loop.Trainer._step

    def spy_teacher(self: TeacherLogits, index: torch.Tensor, mask: torch.Tensor) -> Any:
        seen["teacher"].append(mask.clone())
        return logits(self, index, mask)

    def spy_student(self: loop.Trainer, objective: Any, batch: Any, counts: Any) -> float:
        seen["student"].append(batch.mask.clone())
        return step(self, objective, batch, counts)

    monkeypatch.setattr(TeacherLogits, "logits", spy_teacher)
    monkeypatch.setattr(loop.Trainer, "_step", spy_student)
    stages.distill(student_recipe(store, teacher, tmp_path / "s", epochs=2))
    assert all(torch.equal(a, b) for a, b in zip(seen["teacher"], seen["student"], strict=True))
    assert not torch.equal(seen["student"][0], seen["student"][len(seen["student"]) // 2])
    assert all(mask.any(dim=1).all() for mask in seen["student"])


def test_a_teacher_of_other_features_or_classes_is_refused(
    store: Path, teacher: Path, tmp_path: Path
) -> None:
    other = write_store(tmp_path / "other", clips=96, seed=1)
    with pytest.raises(StoreError, match="not the store that"):
        distill(student_recipe(store, teacher, tmp_path / "a", teacher_store=str(other)))
    few = write_store(tmp_path / "few", clips=100)
    with pytest.raises(StoreError, match=r"lacks \d+ of \d+ training clips"):
        distill(student_recipe(few, teacher, tmp_path / "b", teacher_store=str(store)))
    with pytest.raises(CheckpointError, match="no saved model"):
        distill(student_recipe(store, tmp_path / "none", tmp_path / "c"))
