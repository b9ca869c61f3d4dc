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
from karmma_pipeline.evaluation.costs import model_costs
from karmma_pipeline.extraction.estimate.report import estimate, text
from karmma_pipeline.extraction.media.media_file import OpenMedia
from karmma_pipeline.extraction.pipeline import extract
from karmma_pipeline.extraction.recipe import ExtractRecipe
from karmma_pipeline.jobs import StopFlag
from karmma_pipeline.models.backbones.suffix import Suffix, weights_behind
from karmma_pipeline.models.cut import suffixes_of
from karmma_pipeline.models.saved import load_model, save_model
from karmma_pipeline.recognition.export import export_model
from karmma_pipeline.recognition.live import Failures, simulated, video_events
from karmma_pipeline.recognition.prediction import Dropout
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
                "flow": NET | {"cut": "input", "stored_frames": 6},
                "audio": SOUND | {"cut": "layer3"},
            },
        },
    }
    return config.build(ExtractRecipe, tree, "test")


def test_a_store_of_cut_backbones_holds_activations_and_pictures(root: Path) -> None:
    store = FeatureStore.open(root / "features/cut")
    assert {m: (store.shape(m), store.specs[m].dtype) for m in store.modalities} == {
        "rgb": ((16, 256), "float16"),
        "flow": ((6, 2 * 32 * 32), "uint8"),
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
    assert plan["cuts"]["cut.flow"]["input"] == 6 * 2 * 32 * 32


def test_the_middle_of_three_times_as_many_frames_are_those_of_a_network_that_is_not_cut(
    root: Path,
) -> None:
    store, plain = (FeatureStore.open(root / "features" / name) for name in ("cut", "plain"))
    index = torch.arange(len(store))
    suffix = Suffix(recipe(root).sets["cut"]["flow"])
    suffix.net.load_state_dict(weights_behind(store.provenance["flow"]))
    with torch.inference_mode():
        made = suffix(store.gather("flow", index))
    assert store.times("flow").shape == (4, 2, 6)
    torch.testing.assert_close(made, plain.gather("flow", index).float(), rtol=1e-2, atol=1e-2)


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


def test_a_stream_says_of_a_window_what_predict_says_of_it(root: Path) -> None:
    recognizer, video = Recognizer.load(root / "cut", "cpu"), root / "v1.mp4"
    offline = {one.clip.start_s: one for one in recognizer.video(video, window_s=1, workers=0)}
    stream = recognizer.stream(window_s=1, hop_s=1, deadline_s=0.5)
    with OpenMedia() as media:
        rate = recognizer.decode_settings.audio.sample_rate
        events = video_events(media, video, rate)
        answered = simulated(stream, events, Failures(0, 0), lambda picture: None, StopFlag())
        live = [one.prediction for one in answered]
    assert len(live) >= 1
    for one in live:
        there = offline[one.clip.start_s]
        assert one.mask == there.mask == dict.fromkeys(("rgb", "flow", "audio"), True)
        # Of several windows at once the last bits are others, which float16 makes larger.
        np.testing.assert_allclose(one.logits["verb"], there.logits["verb"], atol=1e-3)


@pytest.mark.extra
def test_an_export_holds_whole_networks_with_what_was_trained(root: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    model, card = load_model(root / "cut/best")
    with torch.no_grad():  # far from the weights that the prefixes name
        for suffix in suffixes_of(model).values():
            for parameter in suffix.parameters():
                parameter.mul_(1.1)
    (tmp_path / "run").mkdir()
    save_model(tmp_path / "run", model, card)
    store = root / "features/cut"
    made = export_model(tmp_path / "run", tmp_path / "out", stores=[store])
    assert made.difference <= 1e-4
    assert len(made.card.measured["difference"]) == 7
    assert made.card.measured["accuracy"]["clips"] == 4
    facts = made.card.model.provenance
    assert {m: of["trained_from"] for m, of in facts.items()} == {
        "rgb": "layer4",
        "flow": "input",
        "audio": "layer3",
    }
    assert {one.file for one in made.card.backbones.values()} == {
        f"backbones/{m}.onnx" for m in facts
    }
    assert made.card.model.modalities["rgb"] == (4, 512)
    run, here = Recognizer.load(tmp_path / "run", "cpu"), Recognizer.load(tmp_path / "out")
    clips = read_manifest(root / "m.csv").clips
    for left_out in ((), ("rgb",), ("flow", "audio")):
        dropout = Dropout(left_out)
        pairs = zip(*(r.predict(clips, dropout, workers=0) for r in (here, run)), strict=True)
        for one, there in pairs:
            assert one.mask == there.mask
            # The run rounds activations to float16, as its store does.
            np.testing.assert_allclose(one.logits["verb"], there.logits["verb"], atol=2e-3)


def test_costs_are_those_of_the_whole_networks(root: Path) -> None:
    plain, cut = (
        model_costs(load_model(root / name / "best")[1], torch.device("cpu"), False, StopFlag())
        for name in ("plain", "cut")
    )
    assert [(c.modalities, c.gflops, c.parameters) for c in cut] == [
        (c.modalities, c.gflops, c.parameters) for c in plain
    ]
    assert len(cut) == 7
