import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.lanes import slow_unless

from karmma_pipeline import config
from karmma_pipeline.errors import ConfigError
from karmma_pipeline.models.backbones import (
    ARCHITECTURES,
    ENTRY_POINTS,
    Backbone,
    BackboneChoice,
)
from karmma_pipeline.models.backbones.describe import describe, list_backbones

SMALL: dict[str, Any] = {"name": "mobilenet_v3_large", "weights": "random:0", "image": (32, 32)}


@pytest.mark.parametrize(
    ("name", "image", "tokens", "width"),
    [("efficientnet_b0", (342, 715), 253, 1280), ("resnet18", (64, 96), 6, 512)],
)
def test_image_networks_give_their_map_as_tokens(
    name: str, image: tuple[int, int], tokens: int, width: int
) -> None:
    choice = BackboneChoice(name=name, weights="random:0", image=image)
    assert choice.output_shape == (tokens, width)


@pytest.mark.parametrize(
    ("name", "grid", "width"),
    [
        ("swin3d_t", (16, 7, 7), 768),
        ("swin3d_b", (16, 7, 7), 1024),
        ("mvit_v1_b", (8, 7, 7), 768),
        ("mvit_v2_s", (8, 7, 7), 768),
        ("r2plus1d_18", (2, 7, 7), 512),
        ("mc3_18", (16, 7, 7), 512),
    ],
)
def test_video_networks_give_their_map_as_tokens(
    name: str, grid: tuple[int, int, int], width: int
) -> None:
    choice = BackboneChoice(name=name, weights="DEFAULT")
    assert (choice.raw_grid, choice.output_shape) == (grid, (int(np.prod(grid)), width))
    pooled = BackboneChoice(name=name, weights="DEFAULT", tokens=(1, 5, 5))
    assert pooled.output_shape == (25, width)


NAMES = sorted(n for n, a in ARCHITECTURES.items() if a.weights and not a.fixed)


@pytest.mark.parametrize("name", slow_unless({"s3d", "swin3d_t", "resnet18"}, NAMES))
def test_the_cut_network_is_torchvisions_own_up_to_its_head(name: str) -> None:
    """The head of torchvision's network on the mean of our tokens gives its own output."""
    architecture = ARCHITECTURES[name]
    video, s3d = architecture.kind == "video", name == "s3d"
    shape = (16, 224, 224) if s3d else (4, 32, 32) if video else (32, 64)
    torch.manual_seed(0)
    whole = architecture.build(weights=None).eval()
    x = torch.randn(1, 3, *shape)
    with torch.inference_mode():
        pooled = architecture.features(whole, x).mean((2, 3, 4))
        for head in architecture.heads:
            layer = getattr(whole, head)
            pooled = layer(pooled.view(1, -1, 1, 1, 1)).flatten(1) if s3d else layer(pooled)
        torch.testing.assert_close(pooled, whole(x), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_mvits_tokens_are_its_own_without_the_class_token() -> None:
    architecture = ARCHITECTURES["mvit_v2_s"]
    torch.manual_seed(0)
    whole = architecture.build(weights=None).eval()
    seen: list[torch.Tensor] = []
    whole.get_submodule("norm").register_forward_hook(lambda _m, _i, out: seen.append(out))
    x = torch.randn(1, 3, 16, 224, 224)
    with torch.inference_mode():
        whole(x)
        features = architecture.features(whole, x)
    assert torch.equal(features.flatten(2).transpose(1, 2), seen[0][:, 1:])


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


@pytest.mark.slow
def test_the_shape_foretold_is_the_shape_that_comes() -> None:
    choice = BackboneChoice(name="s3d", weights="random:0", frames=8, size=64, tokens=(1, 1, 2))
    backbone = Backbone(choice)
    frames = torch.randint(0, 256, (2, 8, 3, 64, 64), dtype=torch.uint8)
    with torch.inference_mode():
        assert backbone(backbone.prepare(frames)).shape == (2, *choice.output_shape)


def test_a_video_network_takes_spectrogram_frames() -> None:
    choice = BackboneChoice(name="swin3d_t", weights="random:0", frames=4, size=32)
    backbone = Backbone(choice)
    with torch.inference_mode():
        tokens = backbone(backbone.prepare(torch.randn(2, 4, 32, 32)))
    assert tokens.shape == (2, *choice.output_shape)


def test_a_backbone_stays_frozen() -> None:
    backbone = Backbone(BackboneChoice(**SMALL)).train()
    assert not any(m.training for m in backbone.modules())
    assert not any(p.requires_grad for p in backbone.parameters())


def test_the_record_of_a_backbone_is_plain_and_tells_choices_apart() -> None:
    choice = BackboneChoice(name="r3d_18", weights="random:0", frames=4, size=32, tokens=(1, 1, 2))
    facts = Backbone(choice).provenance()
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts
    assert facts["input"] == [3, 4, 32, 32]
    assert (facts["raw_grid"], facts["token_grid"], facts["width"]) == ([1, 2, 2], [1, 1, 2], 512)
    assert facts["transform"]["antialias"] is False
    assert facts["transform"]["resize"] == [37, 49]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"name": "swin3d_x"},
            r"unknown backbone \(did you mean swin3d_\w, .*\?\); known: swin3d_t, ",
        ),
        ({"weights": "random:x"}, "is an integer"),
        ({"image": None}, "needs image"),
        ({"image": [0, 32]}, "greater than 0"),
        ({"image": [10**7, 32]}, r"image\.0=10000000: input should be less than or equal to 8192"),
        ({"tokens": [0, 1, 1]}, "greater than 0"),
        ({"size": 32}, "takes images; set image"),
        ({"name": "r3d_18"}, r"image=\[32, 32\]: r3d_18 takes video frames"),
        ({"name": "mvit_v2_s", "image": None, "size": 112}, "16 frames of 224 px only"),
        ({"name": "mvit_v2_s", "image": None, "frames": 8}, "16 frames of 224 px only"),
    ],
)
def test_a_wrong_choice_is_found_when_the_recipe_is_read(
    change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        config.build(BackboneChoice, {**SMALL, **change}, "r.yaml")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": "IMAGENET9"}, "neither a file nor published weights"),
        ({"weights": "gone.pt"}, "gone.pt: no such weights file"),
        ({"name": "no.such:net"}, "cannot be imported .* PYTHONPATH"),
        ({"name": "tim:vit_small_patch16_dinov3.lvd1689m"}, r"\(did you mean timm:vit_small_pat"),
        ({"name": "json:loads"}, "belongs to Python's standard library"),
        ({"name": "yaml:safe_load"}, "its factory failed"),
        ({"name": "yaml:__name__"}, "returned a str"),
        ({"tokens": (1, 2, 2)}, r"tokens=\[1, 2, 2\]: finer than the grid \[1, 1, 1\]"),
        ({"name": "s3d", "image": None, "frames": 2, "size": 16}, "does not accept it .*too small"),
    ],
)
def test_a_wrong_choice_is_found_before_anything_runs(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Backbone(BackboneChoice(**{**SMALL, **change}))


OWN = """
import torch
from karmma_pipeline.models.backbones import Architecture, FrameTransform

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.body = torch.nn.Conv3d(3, 2, (1, 4, 4), (1, 4, 4))
        self.head = torch.nn.Linear(2, 9)

def video():
    half = FrameTransform(resize=(16,), crop=(12, 12), mean=(0.5,) * 3, std=(0.5,) * 3)
    return Architecture(
        "video", lambda weights: Net(), None, lambda net, x: net.body(x), ("head",), 5,
        transform=half,
    )

def bare():
    return Architecture("video", lambda weights: Net(), None, lambda net, x: net.body(x), ())

def flat():
    return Architecture("image", lambda weights: Net(), None, lambda net, x: x.mean((2, 3)), ())
"""


@pytest.fixture
def own_nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_nets.py").write_text(OWN)
    info = tmp_path / "own_nets-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: own-nets\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{ENTRY_POINTS}]\nown_video = own_nets:video\n")
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.usefixtures("own_nets")
@pytest.mark.parametrize("name", ["own_nets:video", "own_video"])
def test_ones_own_network_comes_through_the_same_door(tmp_path: Path, name: str) -> None:
    choice = BackboneChoice(name=name, weights="random:0")
    backbone = Backbone(choice)
    frames = choice.transform.apply(np.zeros((5, 20, 30, 3), np.uint8))
    tokens = backbone(backbone.prepare(torch.from_numpy(frames)[None]))
    assert tokens.shape == (1, 5 * 3 * 3, 2)
    torch.save(backbone.net.state_dict(), tmp_path / "own.pt")
    again = Backbone(BackboneChoice(name=name, weights=str(tmp_path / "own.pt")))
    assert torch.equal(again(backbone.prepare(torch.from_numpy(frames)[None])), tokens)
    assert describe(choice)["width"] == 2


@pytest.mark.usefixtures("own_nets")
def test_installed_networks_of_others_are_listed_without_importing_them() -> None:
    rows = {row["name"]: row for row in list_backbones()}
    assert rows["own_video"]["input"] == "own_nets:video"
    assert set(ARCHITECTURES) < set(rows)
    assert rows["swin3d_t"]["parameters"] == 27_850_470


@pytest.mark.usefixtures("own_nets")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "own_nets:bare", "size": 12}, "needs transform=FrameTransform"),
        ({"name": "own_nets:flat", "image": (8, 8)}, r"expected \[B, D, t, h, w\]"),
        ({"name": "own_nets:video", "weights": "DEFAULT"}, "known: random:SEED, a path"),
    ],
)
def test_ones_own_network_is_told_what_it_lacks(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Backbone(BackboneChoice(**{"weights": "random:0", **change}))


def test_costs_agree_with_the_published_ones() -> None:
    """torchvision states 43.882 GMAC for 16 frames; 2 FLOPs each, 32 frames: four times that."""
    facts = describe(BackboneChoice(name="swin3d_t", weights="random:0", frames=32))
    assert facts["gflops"] == pytest.approx(4 * 43.882, rel=1e-4)
    assert facts["parameters"] == 27_850_470
    assert facts["grid"] == [16, 7, 7]
