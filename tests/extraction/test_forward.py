"""How networks compute: what the rule chooses, and that a store keeps to it."""

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from support.lanes import slow_unless
from support.media_files import write_video
from torch import nn

from karmma_pipeline import config, jobs
from karmma_pipeline.errors import ConfigError, KarmmaError, StoreError
from karmma_pipeline.extraction.inference.batching import collate
from karmma_pipeline.extraction.inference.networks import (
    Networks,
    by_rule,
    configure,
    example,
    memory_format,
)
from karmma_pipeline.extraction.inference.runner import (
    ComputeConfig,
    Network,
    fold_norms,
    use_onednn,
)
from karmma_pipeline.extraction.pipeline import extract
from karmma_pipeline.extraction.recipe import ExtractRecipe
from karmma_pipeline.extraction.types import BatchPlan, DecodedClip, input_spec
from karmma_pipeline.modalities import Reason
from karmma_pipeline.models.backbones import Backbone, BackboneChoice
from karmma_pipeline.store import FeatureStore

CPU = torch.device("cpu")
S3D: dict[str, Any] = {"name": "s3d", "weights": "random:0", "frames": 8, "size": 32}
RESNET: dict[str, Any] = {"name": "resnet18", "weights": "random:0", "image": [32, 32]}


def make_recipe(folder: Path, **changes: Any) -> ExtractRecipe:
    tree = {
        "manifest": str(folder / "m.csv"),
        "out": str(folder / "out"),
        "sets": {"student": {"rgb": S3D}},
        "store": {"clips_per_shard": 2},
        "decode": {"workers": 1},
        **changes,
    }
    return config.build(ExtractRecipe, tree, "test")


def network(choice: dict[str, Any], config: ComputeConfig | None = None) -> Network:
    return Network(Backbone(BackboneChoice(**choice)), CPU, config or ComputeConfig())


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    """Four clips of two files, and their manifest."""
    rows = ["clip_id,video,start,stop,verb,split"]
    for number in range(2):
        write_video(tmp_path / f"v{number}.mp4", sound=False)
        rows += [f"c{number}{i},v{number}.mp4,{i},{i + 1},x,train" for i in range(2)]
    (tmp_path / "m.csv").write_text("\n".join(rows) + "\n")
    return tmp_path


@pytest.mark.parametrize(
    "choice",
    [pytest.param(S3D, marks=pytest.mark.slow, id="video"), pytest.param(RESNET, id="image")],
)
def test_every_configuration_gives_the_tokens_of_plain_float32(choice: dict[str, Any]) -> None:
    modality = "rgb" if choice is S3D else "audio"
    batch = example(input_spec(modality, BackboneChoice(**choice)), 3)
    one = network(choice, ComputeConfig(batch_size=3))
    plain = one.tokens(batch)
    with torch.inference_mode():
        backbone = Backbone(BackboneChoice(**choice))
        wanted = backbone(backbone.prepare(batch))
    torch.testing.assert_close(plain, wanted, rtol=1e-3, atol=1e-3)
    one.use(ComputeConfig(memory_format="channels_last", batch_size=3))
    torch.testing.assert_close(one.tokens(batch), wanted, rtol=1e-3, atol=1e-3)
    one.use(ComputeConfig(precision="bfloat16", batch_size=3))
    half = one.tokens(batch)
    assert 0.5 < torch.cosine_similarity(half, plain, dim=-1).min() < 1
    one.use(ComputeConfig(batch_size=3))
    assert torch.equal(one.tokens(batch), plain)


def test_a_large_batch_is_cut_to_the_configured_size() -> None:
    batch = example(input_spec("rgb", BackboneChoice(**S3D)), 5)
    seen: list[int] = []
    one = network(S3D, ComputeConfig(batch_size=2))
    one.backbone.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    assert len(one.tokens(batch)) == 5
    assert seen == [2, 2, 1]


class Small:
    """Stands in for a device whose memory holds a few clips only."""

    def __init__(self, clips: int, error: Exception) -> None:
        self.clips, self.error = clips, error

    def __call__(self, module: object, args: tuple[torch.Tensor]) -> None:
        if len(args[0]) > self.clips:
            raise self.error


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
)
def test_a_batch_that_does_not_fit_is_halved_and_not_lost(error: Exception) -> None:
    batch = example(input_spec("rgb", BackboneChoice(**S3D)), 7)
    one = network(S3D, ComputeConfig(batch_size=8))
    wanted = one.tokens(batch)
    one.backbone.register_forward_pre_hook(Small(2, error))
    torch.testing.assert_close(one.tokens(batch), wanted, rtol=1e-3, atol=1e-3)
    assert one.halved == 3  # 7 into 4 and 3, and each of them again
    torch.testing.assert_close(one.tokens(batch), wanted, rtol=1e-3, atol=1e-3)
    assert one.halved == 3  # from then on batches are as small as they must be


def test_a_clip_that_does_not_fit_alone_ends_the_run_in_one_sentence() -> None:
    one = network(S3D)
    one.backbone.register_forward_pre_hook(Small(0, MemoryError()))
    with pytest.raises(KarmmaError, match="s3d: a single clip does not fit into the memory of cpu"):
        one.tokens(example(input_spec("rgb", BackboneChoice(**S3D)), 2))


def test_other_errors_of_a_network_are_not_taken_for_full_memory() -> None:
    one = network(S3D)
    with pytest.raises(RuntimeError, match="conv3d"):
        one.tokens(torch.zeros(1, 8, 4, 32, 32))


@pytest.mark.parametrize(
    ("choice", "wanted"),
    [
        (S3D, "channels_last"),
        (RESNET, "channels_last"),
        ({**S3D, "name": "r2plus1d_18"}, "channels_last"),
        ({**S3D, "name": "swin3d_t", "size": 64}, "contiguous"),
        ({"name": "mvit_v2_s", "weights": "random:0"}, "contiguous"),
    ],
    ids=lambda value: value["name"] if isinstance(value, dict) else value,
)
def test_networks_of_convolutions_keep_their_channels_together(
    choice: dict[str, Any], wanted: str
) -> None:
    assert memory_format(BackboneChoice(**choice).architecture.build(weights=None)) == wanted


@pytest.mark.parametrize(
    ("clip_mb", "memory_gb", "wanted"),
    [(1, None, 16), (30, None, 4), (40, None, 2), (300, None, 1), (16, 0.04, 2), (30, 100, 4)],
)
def test_a_batch_is_as_large_as_fits(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    clip_mb: int,
    memory_gb: float | None,
    wanted: int,
) -> None:
    one, spec = network(S3D), input_spec("rgb", BackboneChoice(**S3D))
    monkeypatch.setattr(one, "clip_bytes", lambda _: clip_mb * 1_000_000)
    config = by_rule(one, spec, make_recipe(tmp_path, memory_gb=memory_gb))
    assert config == ComputeConfig(
        memory_format="channels_last", batch_size=wanted, chosen="default for cpu"
    )


def test_memory_is_worked_out_from_sizes_and_is_the_same_every_time() -> None:
    found = set()
    for way in (ComputeConfig(), ComputeConfig(memory_format="channels_last", batch_size=8)):
        one = network(S3D, way)
        found.add(one.clip_bytes(example(input_spec("rgb", BackboneChoice(**S3D)), 1)))
        assert one.config == way
    (size,) = found
    # The largest operation: the first norm or activation, 64 channels at half the size and rate.
    assert 2 * 64 * 4 * 16 * 16 * 4 <= size <= 10 * 64 * 4 * 16 * 16 * 4


def test_parts_that_begin_together_on_different_machines_agree(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Nothing is asked of the machine but what kind of device it has."""
    chosen = []
    for gigabytes, cpus in ((1, 2), (512, 64)):
        memory = SimpleNamespace(available=gigabytes << 30, total=gigabytes << 30)
        monkeypatch.setattr(psutil, "virtual_memory", lambda memory=memory: memory)
        monkeypatch.setattr(jobs, "cpu_count", lambda cpus=cpus: cpus)
        networks = Networks(make_recipe(tmp_path))
        configure(networks, {"student": tmp_path / "out/student"}, print)
        (one,) = networks.all.values()
        chosen.append(one.config)
    assert chosen[0] == chosen[1]
    assert chosen[0].batch_size > 1
    assert not (tmp_path / "out").exists()


def test_what_the_rule_chooses_for_gpus_is_said_to_be_unmeasured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    networks, notes = Networks(make_recipe(tmp_path)), list[str]()
    configure(networks, {}, notes.append)
    assert "not measured" not in " ".join(notes)
    way = ComputeConfig(chosen="default for cuda")
    monkeypatch.setattr("karmma_pipeline.extraction.inference.networks.by_rule", lambda *_: way)
    configure(networks, {}, notes.append)
    assert notes[-1].endswith("; the defaults for GPUs were not measured")


def test_what_the_recipe_states_is_not_left_to_the_rule(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(Network, "clip_bytes", None)
    recipe = make_recipe(tmp_path, layout="channels_last", precision="bfloat16", batch_size=3)
    networks = Networks(recipe)
    configure(networks, {}, print)
    (one,) = networks.all.values()
    assert one.config == ComputeConfig(
        precision="bfloat16", memory_format="channels_last", batch_size=3
    )
    assert not (tmp_path / "out").exists()


def test_the_earlier_name_of_a_key_is_read_with_advice(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = make_recipe(tmp_path, layout="contiguous")
    assert recipe.memory_format == "contiguous"
    assert [r.message for r in caplog.records] == [
        "layout was renamed to memory_format; rename the key in the recipe"
    ]
    with pytest.raises(ConfigError, match="layout: unknown key"):
        make_recipe(tmp_path, layout="contiguous", memory_format="contiguous")


def forward_facts(store: Path) -> dict[str, Any]:
    return FeatureStore.open(store).spec.modalities["rgb"].computed


@pytest.mark.slow
def test_a_store_keeps_to_the_choice_that_its_first_run_made(
    clips: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store that an earlier version began keeps to what was measured then."""
    first = ComputeConfig(batch_size=2, chosen="by calibration on a first machine")
    with monkeypatch.context() as patch:
        patch.setattr("karmma_pipeline.extraction.inference.networks.by_rule", lambda *_: first)
        extract(make_recipe(clips))
    assert forward_facts(clips / "out/student") == first.model_dump(by_alias=True)
    before = {p: p.read_bytes() for p in clips.glob("out/student/rgb/tokens/c/*/*")}
    assert len(before) == 2
    (clips / "out/student/commit/000001.safetensors").unlink()  # shard 1 is to be done again
    (clips / "out/student/manifest.json").unlink()
    extract(make_recipe(clips))  # the rule would have said channels_last
    assert {p: p.read_bytes() for p in before} == before
    assert forward_facts(clips / "out/student") == first.model_dump(by_alias=True)
    with pytest.raises(StoreError, match=r"computed\.precision was 'float32', now 'bfloat16'"):
        extract(make_recipe(clips, precision="bfloat16"))


def test_a_clip_lost_to_an_error_leaves_the_batches_of_the_others_alone(tmp_path: Path) -> None:
    """A decoder's bad day must not change the bytes of other clips; what was never there may."""
    recipe = make_recipe(tmp_path, precision="float32", layout="contiguous", batch_size=4)
    networks = Networks(recipe)
    configure(networks, {}, print)
    (job,) = networks.jobs("student").values()
    frames = example(job.spec, 6).numpy()
    decoded = [DecodedClip(str(i), {job.spec: array}) for i, array in enumerate(frames)]
    for place, reason in ((1, Reason.TIMEOUT), (2, Reason.NOT_IN_DATASET), (5, Reason.NO_STREAM)):
        decoded[place] = DecodedClip(str(place), reasons={job.spec: reason})
    seen: list[Any] = []
    whole = networks.all[job.network]
    whole.backbone.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[0]))
    plan = BatchPlan(0, [], ["student"], last=True)
    computed = networks.compute(collate(plan, decoded, pin=False))
    assert seen == [3, 1]
    assert [place for place in range(6) if computed.of(job, place) is not None] == [0, 3, 4]
    alone = whole.tokens(torch.from_numpy(frames[3:4]))[0].numpy()
    found = computed.of(job, 3)
    assert found is not None
    np.testing.assert_allclose(found, alone, rtol=1e-3, atol=1e-3)


def test_a_compiler_that_fails_is_named_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> Any:
        def call(x: torch.Tensor) -> torch.Tensor:
            raise torch._dynamo.exc.TorchDynamoException("no C++ compiler\nlong story")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    one = network(S3D, ComputeConfig(compile=True))
    with pytest.raises(
        ConfigError, match=r"compile=true: .* s3d \(no C\+\+ compiler\); set compile"
    ):
        one.tokens(example(input_spec("rgb", BackboneChoice(**S3D)), 1))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 1},
        {"kernel_size": 3, "padding": 1, "stride": 2},
        {"kernel_size": (1, 3, 3), "bias": False},
        {"kernel_size": (3, 1, 1), "padding": (1, 0, 0), "groups": 2},
        {"kernel_size": (3, 1, 1), "dilation": (2, 1, 1)},
        {"kernel_size": (3, 1, 1), "padding": (1, 1, 0)},
    ],
)
def test_convolutions_stay_what_they_are(
    layout: torch.memory_format, options: dict[str, Any]
) -> None:
    ours = nn.Conv3d(8, 12, **options).to(memory_format=layout)
    plain = copy.deepcopy(ours)
    x = torch.randn(1, 8, 9, 5, 7).contiguous(memory_format=layout)
    assert use_onednn(ours) == 1
    with torch.inference_mode():
        found, wanted = ours(x), plain(x)
        unbatched = ours(x[0])
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(ours(x), plain(x))
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(unbatched, wanted[0])
    assert found.is_contiguous(memory_format=layout)


def test_other_convolutions_are_left_alone() -> None:
    nets = nn.Sequential(
        nn.Conv3d(3, 3, (3, 1, 1), padding="same"),
        nn.Conv3d(3, 3, (3, 1, 1), padding=(1, 0, 0), padding_mode="replicate"),
        nn.Conv2d(3, 3, 3),
    )
    assert use_onednn(nets) == 0


NETS = ["s3d", "r2plus1d_18", "efficientnet_b0"]


@pytest.mark.parametrize("name", slow_unless({"s3d", "efficientnet_b0"}, NETS))
def test_norms_that_are_folded_in_change_no_token(name: str) -> None:
    tree = {"image": (64, 64)} if name == "efficientnet_b0" else {"frames": 8, "size": 32}
    choice = BackboneChoice(name=name, weights="random:0", **tree)
    plain, ours = Backbone(choice), Backbone(choice)
    norms = sum(isinstance(m, nn.BatchNorm2d | nn.BatchNorm3d) for m in plain.modules())
    kind = nn.BatchNorm2d if name == "efficientnet_b0" else nn.BatchNorm3d
    assert norms > 10
    folded = fold_norms(ours.net)
    assert folded == norms - sum(isinstance(m, kind) for m in ours.modules())
    x = torch.randn(2, *choice.input_shape)
    with torch.inference_mode():
        found, wanted = ours(x), plain(x)
    assert (found - wanted).abs().max() < 1e-3 * wanted.abs().max()


def test_norms_that_something_else_looks_at_stay() -> None:
    class Own(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self[1](self[0](x))
            return y

    def pair() -> list[nn.Module]:
        return [nn.Conv3d(3, 3, 1), nn.BatchNorm3d(3)]

    shared, watched = pair(), pair()
    watched[0].register_forward_hook(lambda *_: None)
    without = [nn.Conv3d(3, 3, 1), nn.BatchNorm3d(3, track_running_stats=False)]
    net = nn.ModuleList(
        [
            Own(*pair()),
            nn.Sequential(*shared, shared[0]),
            nn.Sequential(*watched),
            nn.Sequential(*without),
            nn.Sequential(nn.BatchNorm3d(3), nn.Conv3d(3, 3, 1)),
        ]
    ).eval()
    assert fold_norms(net) == 0
    assert fold_norms(nn.Sequential(*pair())) == 0  # it is still trained
    assert fold_norms(nn.Sequential(*pair()).eval()) == 1
