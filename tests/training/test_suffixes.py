"""Backbones that are cut: what lies behind the cut trains with the model of its tokens."""

import math
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.cut_store import choices, decoded, write_cut_store
from support.forks import ended
from support.lanes import slow_unless
from support.training import (
    SIZE,
    baseline_recipe,
    fork_ranks,
    losses_of,
    results,
    says,
    stopped_and_resumed,
    student_recipe,
    teacher_recipe,
)

from karmma_pipeline.data.loading.loader import FeatureLoader
from karmma_pipeline.errors import CheckpointError, ConfigError
from karmma_pipeline.models.augment import Augmentation, RandomViews
from karmma_pipeline.models.backbones import Backbone
from karmma_pipeline.models.backbones.suffix import Suffix, weights_behind
from karmma_pipeline.models.cut import CutModel, suffixes_of
from karmma_pipeline.models.saved import load_model, read_card
from karmma_pipeline.store import FeatureStore
from karmma_pipeline.training.recipe import TrainRecipe
from karmma_pipeline.training.stages import distill, train_baseline, train_teacher

FEW: dict[str, Any] = {"epochs": 7, "batch_size": 6, "optimiser": {"lr": 5e-3, "clip_norm": 0.5}}


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str | None, Path]:
    root = tmp_path_factory.mktemp("cut")
    return {cut: write_cut_store(root / str(cut), cut) for cut in (None, "body", "input")}


@pytest.mark.parametrize("cut", slow_unless({"body"}, ["body", "input"]))
def test_a_frozen_suffix_loses_what_cached_tokens_lose(
    cut: str, stores: dict[str | None, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = losses_of(
        baseline_recipe(stores[None], tmp_path / "a", **FEW), train_baseline, monkeypatch
    )
    frozen = baseline_recipe(stores[cut], tmp_path / "b", suffix={"lr": 0}, **FEW)
    assert len(cached) == 21
    np.testing.assert_allclose(
        losses_of(frozen, train_baseline, monkeypatch), cached, rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("cut", slow_unless({"input"}, ["body", "input"]))
def test_a_training_suffix_loses_what_a_plain_loop_over_whole_networks_loses(
    cut: str, stores: dict[str | None, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = baseline_recipe(stores[cut], tmp_path / "a", suffix={"lr": 2e-3}, **FEW)
    ours = losses_of(recipe, train_baseline, monkeypatch)
    plain = plain_losses(recipe, FeatureStore.open(stores[None]), cut)
    np.testing.assert_allclose(ours, plain, rtol=0, atol=1e-5)
    frozen = baseline_recipe(stores[cut], tmp_path / "b", suffix={"lr": 0}, **FEW)
    assert (
        np.abs(np.subtract(losses_of(frozen, train_baseline, monkeypatch), ours)[1:]).max() > 1e-3
    )


def plain_losses(recipe: TrainRecipe, cached: FeatureStore, cut: str) -> list[float]:
    """Train whole networks from decoded clips, without a store but for its order and masks."""
    train = np.flatnonzero(cached.split == "train")
    card = read_card(recipe.out / "last")
    torch.manual_seed(recipe.seed)
    model: Any = card.build()
    fusion = model.fusion
    for column, m in enumerate(cached.modalities):
        chosen = torch.from_numpy(train[cached.present[train, column]])
        flat = cached.gather(m, chosen).double().flatten(0, 1)
        std = flat.std(dim=0)
        fusion.standardise(m, flat.mean(dim=0).float(), std.clamp(min=1e-3 * std.mean()).float())
    nets = {m: Backbone(choice.cut_at(None)) for m, choice in choices(cut).items()}
    trained: list[torch.Tensor] = []
    for backbone in nets.values():
        behind = backbone.net.get_submodule("body" if cut == "body" else "")
        convolutions = [c for c in behind.modules() if "Conv" in type(c).__name__]
        trained += [p.requires_grad_() for c in convolutions for p in c.parameters()]
    named = list(fusion.named_parameters())
    decay = recipe.optimiser.weight_decay
    groups: list[dict[str, Any]] = [
        {"params": [p for n, p in named if p.dim() > 1 and "token" not in n], "lr": 5e-3},
        {"params": [p for n, p in named if p.dim() <= 1 or "token" in n], "lr": 5e-3},
        {"params": [p for p in trained if p.dim() > 1], "lr": 2e-3},
        {"params": [p for p in trained if p.dim() <= 1], "lr": 2e-3},
    ]
    for number, group in enumerate(groups):
        group |= {"weight_decay": 0.0 if number % 2 else decay, "peak": group["lr"]}
    optimiser = torch.optim.AdamW(groups)
    loader = FeatureLoader(cached, train, 6, seed=recipe.seed, p=0.3, shuffle=True, threads=0)
    clips, losses = decoded(), []
    for step, batch in enumerate(b for e in range(recipe.epochs) for b in loader.epoch(e)):
        wave = 0.5 * (1 + math.cos(math.pi * (step - 2) / 19))
        for group in optimiser.param_groups:
            group["lr"] = group["peak"] * ((step + 1) / 2 if step < 2 else wave)
        tokens = {m: net(net.prepare(clips[m][batch.clip_index])) for m, net in nets.items()}
        scores = fusion(tokens, batch.mask)["verb"]
        loss = torch.nn.functional.cross_entropy(scores, batch.labels["verb"])
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        every = [p for group in groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(every, 0.5)
        optimiser.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("dtype", slow_unless({"int8"}, ["float16", "bfloat16", "int8"]))
def test_activations_in_fewer_bits_are_nearly_those_of_all(
    dtype: Any, stores: dict[str | None, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = write_cut_store(tmp_path / "few", "body", dtype)
    index = torch.arange(24)
    for m, choice in choices("body").items():
        suffix = Suffix(choice)
        whole = weights_behind(FeatureStore.open(few).provenance[m])
        suffix.net.load_state_dict({k: whole[k] for k in suffix.net.state_dict()})
        with torch.inference_mode():
            one, two = (
                suffix(FeatureStore.open(s).gather(m, index)) for s in (few, stores["body"])
            )
        alike = torch.nn.functional.cosine_similarity(one, two, dim=-1)
        assert alike[two.norm(dim=-1) > 0].min() > 0.99
    settings: dict[str, Any] = {"suffix": {"lr": 1e-3}, "epochs": 2, "batch_size": 6}
    losses = [
        losses_of(
            baseline_recipe(at, tmp_path / f"run-{at.name}", **settings),
            train_baseline,
            monkeypatch,
        )
        for at in (stores["body"], few)
    ]
    np.testing.assert_allclose(losses[1], losses[0], rtol=0, atol=0.02)


@pytest.mark.slow
def test_bfloat16_trains_backbones_nearly_as_float32_does(
    stores: dict[str | None, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"suffix": {"lr": 1e-3, "crop": 0.7, "save_memory": True}}
    losses = [
        losses_of(
            baseline_recipe(stores["input"], tmp_path / p, epochs=2, precision=p, **settings),
            train_baseline,
            monkeypatch,
        )
        for p in ("float32", "bfloat16")
    ]
    assert losses[0] != losses[1]
    np.testing.assert_allclose(losses[1], losses[0], rtol=0, atol=0.1)


def test_a_store_of_format_version_4_trains_as_one_of_today(
    stores: dict[str | None, Path], tmp_path: Path
) -> None:
    """That of `write_cut_store` before a store could hold more frames than a network takes."""
    with tarfile.open(Path(__file__).parents[1] / "fixtures/cut/0b4a63b.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    assert '"version": 4' in (tmp_path / "cut/spec.json").read_text()
    of_stores = {"a": tmp_path / "cut", "b": stores["input"]}
    for name, store in of_stores.items():
        train_baseline(
            baseline_recipe(store, tmp_path / name, epochs=1, suffix={"lr": 1e-3}, batch_size=6)
        )
    models = [load_model(tmp_path / name / "last")[0].state_dict() for name in of_stores]
    assert all(torch.equal(of, models[1][key]) for key, of in models[0].items())


ALL: dict[str, Any] = {
    "size": {**SIZE, "dropout": 0.2},
    "ema": 0.9,
    "epochs": 3,
    "batch_size": 8,
    "suffix": {"lr": 1e-3, "stochastic": True, "freeze_norm": False, "save_memory": True},
}


def test_a_stopped_student_whose_backbones_train_goes_on_exactly(
    stores: dict[str | None, Path], tmp_path: Path
) -> None:
    """Its teacher, too, and its batch norms learn; the teacher's backbones have trained before."""
    train_teacher(teacher_recipe(stores["input"], tmp_path / "teacher", epochs=1))
    whole, parts = (
        student_recipe(stores["body"], tmp_path / "teacher", tmp_path / n,
                       teacher_store=str(stores["input"]), **ALL)
        for n in ("whole", "parts")
    )  # fmt: skip
    distill(whole)
    stopped_and_resumed(distill, parts, (4, 6), "run the same command again")
    assert results(tmp_path / "whole") == results(tmp_path / "parts")
    norm = suffixes_of(load_model(tmp_path / "whole/last")[0])["rgb"].norms()[0]
    (before,) = Suffix(choices("body")["rgb"]).norms()
    assert int(norm.num_batches_tracked) > int(before.num_batches_tracked)  # type: ignore[arg-type]


def test_views_of_pictures_are_those_of_their_motion() -> None:
    """Against slices: the right lower quarter, twice as large, and mirrored pictures."""
    rgb, flow = (torch.rand(2, 3, 1, 8, 8) for _ in range(2))
    transform = choices("input")["rgb"].transform
    zero = (128 / 255 - 0.5) / 0.5
    half, no = torch.full((2,), 0.5), torch.zeros(2, dtype=torch.bool)
    quarter = RandomViews(half, torch.full((2, 2), 0.5), no, torch.ones(2), torch.zeros(2))
    wanted = torch.nn.functional.interpolate(
        rgb[:, :, 0, 4:, 4:], scale_factor=2, mode="bilinear", align_corners=False
    )
    seen = quarter.apply(rgb, transform, is_flow=False)[:, :, 0]
    torch.testing.assert_close(seen[..., 1:, 1:], wanted[..., 1:, 1:])
    moved = quarter.apply(flow, transform, is_flow=True)
    plain = quarter.apply(flow, transform, is_flow=False)
    torch.testing.assert_close(moved[:, :2] - zero, 2 * (plain[:, :2] - zero))
    torch.testing.assert_close(moved[:, 2], plain[:, 2])

    whole, still = torch.ones(2), torch.zeros(2, 2)
    turn = torch.tensor([True, False])
    mirrored = RandomViews(whole, still, turn, torch.tensor([1.0, 2.0]), torch.tensor([0.0, 0.25]))
    seen = mirrored.apply(rgb, transform, is_flow=False)
    torch.testing.assert_close(seen[0], rgb[0].flip(-1))
    torch.testing.assert_close(seen[1], 2 * rgb[1] + 0.25)
    moved = mirrored.apply(flow, transform, is_flow=True)
    torch.testing.assert_close(moved[0, 0] - zero, zero - flow[0, 0].flip(-1))
    torch.testing.assert_close(moved[0, 1], flow[0, 1].flip(-1))
    torch.testing.assert_close(moved[1], flow[1])


def test_views_are_drawn_inside_of_the_picture_and_for_training_alone(
    stores: dict[str | None, Path], tmp_path: Path
) -> None:
    views = RandomViews.draw(500, Augmentation(crop=0.5, colour=0.2, flip=True))
    assert float(views.side.min()) >= 0.5
    assert bool((views.place.abs() <= (1 - views.side)[:, None] + 1e-6).all())
    assert 200 < int(views.mirrored.sum()) < 300
    settings = {"lr": 1e-3, "crop": 0.6, "colour": 0.3, "flip": True}
    whole, parts = (
        baseline_recipe(stores["input"], tmp_path / n, epochs=2, batch_size=8, suffix=settings)
        for n in ("whole", "parts")
    )
    train_baseline(whole)
    stopped_and_resumed(train_baseline, parts, (4,), "run the same command again")
    assert results(tmp_path / "whole") == results(tmp_path / "parts")
    still = baseline_recipe(stores["input"], tmp_path / "still", epochs=2, batch_size=8,
                            suffix={"lr": 1e-3})  # fmt: skip
    train_baseline(still)
    assert results(tmp_path / "still") != results(tmp_path / "whole")
    twice = [says(tmp_path / "whole", stores["input"]) for _ in range(2)]
    assert torch.equal(*twice)
    body = baseline_recipe(stores["body"], tmp_path / "body", suffix={"flip": True})
    with pytest.raises(
        ConfigError, match="no video backbone of this store was extracted with cut: input"
    ):
        train_baseline(body)


@pytest.mark.parametrize("cut", slow_unless({"body"}, ["body", "input"]))
def test_less_memory_changes_no_weight_no_average_and_no_norm(
    cut: str, stores: dict[str | None, Path], tmp_path: Path
) -> None:
    for name, save_memory in (("a", False), ("b", True)):
        settings = {"lr": 1e-2, "freeze_norm": False, "save_memory": save_memory}
        recipe = baseline_recipe(
            stores[cut], tmp_path / name, suffix=settings, epochs=2, batch_size=6, ema=0.5
        )
        train_baseline(recipe)
    models = [load_model(tmp_path / name / "last")[0].state_dict() for name in ("a", "b")]
    assert all(torch.equal(of, models[1][key]) for key, of in models[0].items())


def test_a_suffix_runs_for_clips_whose_modality_is_let_through_and_for_no_other(
    stores: dict[str | None, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    train_baseline(baseline_recipe(stores["body"], tmp_path / "a", epochs=1))
    model, card = load_model(tmp_path / "a/last")
    assert isinstance(model, CutModel)
    store = FeatureStore.open(stores["body"])
    index = torch.arange(4)
    tokens = {m: store.gather(m, index) for m in store.modalities}
    mask = torch.tensor([[True, False, True], [True, False, False]] * 2)
    whole = model(tokens, mask)["verb"]
    seen: dict[str, int] = {}
    for m, suffix in suffixes_of(model).items():
        suffix.register_forward_pre_hook(lambda _, x, m=m: seen.update({m: len(x[0])}))
    tokens["flow"] = torch.full_like(tokens["flow"], torch.nan)
    torch.testing.assert_close(model(tokens, mask)["verb"], whole)
    columns = {m: int(mask[:, column].sum()) for column, m in enumerate(model.modalities)}
    assert seen == {m: count for m, count in columns.items() if count}
    assert card.token_shapes["rgb"] != card.modalities["rgb"]


def test_a_saved_model_holds_what_lies_behind_the_cut_alone(
    stores: dict[str | None, Path], tmp_path: Path
) -> None:
    train_baseline(baseline_recipe(stores["body"], tmp_path / "a", epochs=1))
    names = load_model(tmp_path / "a/last")[0].state_dict()
    assert any(name.startswith("suffixes.rgb.net.body.") for name in names)
    assert not any(".stem." in name for name in names)


@pytest.mark.slow
def test_a_cut_student_begins_with_what_cached_tokens_have_taught(
    stores: dict[str | None, Path], tmp_path: Path
) -> None:
    train_baseline(baseline_recipe(stores[None], tmp_path / "cached", epochs=3))
    recipe = baseline_recipe(
        stores["body"], tmp_path / "cut", epochs=1, init_from=str(tmp_path / "cached"),
        optimiser={"lr": 1e-12},
        suffix={"lr": 0},
    )  # fmt: skip
    train_baseline(recipe)
    before, after = says(tmp_path / "cached", stores[None]), says(tmp_path / "cut", stores["body"])
    torch.testing.assert_close(before, after, rtol=1e-3, atol=1e-3)
    assert "newly initialised weights: none" in (tmp_path / "cut/log.txt").read_text()


def test_settings_that_mean_nothing_or_cannot_be_are_refused(
    stores: dict[str | None, Path], tmp_path: Path
) -> None:
    uncut = baseline_recipe(stores[None], tmp_path / "a", suffix={"lr": 1e-3})
    with pytest.raises(ConfigError, match="suffix: no backbone of this store has a cut"):
        train_baseline(uncut)
    parts = baseline_recipe(stores["body"], tmp_path / "b", accumulate=2,
                            suffix={"freeze_norm": False})  # fmt: skip
    with pytest.raises(ConfigError, match=r"freeze_norm=false: .* batch norms"):
        train_baseline(parts)
    unknown = baseline_recipe(stores["body"], tmp_path / "c", suffix={"weights": {"imu": "x.pt"}})
    with pytest.raises(
        ConfigError, match=r"suffix.weights.imu: has no cut; modalities with a cut: rgb"
    ):
        train_baseline(unknown)
    other = baseline_recipe(stores["body"], tmp_path / "d",
                            suffix={"weights": {"rgb": "random:9"}})  # fmt: skip
    with pytest.raises(CheckpointError, match="weights='random:9': their digest is"):
        train_baseline(other)
    assert not any((tmp_path / name).exists() for name in "abcd")


@pytest.mark.slow
def test_two_ranks_train_backbones_as_one(stores: dict[str | None, Path], tmp_path: Path) -> None:
    settings = {"epochs": 3, "batch_size": 7, "suffix": {"lr": 1e-3}}
    train_baseline(baseline_recipe(stores["body"], tmp_path / "one", **settings))
    recipe = baseline_recipe(stores["body"], tmp_path / "two", **settings)
    children = fork_ranks(lambda stop: train_baseline(recipe, stop), tmp_path / "log")
    assert [ended(child) for child in children] == [0, 0]
    one, two = (says(tmp_path / name, stores["body"]) for name in ("one", "two"))
    torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-5)
