"""Networks of other engines and front ends of one's own, from videos to predictions."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.media_files import write_video

from karmma_pipeline import FeatureStore, config, predict, train_baseline
from karmma_pipeline.extraction.inference import openvino_engine
from karmma_pipeline.extraction.pipeline import extract
from karmma_pipeline.extraction.recipe import ExtractRecipe

NETS = """
from torch import nn
from karmma_pipeline.models.backbones import Architecture

def sound(bands, **audio):
    return Architecture(
        kind="image", build=lambda weights: nn.Conv2d(3, 4, (bands, 8), stride=(bands, 8)),
        weights=None, feature_map=lambda net, x: net(x)[:, :, None], heads=(), audio=audio)

def short():
    return sound(16, front_end="vggish", mels=32, n_fft=512, win_length=400, hops=48)

def long():
    return sound(24, front_end="auditory_slowfast", mels=48, hops=64)
"""
SIZE = {"dim": 16, "attention_heads": 2, "ffn_width": 16, "head_width": 16}


@pytest.fixture
def clips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write six videos that move or stand, and a module with two networks for sound."""
    rows = ["clip_id,video,verb,split"]
    for i in range(6):
        write_video(tmp_path / f"v{i}.mp4", pan_px_s=60.0 * (i % 2), click_s=0.4 + 0.2 * i)
        rows.append(f"c{i},v{i}.mp4,{'ab'[i % 2]},{'val' if i > 3 else 'train'}")
    (tmp_path / "m.csv").write_text("\n".join(rows) + "\n")
    (tmp_path / "sound_nets.py").write_text(NETS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def run(folder: Path, out: str, sets: dict[str, Any]) -> dict[str, FeatureStore]:
    tree = {"manifest": folder / "m.csv", "out": folder / out, "sets": sets, "batch_size": 2}
    recipe = config.build(ExtractRecipe, {**tree, "decode": {"workers": 1}}, "test")
    assert extract(recipe).complete
    return {name: FeatureStore.open(folder / out / name) for name in sets}


def predicted(folder: Path, store: FeatureStore) -> list[str | None]:
    out = folder / "runs" / store.path.name
    train_baseline({"store": store.path, "out": out, "size": SIZE, "epochs": 2, "batch_size": 2})
    answers = predict(out, store, split="val")
    assert answers.clip_ids == ("c4", "c5")
    assert np.isfinite(answers.logits["verb"]).all()
    return answers.classes("verb")


@pytest.mark.slow
def test_two_front_ends_of_ones_own_go_through_one_pass_and_a_whole_run(clips: Path) -> None:
    nets = {
        n: {"audio": {"name": f"sound_nets:{n}", "weights": "random:1"}} for n in ("short", "long")
    }
    both = run(clips, "both", nets)
    for name, choices in nets.items():
        alone = run(clips, name, {name: choices})[name]
        every = torch.arange(6)
        assert torch.equal(both[name].gather("audio", every), alone.gather("audio", every))
        assert set(predicted(clips, both[name])) <= {"a", "b"}
    mels = [both[name].provenance["audio"]["audio"]["mels"] for name in nets]
    assert mels == [32, 48]
    assert both["short"].shape("audio") == (2 * 6, 4)
    assert both["long"].shape("audio") == (2 * 8, 4)


@pytest.mark.extra
def test_features_of_openvino_are_trained_on_and_predicted_with(clips: Path) -> None:
    if not openvino_engine.is_installed():
        pytest.skip("openvino is not installed")
    choice = {"name": "s3d", "weights": "random:0", "frames": 8, "size": 32}
    sets = {name: {"rgb": {**choice, "engine": name}} for name in ("torch", "openvino")}
    stores = run(clips, "f", sets)
    tokens = [of.gather("rgb", torch.arange(6)).float() for of in stores.values()]
    torch.testing.assert_close(*tokens, rtol=1e-2, atol=1e-3)
    facts = stores["openvino"].provenance["rgb"]
    assert facts["engine"] == openvino_engine.name_and_version()
    assert predicted(clips, stores["openvino"]) == predicted(clips, stores["torch"])
    across = predict(clips / "runs/openvino", stores["torch"], split="val")  # of the other engine
    assert len(across) == 2
