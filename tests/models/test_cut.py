"""A network that is cut between its stages: prefix and suffix are the whole."""

from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import zarr
from support import cut_store
from support.lanes import slow_unless

from karmma_pipeline.errors import CheckpointError, ConfigError
from karmma_pipeline.models.backbones import ARCHITECTURES, BackboneChoice
from karmma_pipeline.models.backbones.layers import Stages
from karmma_pipeline.models.backbones.suffix import Suffix, weights_behind
from karmma_pipeline.store import FeatureStore

STAGED = [n for n, a in ARCHITECTURES.items() if isinstance(a.feature_map, Stages)]
QUICK = {"resnet18"}


def small(name: str) -> dict[str, object]:
    if ARCHITECTURES[name].kind == "image":
        return {"name": name, "image": (64, 96)}
    return {"name": name, "frames": 4 if name != "s3d" else 16, "size": 64 if name == "s3d" else 32}


@pytest.mark.parametrize("name", slow_unless(QUICK, STAGED))
def test_prefix_and_suffix_of_every_cut_give_the_bits_of_the_whole_network(name: str) -> None:
    whole = BackboneChoice.model_validate({**small(name), "weights": "random:0"})
    torch.manual_seed(0)
    architecture = ARCHITECTURES[name]
    net = architecture.headless().eval()
    suffix = cut_store.assert_same_bits(whole, net, whole.cuts[1:])
    # Behind the last cut lies no more than the last stage.
    stages = architecture.feature_map
    assert isinstance(stages, Stages)
    last = stages.modules[whole.cuts[-1]]
    count = sum(p.numel() for path in last for p in net.get_submodule(path).parameters())
    assert sum(p.numel() for p in suffix.parameters()) == count


@pytest.mark.slow
def test_a_network_of_blocks_is_cut_between_them() -> None:
    whole = BackboneChoice.model_validate({"name": "mvit_v2_s", "weights": "random:0"})
    assert whole.cuts == ("input", *(f"blocks.{n}" for n in range(16)))
    net = ARCHITECTURES["mvit_v2_s"].headless().eval()
    suffix = cut_store.assert_same_bits(whole, net, ("blocks.2", "blocks.15"))
    kept = {k: p for k, p in net.named_parameters() if k.startswith(("blocks.15.", "norm."))}
    assert {k for k, _ in suffix.net.named_parameters()} == {*kept}


def test_torchvisions_own_modules_are_the_stages_in_its_own_order() -> None:
    """Against torchvision's `features`, which knows nothing of stages."""
    net = ARCHITECTURES["efficientnet_b0"].build(weights=None).eval()
    x = torch.randn(1, 3, 64, 96)
    with torch.inference_mode():
        ours = ARCHITECTURES["efficientnet_b0"].features(net, x)
        assert torch.equal(ours, net.get_submodule("features")(x).unsqueeze(2))


def test_what_cannot_be_cut_says_where_it_could_be() -> None:
    swin = BackboneChoice.model_validate({**small("swin3d_t"), "cut": "layer4"})
    with pytest.raises(ConfigError, match=r"cut=.layer4.: allowed: input, stage1, .*, norm"):
        swin.stored_shape()
    mvit = BackboneChoice.model_validate({"name": "mvit_v2_s", "cut": "stage4"})
    with pytest.raises(ConfigError, match=r"cut=.stage4.: allowed: input, blocks\.0, .*\.15\."):
        mvit.stored_shape()
    own = BackboneChoice.model_validate(
        {"name": "support.live:video_net", "weights": "random:1", "cut": "body"}
    )
    with pytest.raises(ConfigError, match="no named stages; the only choice is input"):
        own.stored_shape()
    assert mvit.cut_at("input").stored_shape("rgb") == (16, 3 * 224 * 224)
    few = BackboneChoice.model_validate({**small("swin3d_t"), "cut": "input", "stored_frames": 3})
    with pytest.raises(ConfigError, match="takes 4 frames; store as many or more"):
        few.stored_shape()
    sound = {**small("resnet18"), "cut": "input", "stored_frames": 3}
    with pytest.raises(ConfigError, match="resnet18 takes no frames"):
        BackboneChoice.model_validate(sound).stored_shape()
    for change, said in (
        ({"name": "windows", "cut": "input"}, "no trainable parameters"),
        ({"cut": "stage4", "stored_frames": 12}, "stored_frames=12: requires cut: input"),
        ({"cut": "stage4", "engine": "openvino"}, "for engine torch"),
        ({"cut": "stage4", "layer": -1}, "give only one"),
    ):
        with pytest.raises(ValueError, match=said):
            BackboneChoice.model_validate({**small("swin3d_t"), **change})


@pytest.mark.parametrize("cut", slow_unless({"input"}, ["body", "input"]))
def test_what_a_store_holds_of_a_cut_network_becomes_its_tokens(tmp_path: Path, cut: str) -> None:
    store = FeatureStore.open(cut_store.write_cut_store(tmp_path / "cut", cut))
    plain = FeatureStore.open(cut_store.write_cut_store(tmp_path / "plain", None))
    index = torch.arange(1, 4)
    for m, choice in cut_store.choices(cut).items():
        assert store.shape(m) == choice.stored_shape(m)
        assert store.specs[m].grid == choice.stored_grid
        suffix = Suffix(choice)
        whole = weights_behind(store.provenance[m])
        suffix.net.load_state_dict({k: whole[k] for k in suffix.net.state_dict()})
        with torch.inference_mode():
            made = suffix(store.gather(m, index))
        torch.testing.assert_close(made, plain.gather(m, index), rtol=1e-5, atol=1e-5)


def test_pictures_are_stored_as_they_were_decoded_for_zarr_and_h5py(tmp_path: Path) -> None:
    root = cut_store.write_cut_store(tmp_path / "s", "input")
    wanted = cut_store.decoded()["flow"][:, :, :2].flatten(2).numpy()
    rows = np.asarray(zarr.open_group(root, mode="r")["flow/tokens"])[
        : len(wanted) * wanted.shape[1]
    ]
    assert rows.dtype == np.uint8
    np.testing.assert_array_equal(rows, wanted.reshape(rows.shape))
    with h5py.File(root / "flow/tokens/c/0/0") as file:
        (name,) = file
        np.testing.assert_array_equal(file[name][: len(rows)], rows)
    assert '"version": 4' in (root / "spec.json").read_text()
    assert (
        '"version": 2'
        in (cut_store.write_cut_store(tmp_path / "plain", None) / "spec.json").read_text()
    )


def test_other_weights_than_those_before_the_cut_are_refused(tmp_path: Path) -> None:
    store = FeatureStore.open(cut_store.write_cut_store(tmp_path / "s", "body"))
    with pytest.raises(CheckpointError, match="weights='random:7': their digest is"):
        weights_behind(store.provenance["rgb"], "random:7")


OF_DEMO = "karmma_pipeline.demo.networks:student_rgb"


@pytest.mark.parametrize(
    ("name", "cut"),
    [
        (OF_DEMO, "input"),
        (OF_DEMO, "space"),
        pytest.param("r3d_18", "input", marks=pytest.mark.slow),
        pytest.param("mvit_v2_s", "input", marks=pytest.mark.slow),
        pytest.param("timm:test_vit", "input", marks=pytest.mark.extra),
        pytest.param("timm:test_vit", "blocks.2", marks=pytest.mark.extra),
    ],
)
def test_less_memory_is_kept_for_a_backward_pass_with_the_same_gradient(
    name: str, cut: str
) -> None:
    if name.startswith("timm:"):
        pytest.importorskip("timm")
    size = {"frames": 16} if name == "mvit_v2_s" else {"frames": 2, "size": 64}
    choice = BackboneChoice.model_validate({"name": name, "weights": "random:0", "cut": cut} | size)
    stored = torch.rand(1, *choice.stored_shape("rgb"))
    stored = (255 * stored).byte() if cut == "input" else stored
    kept, gradients = [0, 0], []
    for save_memory in (False, True):
        torch.manual_seed(0)
        suffix = Suffix(choice)
        suffix.adapt(freeze_norm=True, stochastic=False, save_memory=save_memory)

        def count(tensor: torch.Tensor, save_memory: bool = save_memory) -> torch.Tensor:
            kept[save_memory] += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loss = suffix.train()(stored).square().mean()
        loss.backward()
        gradients.append([p.grad for p in suffix.parameters() if p.grad is not None])
    assert kept[True] < 0.6 * kept[False]
    assert gradients[0]
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=0)


def test_activations_in_place_do_not_disturb_what_is_computed_again() -> None:
    choice = BackboneChoice(name="resnet18", weights="random:0", image=(32, 32), cut="input")
    gradients = []
    for save_memory in (False, True):
        torch.manual_seed(0)
        suffix = Suffix(choice)
        suffix.adapt(freeze_norm=True, stochastic=False, save_memory=save_memory)
        suffix.train()(torch.ones(1, 32, 32)).square().mean().backward()
        gradients.append([p.grad for p in suffix.parameters() if p.grad is not None])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=0)


def test_a_suffix_is_in_evaluation_mode_but_for_what_is_to_train() -> None:
    suffix = Suffix(cut_store.choices("body")["rgb"]).train()
    body = list(suffix.net.get_submodule("body").children())
    modes = {type(m).__name__: m.training for m in body}
    assert modes == {"Dropout": False, "Conv3d": False, "BatchNorm3d": False, "ReLU": False}
    suffix.adapt(freeze_norm=False, stochastic=True, save_memory=False)
    assert all(m.training for m in body)
    suffix.adapt(freeze_norm=True, stochastic=True, save_memory=False)
    (norm,) = suffix.norms()
    assert not norm.training
    assert [p.requires_grad for p in norm.parameters()] == [False, False]
    assert not any(m.training for m in suffix.eval().modules())
