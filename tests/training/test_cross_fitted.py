"""Teachers that teach only clips that they were not trained on, and other choices of a recipe."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.training import (
    SIZE,
    baseline_recipe,
    results,
    stopped_and_resumed,
    student_recipe,
    teacher_recipe,
)

from karmma_pipeline.data.loading.loader import Batch
from karmma_pipeline.errors import CheckpointError, ConfigError
from karmma_pipeline.models.fusion import FusionModel
from karmma_pipeline.models.saved import load_model
from karmma_pipeline.store import FeatureStore
from karmma_pipeline.training.objective import DistillationObjective
from karmma_pipeline.training.stages import distill, train_baseline, train_teacher


@pytest.fixture(scope="module")
def teachers(store: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two, each trained without half of the clips, and one that was trained on all."""
    folder = tmp_path_factory.mktemp("teachers")
    opened = FeatureStore.open(store)
    ids = opened.clip_ids[opened.split == "train"].tolist()
    for name, left_out in (("even", ids[::2]), ("odd", ids[1::2]), ("all", [])):
        listed = folder / f"{name}.txt"
        listed.write_text("".join(f"{clip.decode()}\n" for clip in left_out))
        changes = {"exclude": str(listed)} if left_out else {}
        train_teacher(teacher_recipe(store, folder / name, epochs=2, **changes))
    return [folder / name for name in ("even", "odd", "all")]


def recipe(store: Path, teachers: list[Path], out: Path, **changes: Any) -> Any:
    more = {"teacher": [*map(str, teachers)], "cross_fitted": True, "epochs": 2, **changes}
    return student_recipe(store, teachers[0], out, **more)


def test_a_clip_is_taught_by_the_teachers_alone_that_never_saw_it(
    store: Path, teachers: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]] = []
    loss = DistillationObjective.loss

    def spy(self: Any, logits: Any, batch: Batch, counts: Any) -> Any:
        valid = self._valid(batch)
        said = torch.stack([t.logits(batch.clip_index, batch.mask)["verb"] for t in self.teachers])
        targets = self._targets(batch, valid, logits)["verb"]
        seen.append((batch.clip_index, valid, said, targets))
        return loss(self, logits, batch, counts)

    monkeypatch.setattr(DistillationObjective, "loss", spy)
    distill(recipe(store, teachers, tmp_path / "student"))
    opened = FeatureStore.open(store)
    place = {int(clip): i for i, clip in enumerate(np.flatnonzero(opened.split == "train"))}
    assert seen
    for index, valid, said, targets in seen:
        even = torch.tensor([place[int(clip)] % 2 == 0 for clip in index])
        assert torch.equal(valid, torch.stack([even, ~even, torch.zeros_like(even)]))
        own = torch.where(even[:, None], said[0], said[1]).float()
        torch.testing.assert_close(targets, own.log_softmax(dim=1))


def test_it_goes_on_exactly(store: Path, teachers: list[Path], tmp_path: Path) -> None:
    distill(recipe(store, teachers, tmp_path / "whole"))
    parts = recipe(store, teachers, tmp_path / "parts")
    stopped_and_resumed(distill, parts, (6,), "run the same command again")
    assert results(tmp_path / "whole") == results(tmp_path / "parts")


def test_teachers_that_saw_everything_or_tell_nothing_are_refused(
    store: Path, teachers: list[Path], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"cross_fitted=True: every teacher was trained on all"):
        distill(recipe(store, teachers[2:], tmp_path / "student"))
    (teachers[2] / "clips.json").rename(tmp_path / "clips.json")
    with pytest.raises(
        CheckpointError, match=r"has no clips\.json, so its training clips are unknown"
    ):
        distill(recipe(store, teachers, tmp_path / "student"))
    (tmp_path / "clips.json").rename(teachers[2] / "clips.json")
    assert not (tmp_path / "student").exists()


@pytest.mark.parametrize("model", ["", "late_fusion"])
def test_a_recipe_says_how_large_position_tokens_begin(
    store: Path, tmp_path: Path, model: str
) -> None:
    parts = []
    for std in (0.02, 0.5):
        still = {"epochs": 1, "optimiser": {"lr": 1e-12}, "size": SIZE, "model": model}
        changes = {} if std == 0.02 else {"position_std": std}
        train_baseline(baseline_recipe(store, tmp_path / f"{std}", **still, **changes))
        network, _ = load_model(tmp_path / f"{std}/last")
        parts.append([m for m in network.modules() if isinstance(m, FusionModel)])
    for small, large in zip(*parts, strict=True):
        for m, tokens in small.position_tokens.items():
            torch.testing.assert_close(25 * tokens, large.position_tokens[m])
            torch.testing.assert_close(small.modality_token[m], large.modality_token[m])
