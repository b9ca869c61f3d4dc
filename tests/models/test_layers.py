"""Tokens of any layer of torchvision's networks; what a missing extra says."""

import sys

import pytest
import torch

from karmma_pipeline.errors import ConfigError
from karmma_pipeline.models.backbones import ARCHITECTURES, Backbone, BackboneChoice, registry
from karmma_pipeline.models.backbones.describe import describe


@pytest.mark.parametrize(
    ("name", "layer", "module", "size"),
    [pytest.param("swin3d_t", 2, "features.2", {"frames": 2, "size": 32}, marks=pytest.mark.slow),
     pytest.param("r3d_18", -2, "layer3", {"frames": 2, "size": 32}, marks=pytest.mark.slow),
     ("resnet18", "layer2.0", "layer2.0", {"image": (32, 64)})],
)  # fmt: skip
def test_a_layers_tokens_are_what_its_module_gives_and_the_rest_costs_nothing(
    name: str, layer: int | str, module: str, size: dict[str, object]
) -> None:
    tree = {"name": name, "weights": "random:0", **size}
    whole = BackboneChoice.model_validate(tree)
    choice = BackboneChoice.model_validate({**tree, "layer": layer})
    net = Backbone(whole).net
    seen: list[torch.Tensor] = []
    net.get_submodule(module).register_forward_hook(lambda _m, _i, out: seen.append(out))
    x = torch.randn(1, *choice.input_shape)
    with torch.inference_mode():
        ours = Backbone(choice)(x)
        ARCHITECTURES[name].features(net, x)
    theirs = seen[0] if name == "swin3d_t" else seen[0].movedim(1, -1)
    torch.testing.assert_close(ours, theirs.flatten(1, -2), rtol=1e-3, atol=1e-3)
    assert choice.output_shape == tuple(ours.shape[1:])
    assert describe(choice)["gflops"] < describe(whole)["gflops"]


def test_a_layer_that_is_not_there_is_told_with_those_that_are() -> None:
    tree = {"name": "resnet18", "weights": "random:0", "image": (32, 64)}
    with pytest.raises(ConfigError, match=r"layer='layr2': .* it has layer2"):
        _ = BackboneChoice.model_validate({**tree, "layer": "layr2"}).output_shape
    with pytest.raises(ConfigError, match="layer=4: ResNet has 4 blocks"):
        _ = BackboneChoice.model_validate({**tree, "layer": 4}).output_shape


@pytest.mark.parametrize(
    ("name", "package", "extra"),
    [("timm:vit_tiny_patch16_224", "timm", "timm"), ("hf:a/b", "transformers", "hf")],
)
def test_without_an_extra_one_sentence_names_it(
    name: str, package: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.find.cache_clear()
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf"pip install 'karmma-pipeline\[{extra}\]'"):
        _ = BackboneChoice(name=name).architecture
