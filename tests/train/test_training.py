"""Training on a small synthetic store: it learns, resumes exactly, refuses what does not fit."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.tiny_store import write_store

from karmma_pipeline import config
from karmma_pipeline.data.loader import FeatureLoader
from karmma_pipeline.data.store import FeatureStore
from karmma_pipeline.errors import (
    CheckpointError,
    ConfigError,
    StoppedError,
    StoreError,
)
from karmma_pipeline.jobs import StopFlag
from karmma_pipeline.models.saved import load_model, read_card
from karmma_pipeline.train import loop
from karmma_pipeline.train.gradient import learning_rate
from karmma_pipeline.train.ranks import Ranks
from karmma_pipeline.train.recipe import BaselineRecipe, DistillRecipe, Optimiser, TeacherRecipe
from karmma_pipeline.train.stages import distill, train_baseline, train_teacher
from karmma_pipeline.train.table import Tabling

SIZE = {"dim": 16, "layers": 1, "attention_heads": 2, "ffn_width": 16, "head_width": 16}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_store(tmp_path_factory.mktemp("stores") / "s")


def common(store: Path, out: Path, **changes: Any) -> dict[str, Any]:
    tree = {"store": str(store), "out": str(out), "size": SIZE, "epochs": 12, "batch_size": 16}
    return {**tree, "optimiser": {"lr": 5e-3}, **changes}


def teacher_recipe(store: Path, out: Path, **changes: Any) -> TeacherRecipe:
    return config.build(TeacherRecipe, common(store, out, **changes), "test")


@pytest.fixture(scope="module")
def teacher(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "teacher"
    train_teacher(teacher_recipe(store, run))
    return run


def student_recipe(store: Path, teacher: Path, out: Path, **changes: Any) -> DistillRecipe:
    more = {"teacher": str(teacher), "teacher_store": str(store), **changes}
    return config.build(DistillRecipe, common(store, out, **more), "test")


def test_it_learns_what_is_there_to_learn(teacher: Path, store: Path, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in (teacher / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 12
    assert max(line["val_action_top1"] for line in lines) > 70  # chance is 8 %
    report = distill(student_recipe(store, teacher, tmp_path / "student"))
    assert report.best["val_action_top1"] > 70
    baseline = common(store, tmp_path / "b", modality_dropout=0, size={**SIZE, "absent": "zeros"})
    train_baseline(config.build(BaselineRecipe, baseline, "test"))
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
    with pytest.raises(ConfigError, match=r"optimiser\.lr is 0\.005 there and 0\.1 here"):
        train_teacher(teacher_recipe(store, teacher, optimiser={"lr": 0.1}))


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


def test_the_table_holds_what_the_teacher_says_under_each_mask(
    store: Path, teacher: Path, tmp_path: Path
) -> None:
    opened = FeatureStore.open(store)
    clips = np.flatnonzero(opened.split == "train")
    tabling = Tabling(teacher / "best", store, opened, clips)
    arguments = (tmp_path, torch.device("cpu"), Ranks(), StopFlag())
    table = tabling.table(*arguments)
    model, _ = load_model(teacher / "best")
    generator = np.random.default_rng(0)
    chosen = torch.from_numpy(generator.choice(clips, 20))
    mask = torch.from_numpy(opened.present[chosen.numpy()] & (generator.random((20, 3)) < 0.6))
    logits, valid = table.look_up(chosen, mask), table.seen(chosen, mask)
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
    tabling.table(*arguments)  # reused
    assert chunk.stat().st_mtime_ns == made


def test_teacher_and_student_see_the_same_mask(
    store: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from karmma_pipeline.train import stages
    from karmma_pipeline.train.table import TeacherTable

    seen: dict[str, list[torch.Tensor]] = {"teacher": [], "student": []}
    look_up, step = TeacherTable.look_up, loop.Trainer._step

    def spy_teacher(self: TeacherTable, index: torch.Tensor, mask: torch.Tensor) -> Any:
        seen["teacher"].append(mask.clone())
        return look_up(self, index, mask)

    def spy_student(self: loop.Trainer, objective: Any, batch: Any, counts: Any) -> float:
        seen["student"].append(batch.mask.clone())
        return step(self, objective, batch, counts)

    monkeypatch.setattr(TeacherTable, "look_up", spy_teacher)
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


def run_state(run: Path) -> tuple[bytes, bytes, bytes]:
    names = ("best/model.safetensors", "last/model.safetensors", "metrics.jsonl")
    return tuple((run / name).read_bytes() for name in names)  # type: ignore[return-value]


def test_stopped_in_the_middle_of_an_epoch_it_goes_on_exactly(store: Path, tmp_path: Path) -> None:
    size = {**SIZE, "dropout": 0.2}
    train_teacher(teacher_recipe(store, tmp_path / "whole", epochs=4, size=size, name="t"))

    class StopAt(StopFlag):
        def __init__(self, looks: int) -> None:
            super().__init__()
            self.looks = looks

        @property
        def requested(self) -> bool:
            self.looks -= 1
            if self.looks == 0:
                self.request()
            return super().requested

    recipe = teacher_recipe(store, tmp_path / "parts", epochs=4, size=size, name="t")
    for looks in (3, 1, 7):
        with pytest.raises(StoppedError, match="is saved; run the same command again"):
            train_teacher(recipe, stop=StopAt(looks))
    train_teacher(recipe)
    whole = run_state(tmp_path / "whole")
    parts = run_state(tmp_path / "parts")
    assert whole == parts


def test_killed_at_random_moments_it_ends_with_the_same_weights(
    store: Path, tmp_path: Path
) -> None:
    size = {**SIZE, "dropout": 0.2, "dim": 64, "layers": 2}
    recipes = {
        name: teacher_recipe(store, tmp_path / name, epochs=60, size=size, name="t")
        for name in ("whole", "killed")
    }
    for name, recipe in recipes.items():
        config.save(recipe, tmp_path / f"{name}.yaml")
    command = [sys.executable, "-m", "karmma_pipeline.cli", "train-teacher"]
    quiet = subprocess.DEVNULL
    subprocess.run([*command, str(tmp_path / "whole.yaml")], check=True, stderr=quiet, stdout=quiet)
    rng = np.random.default_rng()
    for kill in range(3):
        process = subprocess.Popen(
            [*command, str(tmp_path / "killed.yaml")], stderr=quiet, stdout=quiet
        )
        started = time.monotonic()
        metrics = tmp_path / "killed/metrics.jsonl"
        lines = kill * 3 + 1
        while process.poll() is None and (
            not metrics.exists() or len(metrics.read_text().splitlines()) < lines
        ):
            assert time.monotonic() - started < 60
            time.sleep(0.01)
        time.sleep(float(rng.uniform(0, 0.3)))
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(
        [*command, str(tmp_path / "killed.yaml")], check=True, stderr=quiet, stdout=quiet
    )
    assert run_state(tmp_path / "killed") == run_state(tmp_path / "whole")


def test_a_damaged_state_falls_back_to_the_one_before(store: Path, tmp_path: Path) -> None:
    train_teacher(teacher_recipe(store, tmp_path / "whole", epochs=3, name="t"))
    train_teacher(teacher_recipe(store, tmp_path / "hurt", epochs=3, name="t"))
    newest = sorted((tmp_path / "hurt/state").iterdir())[-1]
    newest.write_bytes(newest.read_bytes()[:-7])
    assert not train_teacher(
        teacher_recipe(store, tmp_path / "hurt", epochs=3, name="t")
    ).already_done
    assert run_state(tmp_path / "hurt") == run_state(tmp_path / "whole")
