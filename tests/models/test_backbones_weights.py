import argparse
import hashlib
import os
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.lanes import slow_unless
from torch import Tensor

from karmma_pipeline.errors import CheckpointError, ConfigError
from karmma_pipeline.models.backbones import (
    ARCHITECTURES,
    Backbone,
    BackboneChoice,
    fetch,
    state_dicts,
)

SMALL: dict[str, Any] = {"name": "mobilenet_v3_large", "weights": "random:0", "image": (32, 32)}
State = dict[str, Tensor]


def load(path: Path) -> Backbone:
    return Backbone(BackboneChoice(**{**SMALL, "weights": str(path)}))


@pytest.fixture(scope="module")
def state() -> State:
    return Backbone(BackboneChoice(**{**SMALL, "weights": "random:7"})).net.state_dict()


@pytest.mark.parametrize("nest", [None, "state_dict", "model", "model_state_dict"])
@pytest.mark.parametrize("prefix", ["", "module.", "module.backbone.", "encoder.trunk."])
def test_state_dicts_load_as_found_in_the_wild(
    tmp_path: Path, state: State, nest: str | None, prefix: str
) -> None:
    found = {prefix + k: v for k, v in state.items()}
    found[prefix + "classifier.3.weight"] = torch.zeros(5, 5)
    path = tmp_path / "w.pth"
    around = {nest: found, "epoch": 3, "best_acc1": torch.tensor(71.0)} if nest else found
    torch.save(around, path)
    backbone = load(path)
    assert all(torch.equal(v, state[k]) for k, v in backbone.net.state_dict().items())
    assert backbone.loaded.unexpected == (prefix + "classifier.3.weight",)
    assert backbone.loaded.prefix == prefix
    assert not backbone.provenance()["weights_missing"]


def test_safetensors_load_too(tmp_path: Path, state: State) -> None:
    save_file(state, tmp_path / "w.safetensors")
    backbone = load(tmp_path / "w.safetensors")
    assert all(torch.equal(v, state[k]) for k, v in backbone.net.state_dict().items())


def test_half_precision_files_load_into_float32(tmp_path: Path, state: State) -> None:
    half = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
    torch.save(half, tmp_path / "w.pt")
    loaded = load(tmp_path / "w.pt").net.state_dict()
    assert all(v.dtype == state[k].dtype for k, v in loaded.items())
    assert torch.equal(loaded["features.0.0.weight"], half["features.0.0.weight"].float())


def test_files_older_than_batch_norms_counters_are_whole(tmp_path: Path, state: State) -> None:
    old = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    torch.save(old, tmp_path / "w.pt")
    assert load(tmp_path / "w.pt").loaded.missing == ()


def test_saved_arguments_beside_the_weights_do_no_harm(tmp_path: Path, state: State) -> None:
    torch.save({"model": state, "args": argparse.Namespace(lr=0.1)}, tmp_path / "w.pt")
    assert load(tmp_path / "w.pt").loaded.missing == ()


def test_what_a_file_leaves_out_is_named_and_the_same_in_every_job(
    tmp_path: Path, state: State
) -> None:
    part = {**state, "features.1.block.0.0.weight": torch.zeros(2, 2)}
    del part["features.0.0.weight"]
    torch.save(part, tmp_path / "w.pt")
    first = load(tmp_path / "w.pt")
    torch.manual_seed(99)
    second = load(tmp_path / "w.pt")
    assert first.loaded == second.loaded
    assert first.loaded.missing == ("features.0.0.weight",)
    assert first.loaded.wrong_shape == ("features.1.block.0.0.weight",)
    assert "1 missing (features.0.0.weight), 1 of another shape" in first.loaded.report()
    wanted = ["features.0.0.weight", "features.1.block.0.0.weight"]
    assert first.provenance()["weights_missing"] == wanted


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    other = BackboneChoice(name="resnet18", weights="random:0", image=(32, 32))
    torch.save(Backbone(other).net.state_dict(), tmp_path / "w.pt")
    with pytest.raises(
        CheckpointError, match=r"only 0 of .* Are these the weights of another network"
    ):
        load(tmp_path / "w.pt")


def test_a_file_with_two_such_networks_is_refused(tmp_path: Path, state: State) -> None:
    both = {f"{who}.{k}": v for k, v in state.items() for who in ("student", "teacher")}
    torch.save(both, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=r"'student\.' and 'teacher\.'"):
        load(tmp_path / "w.pt")


class Evil:
    def __init__(self, flag: Path) -> None:
        self.flag = flag

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.flag}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_malicious_pickle_is_refused_and_does_not_run(tmp_path: Path, zipped: bool) -> None:
    flag, path = tmp_path / "ran", tmp_path / "w.pt"
    evil = {"state_dict": Evil(flag)}
    torch.save(evil, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match="rejected"):
        load(path)
    assert not flag.exists()
    torch.load(path, weights_only=False)
    assert flag.exists()  # it would have


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"epoch": 3}, "contains no state dict; found .'epoch'"),
        ([1, 2], "contains no state dict; found .'list'"),
        (b"PK\x03\x04 cut off", "rejected, because it is damaged"),
        (b"", "rejected, because it is damaged"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: object, message: str) -> None:
    path = tmp_path / "w.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(CheckpointError, match=message):
        load(path)


def test_missing_published_weights_name_the_command_that_fetches_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(socket, "socket", None)  # would fail if it tried the network
    choice = BackboneChoice(name="swin3d_t", weights="KINETICS400_V1", frames=2, size=32)
    command = r"karmma backbones fetch swin3d_t Swin3D_T_Weights\.KINETICS400_V1"
    with pytest.raises(CheckpointError, match=command) as caught:
        Backbone(choice)
    assert str(tmp_path / "hub" / "checkpoints") in str(caught.value)


@pytest.fixture
def served(tmp_path: Path, state: State, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A published weight that lies in a folder instead of on a server."""
    torch.save(state, tmp_path / "w")
    sha = hashlib.sha256((tmp_path / "w").read_bytes()).hexdigest()
    source = (tmp_path / "w").rename(tmp_path / f"net-{sha[:8]}.pth")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    member = SimpleNamespace(url=source.as_uri())
    monkeypatch.setattr(state_dicts, "enum_member", lambda *_: member)
    return source


def test_fetched_weights_are_where_an_offline_run_finds_them(served: Path, state: State) -> None:
    path = fetch("mobilenet_v3_large")
    assert path.read_bytes() == served.read_bytes()
    served.unlink()  # the network is gone
    assert fetch("mobilenet_v3_large") == path
    backbone = Backbone(BackboneChoice(**{**SMALL, "weights": "DEFAULT"}))
    weight = backbone.net.state_dict()["features.0.0.weight"]
    assert torch.equal(weight, state["features.0.0.weight"])


def test_a_damaged_download_is_not_kept(served: Path, tmp_path: Path) -> None:
    good = served.read_bytes()
    served.write_bytes(good[:-1])
    with pytest.raises(CheckpointError, match="the download failed"):
        fetch("mobilenet_v3_large", folder=tmp_path / "weights")
    assert not any((tmp_path / "weights").iterdir())
    (tmp_path / "weights" / served.name).write_bytes(good[:-1])
    with pytest.raises(CheckpointError, match="does not match its file name"):
        fetch("mobilenet_v3_large", folder=tmp_path / "weights")


def test_what_is_not_published_cannot_be_fetched() -> None:
    with pytest.raises(ConfigError, match=r"known: ResNet18_Weights\.IMAGENET1K_V1"):
        fetch("resnet18", "IMAGENET9")


def test_random_weights_depend_on_their_seed_alone() -> None:
    a = Backbone(BackboneChoice(**SMALL))
    torch.manual_seed(1)
    before = torch.get_rng_state()
    b = Backbone(BackboneChoice(**SMALL))
    assert torch.equal(torch.get_rng_state(), before)
    other = Backbone(BackboneChoice(**{**SMALL, "weights": "random:1"}))
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(a(x), b(x))
    assert not torch.allclose(a(x), other(x))
    digests = [n.provenance()["weights_sha256"] for n in (a, b, other)]
    assert digests[0] == digests[1] != digests[2]


def scenes(shape: tuple[int, ...]) -> Tensor:
    """Three clips with textures of different colour and contrast, as normalised video is."""
    generator = torch.Generator().manual_seed(3)
    one = [1] * (len(shape) - 1)
    texture = torch.randn(3, 3, *[1] * (len(shape) - 3), 6, 6, generator=generator)
    mode = "trilinear" if len(shape) == 4 else "bilinear"
    texture = torch.nn.functional.interpolate(texture, shape[1:], mode=mode)
    contrast = torch.tensor([0.2, 0.6, 1.2]).view(3, 1, *one)
    grain = 0.1 * torch.randn(3, *shape, generator=generator)
    return texture * contrast + torch.randn(3, 3, *one, generator=generator) + grain


NAMES = sorted(n for n, a in ARCHITECTURES.items() if a.weights and not a.fixed)


@pytest.mark.parametrize("name", slow_unless({"s3d", "swin3d_t", "resnet18"}, NAMES))
def test_random_features_of_scenes_neither_vanish_nor_explode(name: str) -> None:
    video = ARCHITECTURES[name].kind == "video"
    more: dict[str, Any] = {"frames": 8, "size": 32} if video else {"image": (32, 64)}
    backbone = Backbone(BackboneChoice(name=name, weights="random:0", **more))
    with torch.inference_mode():
        tokens = backbone(scenes(backbone.choice.input_shape))
    assert 0.1 < tokens.std() < 10
    between = (tokens - tokens.mean(0)).square().mean().sqrt()
    assert between > 0.3 * tokens.std()
