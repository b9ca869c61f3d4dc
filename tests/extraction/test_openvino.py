"""OpenVINO as engine: the tokens of torch, the same bytes whatever happens, no silent way round."""

import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from support.media_files import write_video
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from karmma_pipeline import config
from karmma_pipeline.errors import ConfigError, StoreError
from karmma_pipeline.extraction import pipeline
from karmma_pipeline.extraction.inference import networks as inference_networks
from karmma_pipeline.extraction.inference import openvino_engine, runner
from karmma_pipeline.extraction.inference.batching import ForwardWorkers
from karmma_pipeline.extraction.inference.networks import Networks, configure, example
from karmma_pipeline.extraction.inference.runner import ComputeConfig, Network
from karmma_pipeline.extraction.pipeline import extract
from karmma_pipeline.extraction.recipe import ExtractRecipe
from karmma_pipeline.extraction.types import input_spec
from karmma_pipeline.models.backbones import (
    Architecture,
    Backbone,
    BackboneChoice,
    FrameTransform,
)
from karmma_pipeline.store import FeatureStore

CPU = torch.device("cpu")
OPENVINO: dict[str, Any] = {"weights": "random:0", "engine": "openvino"}
TINY: dict[str, Any] = {"name": "own_nets:tiny", **OPENVINO}
VIDEO: dict[str, Any] = {"frames": 8, "size": 32, **OPENVINO}


class Tiny(nn.Sequential):
    """A network that is converted in no time."""

    def __init__(self, stride: int = 2) -> None:
        parts = nn.Conv3d(3, 8, 3, stride), nn.BatchNorm3d(8), nn.ReLU(), nn.Conv3d(8, 6, 1)
        super().__init__(*parts)


class Branching(nn.Module):
    """Takes another way for dark clips: no graph has both."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(3, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.conv(x)
        return y if x.device.type == "meta" or x.mean() > 0 else -y


class Sorting(nn.Conv3d):
    """Holds an operation that OpenVINO has no rule for."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.special.bessel_j0(super().forward(x))


def own(net: type[nn.Module], *sizes: int) -> Architecture:
    return Architecture(
        kind="video",
        build=lambda weights: net(*sizes),
        weights=None,
        feature_map=lambda net, x: net(x),
        heads=(),
        frames=4,
        transform=FrameTransform(resize=(16,), crop=(16, 16), mean=(0.5,) * 3, std=(0.2,) * 3),
    )


def tiny() -> Architecture:
    return own(Tiny)


def branching() -> Architecture:
    return own(Branching)


def sorting() -> Architecture:
    return own(Sorting, 3, 4, 1)


extra = pytest.mark.extra


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep converted networks in a folder of the test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setitem(sys.modules, "own_nets", sys.modules[__name__])
    return tmp_path / "cache/karmma-pipeline/openvino"


@pytest.fixture
def needs_openvino() -> None:
    if not openvino_engine.is_installed():
        pytest.skip("openvino is not installed")


def make_recipe(folder: Path, **changes: Any) -> ExtractRecipe:
    tree = {
        "manifest": str(folder / "m.csv"),
        "out": str(folder / "out"),
        "sets": {"one": {"rgb": TINY}},
        "store": {"clips_per_shard": 4, "dtype": "float32"},
        "decode": {"workers": 1},
        **changes,
    }
    return config.build(ExtractRecipe, tree, "test")


def network(choice: dict[str, Any]) -> Network:
    return Network(Backbone(BackboneChoice(**choice)), CPU, ComputeConfig())


def clips_of(choice: dict[str, Any], count: int) -> torch.Tensor:
    modality = "audio" if "image" in choice else "rgb"
    return example(input_spec(modality, BackboneChoice(**choice)), count)


def plain(choice: dict[str, Any], clips: torch.Tensor) -> torch.Tensor:
    backbone = Backbone(BackboneChoice(**choice))
    with torch.inference_mode():
        return backbone(backbone.prepare(clips))


def cosine(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return torch.cosine_similarity(found.double(), wanted.double(), dim=-1).min().item()


@extra
@pytest.mark.usefixtures("needs_openvino")
@pytest.mark.parametrize(
    "choice",
    [
        {"name": "s3d", **VIDEO},
        {"name": "r2plus1d_18", **VIDEO, "tokens": [1, 1, 1]},
        {"name": "swin3d_t", **VIDEO, "frames": 4},
        {"name": "efficientnet_b0", **OPENVINO, "image": [32, 48]},
        {"name": "resnet18", **OPENVINO, "image": [32, 48], "layer": 1},
        {
            "name": "resnet18",
            **OPENVINO,
            "image": [32, 48],
            "layer": "bn1",  # a ReLU in place comes behind it
        },
    ],
    ids=lambda choice: choice["name"],
)
def test_tokens_are_those_of_torch(choice: dict[str, Any]) -> None:
    clips = clips_of(choice, 2)
    found, wanted = network(choice).tokens(clips), plain(choice, clips)
    assert found.shape == wanted.shape
    assert cosine(found, wanted) > 0.99999
    assert (found - wanted).abs().max() < 1e-3 * wanted.abs().max()


@extra
@pytest.mark.usefixtures("needs_openvino")
def test_the_memory_of_a_pass_is_known_without_computing_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    choice = {"name": "s3d", **VIDEO}
    fakes, (clip, one) = list[bool](), (clips_of(choice, 1), network(choice))
    first = next(m for m in one.backbone.net.modules() if isinstance(m, nn.Conv3d))
    first.register_forward_pre_hook(lambda _, given: fakes.append(isinstance(given[0], FakeTensor)))
    found = one.clip_bytes(clip)
    assert fakes == [True]
    monkeypatch.setattr(runner, "FakeTensorMode", lambda **_: nullcontext())
    assert found == network(choice).clip_bytes(clip)


@extra
@pytest.mark.usefixtures("needs_openvino")
def test_a_clip_has_the_same_bytes_alone_among_others_and_from_the_cache(cache: Path) -> None:
    clips = clips_of(TINY, 5)
    together = network(TINY).tokens(clips)
    (kept,) = cache.iterdir()
    written = kept.stat().st_mtime_ns
    alone = network(TINY)  # of what was kept
    assert torch.equal(torch.cat([alone.tokens(clip) for clip in torch.split(clips, 1)]), together)
    assert kept.stat().st_mtime_ns == written
    assert torch.equal(alone.tokens(clips[3:]), together[3:])
    kept.write_bytes(kept.read_bytes()[:-1] + b"?")
    assert torch.equal(network(TINY).tokens(clips), together)  # damaged: converted again
    assert kept.stat().st_mtime_ns != written


@extra
@pytest.mark.usefixtures("needs_openvino")
def test_several_threads_of_a_pass_give_the_same_tokens() -> None:
    clips, one = clips_of(TINY, 2), network(TINY)
    assert one.openvino is not None
    alone = one.tokens(clips)
    one.openvino.serve(1, threads=2)
    torch.testing.assert_close(one.tokens(clips), alone)


@extra
@pytest.mark.usefixtures("needs_openvino")
def test_another_network_or_input_is_converted_by_itself(cache: Path) -> None:
    for changes in ({}, {"weights": "random:1"}, {"frames": 6}, {"tokens": [1, 1, 1]}):
        choice = {**TINY, **changes}
        clips = clips_of(choice, 1)
        assert cosine(network(choice).tokens(clips), plain(choice, clips)) > 0.99999
    assert len(list(cache.iterdir())) == 4


@extra
@pytest.mark.usefixtures("needs_openvino")
def test_a_folder_that_cannot_be_written_is_told_and_costs_only_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    clips = clips_of(TINY, 1)
    assert cosine(network(TINY).tokens(clips), plain(TINY, clips)) > 0.99999
    assert "own_nets:tiny: will be converted again at the next start" in caplog.text


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    """Six clips of two files, and their manifest."""
    rows = ["clip_id,video,start,stop,verb,split"]
    for number in range(2):
        write_video(tmp_path / f"v{number}.mp4", sound=False)
        rows += [f"c{number}{i},v{number}.mp4,{i / 2},{i / 2 + 1},x,train" for i in range(3)]
    (tmp_path / "m.csv").write_text("\n".join(rows) + "\n")
    return tmp_path


def shards(out: Path) -> dict[Path, bytes]:
    return {p.relative_to(out): p.read_bytes() for p in sorted(out.glob("*/*/tokens/c/*/*"))}


@extra
@pytest.mark.usefixtures("needs_openvino")
def test_a_store_is_the_same_for_any_number_of_workers_and_goes_on_as_it_began(
    videos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside a network of torch, whose batches hold several clips."""
    both = {"one": {"rgb": TINY}, "two": {"rgb": {**TINY, "engine": "torch"}}}
    for count in (1, 3):
        monkeypatch.setattr(pipeline, "worker_count", lambda _, count=count: count)
        extract(make_recipe(videos, sets=both, batch_size=2, out=str(videos / f"out{count}")))
    first = shards(videos / "out1")
    assert len(first) == 4
    assert first == shards(videos / "out3")

    store = FeatureStore.open(videos / "out1/one").spec.modalities["rgb"]
    assert store.provenance["engine"] == openvino_engine.name_and_version()
    assert store.computed["batch_size"] == 1
    other = FeatureStore.open(videos / "out1/two").spec.modalities["rgb"]
    assert "engine" not in other.provenance

    commit = videos / "out1/one/commit/000001.safetensors"
    commit.unlink()  # shard 1, whose only batch is a short one, is to be done again
    (videos / "out1/one/manifest.json").unlink()
    extract(make_recipe(videos, sets=both, batch_size=2, out=str(videos / "out1")))
    assert shards(videos / "out1") == first

    torchs = {"one": both["two"], "two": both["two"]}
    with pytest.raises(StoreError, match=r"provenance\.engine was 'openvino .*', now None"):
        extract(make_recipe(videos, sets=torchs, batch_size=2, out=str(videos / "out1")))


@extra
@pytest.mark.usefixtures("needs_openvino")
def test_it_reports_nothing_to_its_maker(tmp_path: Path) -> None:
    """OpenVINO would send its import and each conversion to its maker and leave a number at home.

    In a process of its own, as another test may have imported the library.
    """
    program = (
        "import socket, sys\n"
        "def refuse(*_): raise SystemExit('it asked for the network')\n"
        "socket.getaddrinfo = socket.socket.connect = refuse\n"
        "from karmma_pipeline.extraction.inference import openvino_engine as engine\n"
        "engine._core()\n"
        "assert sys.modules['openvino_telemetry'] is None\n"
    )
    environment = {"HOME": str(tmp_path), "PATH": "", "PYTHONPATH": ":".join(sys.path)}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)
    assert list(tmp_path.iterdir()) == []


@extra
@pytest.mark.usefixtures("needs_openvino")
@pytest.mark.parametrize(
    ("factory", "reason"), [("branching", "data-dependent"), ("sorting", "bessel_j0")]
)
def test_what_cannot_be_converted_says_why_before_a_store_is_made(
    videos: Path, factory: str, reason: str
) -> None:
    choice = {"name": f"own_nets:{factory}", "weights": "random:0", "engine": "openvino"}
    with pytest.raises(ConfigError, match=rf"(?i){reason}.*set engine: torch") as raised:
        extract(make_recipe(videos, sets={"one": {"rgb": choice}}))
    assert f"own_nets:{factory}: engine openvino does not support this network" in str(raised.value)
    assert not (videos / "out").exists()


@extra
@pytest.mark.usefixtures("needs_openvino")
def test_a_conversion_that_computes_something_else_is_refused(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = openvino_engine._convert
    monkeypatch.setattr(
        openvino_engine, "_convert", lambda program, name: right(other_program(program), name)
    )
    with pytest.raises(ConfigError, match="own_nets:tiny: the tokens of engine openvino differ"):
        network(TINY).tokens(clips_of(TINY, 1))
    assert not cache.exists()


def other_program(program: Any) -> Any:
    weight = program.state_dict["net.0.weight"]
    program.state_dict["net.0.weight"] = nn.Parameter(-weight, requires_grad=False)
    return program


def test_without_the_library_one_sentence_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openvino_engine, "is_installed", lambda: False)
    with pytest.raises(ConfigError, match=r"own_nets:tiny: .*'karmma-pipeline\[openvino\]'.*torch"):
        Networks(make_recipe(tmp_path))


def test_a_network_that_it_computes_faster_is_named_as_an_extraction_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choice = {"name": "s3d", **VIDEO, "engine": "torch"}
    recipe = make_recipe(tmp_path, sets={"one": {"rgb": choice}}, device="cpu")
    store = {"one": recipe.out / "one"}
    # A model that is in use, without a store, keeps the engine of its tokens.
    for there, stores in ((True, store), (False, store), (True, {})):
        said: list[str] = []
        monkeypatch.setattr(inference_networks, "find_spec", lambda _, there=there: there or None)
        configure(Networks(recipe), stores, said.append)
        told = "faster in benchmarks (1.2 times): set engine: openvino" in said[-1]
        assert told == (there and bool(stores))


def test_another_device_than_a_cpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino_engine, "is_installed", lambda: True)
    choice = BackboneChoice(**TINY)
    with pytest.raises(ConfigError, match="runs on CPUs only, but the device is cuda:1"):
        openvino_engine.check(choice, torch.device("cuda:1"))


def test_keys_of_a_recipe_that_it_cannot_follow_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="precision='bfloat16': engine openvino computes in"):
        make_recipe(tmp_path, precision="bfloat16")
    with pytest.raises(ConfigError, match="compile=true: only for engine torch"):
        make_recipe(tmp_path, compile=True)
    with pytest.raises(ConfigError, match="boxes does not compute anything"):
        make_recipe(tmp_path, sets={"one": {"boxes": {"name": "boxes", "engine": "openvino"}}})


@extra
@pytest.mark.usefixtures("needs_openvino")
def test_each_worker_has_a_thread_and_a_clip_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    networks = Networks(make_recipe(tmp_path, batch_size=64, memory_format="channels_last"))
    configure(networks, {}, print)
    (one,) = networks.all.values()
    assert one.config == ComputeConfig(chosen="by the engine")
    assert one.openvino is not None
    compiled: list[tuple[int, ...]] = []
    monkeypatch.setattr(one.openvino, "serve", lambda *served: compiled.append(served))
    with ForwardWorkers(networks, 3):
        assert compiled == [(3, 1)]
