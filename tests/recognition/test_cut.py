"""From videos through stores of cut backbones to models with trained suffixes, and back."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.media_files import write_video
from support.training import SIZE

from karmma_pipeline import config, predict
from karmma_pipeline.data.loading.clips import predict_masked
from karmma_pipeline.data.loading.loader import FeatureLoader
from karmma_pipeline.data.manifest import read_manifest
from karmma_pipeline.errors import ConfigError
from karmma_pipeline.evaluation.costs import model_costs
from karmma_pipeline.extraction.estimate.report import estimate, text
from karmma_pipeline.extraction.pipeline import extract
from karmma_pipeline.extraction.recipe import ExtractRecipe
from karmma_pipeline.jobs import StopFlag
from karmma_pipeline.models.saved import load_model
from karmma_pipeline.recognition.export import export_model
from karmma_pipeline.recognition.recognizer import Recognizer
from karmma_pipeline.store import FeatureStore, verify
from karmma_pipeline.training.recipe import BaselineRecipe
from karmma_pipeline.training.stages import train_baseline
from karmma_pipeline.views import Views

pytestmark = pytest.mark.slow

NET = {"name": "r3d_18", "weights": "random:1", "frames": 2, "size": 32}
SOUND = {"name": "resnet18", "weights": "random:3", "image": [32, 32]}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cut")
    rows = ["clip_id,video,start,stop,verb,split"]
    for i in range(4):
        write_video(root / f"v{i}.mp4", seconds=2, pan_px_s=10 * i)
        rows.append(f"c{i},v{i}.mp4,0,1.5,{'ab'[i % 2]},train")
    (root / "m.csv").write_text("\n".join(rows))
    extract(recipe(root))
    sets = ("plain", "cut")
    for name in sets:
        tree = {"store": str(root / "features" / name), "out": str(root / name), "epochs": 2,
                "val_split": "train", "optimiser": {"lr": 1e-3}, "modality_dropout": 0.0,
                "size": SIZE}  # fmt: skip
        train_baseline(config.build(BaselineRecipe, tree, "test"))
    return root


def recipe(root: Path) -> ExtractRecipe:
    tree: dict[str, Any] = {
        "manifest": str(root / "m.csv"),
        "out": str(root / "features"),
        "audio": {"front_end": "vggish", "window_s": 0.5},
        "device": "cpu",
        "sets": {
            "plain": {"rgb": NET, "flow": NET, "audio": SOUND},
            "cut": {
                "rgb": NET | {"cut": "layer4"},
                "flow": NET | {"cut": "input"},
                "audio": SOUND | {"cut": "layer3"},
            },
        },
    }
    return config.build(ExtractRecipe, tree, "test")


def test_a_store_of_cut_backbones_holds_activations_and_pictures(root: Path) -> None:
    store = FeatureStore.open(root / "features/cut")
    assert {m: (store.shape(m), store.specs[m].dtype) for m in store.modalities} == {
        "rgb": ((16, 256), "float16"),
        "flow": ((2, 2 * 32 * 32), "uint8"),
        "audio": ((16, 128), "float16"),
    }
    assert store.specs["rgb"].grid == (1, 4, 4)
    assert not verify(root / "features/cut")
    plan = estimate(recipe(root), probe=False, calibrate=False)
    sizes = plan["cuts"]["cut.rgb"]
    assert sizes["input"] == 2 * 3 * 32 * 32
    assert sizes["layer4"] == store.specs["rgb"].clip_bytes == 2 * 16 * 256
    assert sizes["tokens"] == 2 * 4 * 512
    assert "cut.rgb: a clip takes 6.14kB (input)" in text(plan, recipe(root), root / "m.yaml")


def test_views_of_cut_backbones_train_and_are_averaged(root: Path) -> None:
    """`views` and `cut` in one recipe: rows are activations and pictures of each view."""
    choices = recipe(root).sets["plain"]
    sets = {
        "cut": {"rgb": choices["rgb"].cut_at("input"), "audio": choices["audio"].cut_at("layer4")}
    }
    changes = {"out": root / "viewed", "views": Views(clips=2, crops=3), "sets": sets}
    assert extract(recipe(root).model_copy(update=changes)).complete
    store = FeatureStore.open(root / "viewed/cut")
    assert (len(store), store.shape("rgb")) == (4 * 6, (2, 3 * 32 * 32))
    pictures = store.gather("rgb", torch.arange(6, 12))
    assert pictures.dtype == torch.uint8
    assert len(torch.unique(pictures.flatten(1), dim=0)) == 6
    tree = {"store": str(store.path), "out": str(root / "viewed_run"), "epochs": 1, "size": SIZE,
            "val_split": "train", "suffix": {"lr": 1e-3, "crop": 0.7, "flip": True}}  # fmt: skip
    train_baseline(config.build(BaselineRecipe, tree, "test"))
    said = predict(root / "viewed_run", store)
    assert said.clip_ids == ("c0", "c1", "c2", "c3")
    model, _ = load_model(root / "viewed_run/best")
    batch = {m: store.gather(m, torch.arange(24)) for m in store.modalities}
    with torch.inference_mode():
        each = model(batch, torch.ones(24, 2, dtype=torch.bool))["verb"]
    wanted = each.view(4, 6, -1).mean(dim=1).numpy()
    np.testing.assert_allclose(said.logits["verb"], wanted, atol=1e-4)
    clips = read_manifest(root / "m.csv").clips
    (one,) = Recognizer.load(root / "viewed_run", "cpu").predict(clips[:1], workers=0)
    assert all(one.mask.values())


def test_a_recogniser_says_of_raw_video_what_the_stored_rows_say(root: Path) -> None:
    store = FeatureStore.open(root / "features/cut")
    model, _ = load_model(root / "cut/best")
    loader = FeatureLoader(store, np.arange(len(store)), len(store))
    ((_, [(_, cached)]),) = predict_masked(
        model, loader, lambda batch: [batch.present], torch.device("cpu")
    )
    clips = read_manifest(root / "m.csv").clips
    said = list(Recognizer.load(root / "cut", "cpu").predict(clips, workers=0))
    for row, one in enumerate(said):
        assert all(one.mask.values())
        np.testing.assert_allclose(one.logits["verb"], cached["verb"][row].numpy(), atol=1e-4)


def test_an_export_refuses_trained_backbones_in_a_sentence(root: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    with pytest.raises(ConfigError, match=r"\(rgb, flow, audio\) were trained; .* predict and"):
        export_model(root / "cut", tmp_path / "out")


def test_costs_are_those_of_the_whole_networks(root: Path) -> None:
    plain, cut = (
        model_costs(load_model(root / name / "best")[1], torch.device("cpu"), False, StopFlag())
        for name in ("plain", "cut")
    )
    assert [(c.modalities, c.gflops, c.parameters) for c in cut] == [
        (c.modalities, c.gflops, c.parameters) for c in plain
    ]
    assert len(cut) == 7
