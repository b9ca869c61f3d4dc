import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from karmma_pipeline.errors import CheckpointError, ConfigError
from karmma_pipeline.models.backbones import (
    ARCHITECTURES,
    Architecture,
    Backbone,
    BackboneChoice,
    describe,
    list_backbones,
)

VIDEO = sorted(name for name, a in ARCHITECTURES.items() if a.kind == "video")
SMALL = {"name": "mobilenet_v3_large", "weights": "random:0", "image": (32, 32)}


@pytest.mark.parametrize("name", VIDEO)
@settings(max_examples=4, deadline=None)
@given(height=st.integers(120, 300), width=st.integers(120, 400), seed=st.integers(0, 9))
def test_preprocessing_equals_torchvisions_bit_for_bit(
    name: str, height: int, width: int, seed: int
) -> None:
    frames = np.random.default_rng(seed).integers(0, 256, (2, height, width, 3), np.uint8)
    transform = BackboneChoice(name=name, weights="DEFAULT").transform
    ours = transform.normalise(torch.from_numpy(transform.apply(frames))[None])[0]
    official = ARCHITECTURES[name].weights.DEFAULT.transforms()
    theirs = official(torch.from_numpy(frames).permute(0, 3, 1, 2).contiguous())
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("name", "image", "tokens", "width"),
    [("efficientnet_b0", (342, 715), 253, 1280), ("resnet18", (64, 96), 6, 512)],
)
def test_image_networks_give_their_map_as_tokens(
    name: str, image: tuple[int, int], tokens: int, width: int
) -> None:
    assert BackboneChoice(name=name, weights="random:0", image=image).output_shape == (
        tokens,
        width,
    )


def test_tokens_are_averages_of_the_feature_map() -> None:
    raw = Backbone(BackboneChoice(**{**SMALL, "image": (64, 128)}))
    pooled = Backbone(BackboneChoice(**{**SMALL, "image": (64, 128)}, tokens=(1, 1, 2)))
    x = torch.randn(2, 64, 128)
    with torch.inference_mode():
        whole, halves = raw(raw.prepare(x)), pooled(pooled.prepare(x))
    grid = whole.view(2, 2, 4, -1)
    wanted = torch.stack([grid[:, :, :2].mean((1, 2)), grid[:, :, 2:].mean((1, 2))], dim=1)
    torch.testing.assert_close(halves, wanted)
    assert halves.shape[1:] == pooled.choice.output_shape


def test_random_weights_depend_on_their_seed_alone() -> None:
    torch.manual_seed(1)
    a = Backbone(BackboneChoice(**SMALL))
    state = torch.get_rng_state()
    b = Backbone(BackboneChoice(**SMALL))
    assert torch.equal(torch.get_rng_state(), state)
    other = Backbone(BackboneChoice(**{**SMALL, "weights": "random:1"}))
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(a(x), b(x))
    assert not torch.allclose(a(x), other(x))
    digests = [n.provenance()["weights_sha256"] for n in (a, b, other)]
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize("name", ["s3d", "r3d_18", "resnet18", "efficientnet_b0"])
def test_random_features_neither_vanish_nor_explode(name: str) -> None:
    video = ARCHITECTURES[name].kind == "video"
    more = {"frames": 8, "size": 32} if video else {"image": (32, 32)}
    backbone = Backbone(BackboneChoice(name=name, weights="random:0", **more))
    x = torch.rand(2, *backbone.choice.input_shape)
    with torch.inference_mode():
        tokens = backbone(x)
    assert 1e-2 < (tokens[0] - tokens[1]).std() < 1e4


def test_a_backbone_stays_frozen() -> None:
    backbone = Backbone(BackboneChoice(**SMALL)).train()
    assert not any(m.training for m in backbone.modules())
    assert not any(p.requires_grad for p in backbone.parameters())


@pytest.mark.parametrize("nest", [None, "state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module.", "module.backbone."])
def test_state_dicts_load_as_found_in_the_wild(
    tmp_path: Path, nest: str | None, prefix: str
) -> None:
    source = Backbone(BackboneChoice(**{**SMALL, "weights": "random:7"})).net
    state = {prefix + k: v for k, v in source.state_dict().items()}
    state[prefix + "classifier.3.weight"] = torch.zeros(5, 5)
    path = tmp_path / "w.pth"
    torch.save({nest: state, "epoch": 3} if nest else state, path)
    loaded = Backbone(BackboneChoice(**{**SMALL, "weights": str(path)}))
    x = torch.randn(1, 3, 32, 32)
    wanted = ARCHITECTURES["mobilenet_v3_large"].feature_map(source, x)
    assert torch.equal(loaded(x), wanted.flatten(2).transpose(1, 2))
    assert loaded.loaded.unused == ("classifier.3.weight",)


def test_safetensors_load_too(tmp_path: Path) -> None:
    source = Backbone(BackboneChoice(**{**SMALL, "weights": "random:7"})).net
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    Backbone(BackboneChoice(**{**SMALL, "weights": str(tmp_path / "w.safetensors")}))


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    other = BackboneChoice(name="resnet18", weights="random:0", image=(32, 32))
    torch.save(Backbone(other).net.state_dict(), tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match="is it another network"):
        Backbone(BackboneChoice(**{**SMALL, "weights": str(tmp_path / "w.pt")}))


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.flag}",)

    def __init__(self, flag: Path) -> None:
        self.flag = flag


def test_a_malicious_pickle_is_refused_and_does_not_run(tmp_path: Path) -> None:
    flag = tmp_path / "ran"
    torch.save({"state_dict": Evil(flag)}, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match="refused"):
        Backbone(BackboneChoice(**{**SMALL, "weights": str(tmp_path / "w.pt")}))
    assert not flag.exists()


def test_missing_published_weights_name_the_command_that_fetches_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    choice = BackboneChoice(name="swin3d_t", weights="KINETICS400_V1", frames=2, size=32)
    with pytest.raises(CheckpointError, match="karmma backbones fetch swin3d_t"):
        Backbone(choice)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "swin3d_x"}, "unknown backbone; known: "),
        ({"name": "no.such:net"}, "cannot be imported"),
        ({"weights": "IMAGENET9"}, "neither a file nor a published weight"),
        ({"weights": "random:x"}, "whole number"),
        ({"weights": "gone.pt"}, "no such weights file"),
        ({"image": None}, "needs image"),
    ],
)
def test_a_wrong_choice_says_what_is_allowed(change: dict[str, object], message: str) -> None:
    with pytest.raises((ConfigError, CheckpointError), match=message):
        Backbone(BackboneChoice.model_validate({**SMALL, **change}))


def own() -> Architecture:
    def build(weights: None) -> torch.nn.Module:
        return torch.nn.Conv2d(3, 2, 4, 4)

    return Architecture("image", build, None, lambda net, x: net(x).unsqueeze(2), ())


def test_ones_own_network_comes_through_the_same_door(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    choice = BackboneChoice(name="test_backbones:own", weights="random:0", image=(8, 12))
    assert Backbone(choice)(torch.randn(5, 3, 8, 12)).shape == (5, 6, 2)


def test_costs_agree_with_the_published_ones() -> None:
    """torchvision states 43.882 GMAC for 16 frames; 2 FLOPs each, 32 frames: four times that."""
    facts = describe(BackboneChoice(name="swin3d_t", weights="random:0", frames=32))
    assert facts["gflops"] == pytest.approx(4 * 43.882, rel=1e-4)
    assert facts["parameters"] == 27_850_470
    assert {row["name"] for row in list_backbones()} == set(ARCHITECTURES)
