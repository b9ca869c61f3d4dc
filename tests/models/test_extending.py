"""The examples of docs/extending.md do what the page says."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn
from torchvision.models.video import swin_transformer

from karmma_pipeline import config
from karmma_pipeline.errors import CheckpointError, ConfigError
from karmma_pipeline.extraction.recipe import ExtractRecipe
from karmma_pipeline.extraction.types import DecodeSettings
from karmma_pipeline.models.backbones import (
    Backbone,
    BackboneChoice,
    registry,
)
from karmma_pipeline.models.backbones.describe import top_classes
from karmma_pipeline.models.backbones.suffix import Suffix

PAGE = (Path(__file__).parents[2] / "docs" / "extending.md").read_text()
MODULES = {
    re.search(r"# (\w+)\.py", code)[1]: code  # type: ignore[index]
    for code in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
}
RECIPES = [yaml.safe_load(text) for text in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)]
OWN, LAYERS, KEY_MAP, SENSOR = RECIPES


@pytest.fixture
def pages_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, code in MODULES.items():
        (tmp_path / f"{name}.py").write_text(code)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    registry.find.cache_clear()
    return tmp_path


def test_the_pages_own_network_runs_as_its_recipe_says(pages_modules: Path) -> None:
    tree = OWN["sets"]["mine"]["rgb"]
    drawn = Backbone(config.build(BackboneChoice, {**tree, "weights": "random:0"}, "page"))
    path = pages_modules / "tubes.pt"
    torch.save({"model": {**drawn.net.state_dict(), "head.weight": torch.zeros(400, 128)}}, path)
    choice = config.build(BackboneChoice, {**tree, "weights": str(path)}, "page")
    backbone = Backbone(choice)
    assert choice.output_shape == (4 * 5 * 5, 128)
    assert backbone.loaded.unexpected == ("head.weight",)
    frames = torch.randint(0, 256, (2, 8, 3, 112, 112), dtype=torch.uint8)
    tokens = backbone(backbone.prepare(frames))
    assert tokens.shape == (2, 100, 128)
    assert torch.equal(tokens, drawn(drawn.prepare(frames)))


@pytest.mark.parametrize("module", ["my_nets", "convnext", "shuffle"])
def test_the_pages_adapters_have_at_most_ten_lines(module: str) -> None:
    code = MODULES[module]
    adapter = code[code.index("def tubes") :] if module == "my_nets" else code  # behind its network
    assert len([line for line in adapter.splitlines() if line.strip("# ")]) <= 10


@pytest.mark.slow
def test_the_pages_networks_give_layers_and_are_cut_as_their_recipe_says(
    pages_modules: Path,
) -> None:
    tree = yaml.safe_load(yaml.safe_dump(LAYERS).replace("tubes.safetensors", "random:0"))
    tree["sets"]["trained"]["audio"]["weights"] = "random:0"
    recipe = config.build(ExtractRecipe, {"manifest": "m.csv", "out": "o", **tree}, "page")
    assert recipe.views.count == 6
    DecodeSettings.of(recipe)  # there is something to crop
    first, trained = recipe.sets["first"]["rgb"], recipe.sets["trained"]
    x = torch.randn(1, *first.input_shape)
    backbone = Backbone(first)
    project: Any = backbone.net.project
    wanted = project.forward(x).flatten(2).transpose(1, 2)  # whose call would end behind it
    torch.testing.assert_close(backbone(x), wanted)
    assert trained["rgb"].stored_shape("rgb") == (8, 3 * 112 * 112)
    sound = trained["audio"]
    assert sound.own_audio is not None
    assert (sound.own_audio.front_end, sound.input_shape) == ("ast", (3, 64, 256))
    with torch.inference_mode():
        heard = torch.randn(2, *sound.input_shape)
        whole = Backbone(sound.cut_at(None))
        net: Any = whole.net
        maps = net.conv5(net.stage4(net.stage3(net.stage2(net.maxpool(net.conv1(heard))))))
        assert torch.equal(whole(heard), maps.flatten(2).transpose(1, 2))
        suffix = Suffix(sound)
        weights = net.state_dict()
        suffix.net.load_state_dict({k: weights[k] for k in suffix.net.state_dict()})
        assert torch.equal(suffix(Backbone(sound)(heard)), whole(heard))
    assert (
        0 < sum(p.numel() for p in suffix.parameters()) < sum(p.numel() for p in net.parameters())
    )


def test_the_pages_image_network_is_found_in_the_working_folder_and_takes_any_frames(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "convnext.py").write_text(MODULES["convnext"])
    monkeypatch.chdir(tmp_path)
    registry.find.cache_clear()
    for frames in (1, 3):
        choice = BackboneChoice(name="convnext:tiny", weights="random:0", frames=frames, size=64)
        assert choice.output_shape == (frames * 2 * 2, 768)
    backbone = Backbone(choice)
    clip = torch.randint(0, 256, (1, 3, 3, 64, 64), dtype=torch.uint8)
    x = backbone.prepare(clip)
    each = [backbone.net.features(x[:, :, t]).flatten(2).transpose(1, 2) for t in range(3)]  # type: ignore[operator]
    torch.testing.assert_close(backbone(x), torch.cat(each, dim=1))


@pytest.mark.usefixtures("pages_modules")
def test_the_pages_network_for_a_sensor_turns_windows_into_tokens() -> None:
    tree = {"manifest": "m.csv", "out": "o", **SENSOR}
    tree["sets"]["mine"]["imu"]["weights"] = "random:0"
    choice = config.build(ExtractRecipe, tree, "page").sets["mine"]["imu"]
    assert (choice.input_shape, choice.output_shape) == ((4, 50, 6), (40, 128))
    backbone = Backbone(choice)
    windows = torch.randn(2, 4, 50, 6)
    tokens = backbone(backbone.prepare(windows))
    # Each window by itself, its tokens one after another: the second window of the first clip.
    alone = backbone.net(windows[0, 1].T[None])[0].T
    torch.testing.assert_close(tokens[0, 10:20], alone)


SHAPES: dict[str, Any] = {"name": "swin3d_t", "frames": 2, "size": 32}


def foreign(state: dict[str, Tensor], norm: str) -> dict[str, Tensor]:
    """Name torchvision's tensors as Video-Swin-Transformer (norm) or mmaction2 (norm3) do."""
    found = {}
    for key, tensor in state.items():
        name = key.replace("mlp.0.", "mlp.fc1.").replace("mlp.3.", "mlp.fc2.")
        if match := re.match(r"features\.(\d)\.(.*)", name):
            stage, rest = int(match[1]), match[2]
            what = "downsample" if stage % 2 else "blocks"
            name = f"layers.{stage // 2}.{what}.{rest}"
        name = re.sub(r"^norm\.", f"{norm}.", name)
        found[f"backbone.{name}"] = tensor
    return found


@pytest.fixture(scope="module")
def whole() -> nn.Module:
    torch.manual_seed(0)
    return swin_transformer.swin3d_t(weights=None).eval()


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["norm", "norm3"])
def test_checkpoints_of_other_code_bases_load_through_a_key_map(
    tmp_path: Path, whole: nn.Module, norm: str
) -> None:
    state = whole.state_dict()
    file = foreign({k: v for k, v in state.items() if not k.startswith("head.")}, norm)
    file |= {f"cls_head.fc_cls.{k}": state[f"head.{k}"] for k in ("weight", "bias")}
    assert "backbone.layers.0.blocks.1.attn.relative_position_bias_table" in file
    assert "backbone.layers.2.downsample.reduction.weight" in file
    torch.save({"meta": {"epoch": 30}, "state_dict": file}, tmp_path / "k400.pth")
    tree = {**SHAPES, "weights": str(tmp_path / "k400.pth")}
    with pytest.raises(CheckpointError, match="Are these the weights of another network"):
        Backbone(config.build(BackboneChoice, tree, "r"))
    tree["key_map"] = KEY_MAP["rgb"]["key_map"]
    choice = config.build(BackboneChoice, tree, "r")
    backbone = Backbone(choice)
    mine = backbone.net.state_dict()
    assert all(torch.equal(mine[k], v) for k, v in state.items() if not k.startswith("head."))
    assert backbone.loaded.missing == ()
    x = torch.randn(1, 3, 2, 32, 32)
    with torch.inference_mode():
        wanted = whole(x).softmax(-1).max().item()
    found = top_classes(choice, x)
    assert len(found) == 5
    assert found[0][1] == pytest.approx(wanted, rel=1e-5)


def test_a_head_of_other_classes_is_not_read_as_kinetics(tmp_path: Path, whole: nn.Module) -> None:
    state = {**whole.state_dict(), "head.weight": torch.zeros(7, 768), "head.bias": torch.zeros(7)}
    torch.save(state, tmp_path / "mine.pt")
    choice = BackboneChoice(**SHAPES, weights=str(tmp_path / "mine.pt"))
    assert top_classes(choice, torch.zeros(1, 3, 2, 32, 32)) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key_map": [["(", "x"]]}, "not a valid regular expression"),
        ({"key_map": [["a", r"\1"]]}, "not a valid regular expression"),
        ({"weights": "random:0", "key_map": [["a", "b"]]}, "has no parameter names to map"),
    ],
)
def test_a_wrong_key_map_is_found_when_the_recipe_is_read(
    change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        config.build(BackboneChoice, {**SHAPES, "weights": "w.pt", **change}, "r.yaml")


def test_a_key_map_that_gives_one_name_twice_is_refused(tmp_path: Path) -> None:
    torch.save({"a1": torch.zeros(1), "a2": torch.zeros(1)}, tmp_path / "w.pt")
    choice = BackboneChoice(**SHAPES, weights=str(tmp_path / "w.pt"), key_map=((r"\d", ""),))
    with pytest.raises(CheckpointError, match="maps both 'a1' and 'a2' to 'a'"):
        Backbone(choice)
