"""How networks compute: what a calibration may choose, and that a store keeps to it."""

import copy
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.media_files import write_video
from torch import nn

from karmma_pipeline import config, files, jobs
from karmma_pipeline.errors import ConfigError, KarmmaError, StoreError
from karmma_pipeline.extraction.inference import calibrate as calibration
from karmma_pipeline.extraction.inference import memory, modes
from karmma_pipeline.extraction.inference.batching import collate
from karmma_pipeline.extraction.inference.calibrate import calibrate, example, measure
from karmma_pipeline.extraction.inference.memory import Growth
from karmma_pipeline.extraction.inference.modes import decide
from karmma_pipeline.extraction.inference.networks import Networks, network_key
from karmma_pipeline.extraction.inference.runner import Mode, Network, fold_norms, speed_up
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


def network(choice: dict[str, Any], mode: Mode | None = None) -> Network:
    return Network(Backbone(BackboneChoice(**choice)), CPU, mode or Mode())


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    """Four clips of two files, and their manifest."""
    rows = ["clip_id,video,start,stop,verb,split"]
    for number in range(2):
        write_video(tmp_path / f"v{number}.mp4", sound=False)
        rows += [f"c{number}{i},v{number}.mp4,{i},{i + 1},x,train" for i in range(2)]
    (tmp_path / "m.csv").write_text("\n".join(rows) + "\n")
    return tmp_path


@pytest.mark.parametrize("choice", [S3D, RESNET], ids=["video", "image"])
def test_every_mode_gives_the_tokens_of_plain_float32(choice: dict[str, Any]) -> None:
    modality = "rgb" if choice is S3D else "audio"
    batch = example(input_spec(modality, BackboneChoice(**choice)), 3)
    one = network(choice)
    plain = measure(one, Mode(), batch, None)
    with torch.inference_mode():
        backbone = Backbone(BackboneChoice(**choice))
        wanted = backbone(backbone.prepare(batch))
    torch.testing.assert_close(plain.tokens, wanted, rtol=1e-3, atol=1e-3)
    last = measure(one, Mode(layout="channels_last"), batch, plain.tokens)
    assert last.cosine > 0.9999
    torch.testing.assert_close(last.tokens, wanted, rtol=1e-3, atol=1e-3)
    half = measure(one, Mode(precision="bfloat16"), batch, plain.tokens)
    assert 0.5 < half.cosine < 1
    assert half.error > 0
    again = measure(one, Mode(), batch, plain.tokens)
    assert torch.equal(again.tokens, plain.tokens)


def test_a_large_batch_is_cut_to_the_size_of_the_mode() -> None:
    batch = example(input_spec("rgb", BackboneChoice(**S3D)), 5)
    seen: list[int] = []
    one = network(S3D, Mode(batch_size=2))
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
    one = network(S3D, Mode(batch_size=8))
    wanted = one.tokens(batch)
    one.backbone.register_forward_pre_hook(Small(2, error))
    torch.testing.assert_close(one.tokens(batch), wanted, rtol=1e-3, atol=1e-3)
    assert one.halved == 3  # 7 into 4 and 3, and each of them again
    torch.testing.assert_close(one.tokens(batch), wanted, rtol=1e-3, atol=1e-3)
    assert one.halved == 3  # from then on batches are as small as they must be


def test_a_clip_that_does_not_fit_alone_ends_the_run_in_one_sentence() -> None:
    one = network(S3D)
    one.backbone.register_forward_pre_hook(Small(0, MemoryError()))
    with pytest.raises(
        KarmmaError, match="s3d: one clip alone does not fit into the memory of cpu"
    ):
        one.tokens(example(input_spec("rgb", BackboneChoice(**S3D)), 2))


def test_other_errors_of_a_network_are_not_taken_for_full_memory() -> None:
    one = network(S3D)
    with pytest.raises(RuntimeError, match="conv3d"):
        one.tokens(torch.zeros(1, 8, 4, 32, 32))


def stopwatch(costs: dict[tuple[str, str], float]) -> Any:
    """Return a clock for `calibrate`: seconds of a pass by (precision, layout)."""

    def timed(one: Network, batch: torch.Tensor) -> tuple[torch.Tensor, float]:
        seconds = costs[one.mode.precision, one.mode.layout]
        return one.tokens(batch), seconds * (0.8 * len(batch) + 0.2)

    return timed


PLAIN, LAST = ("float32", "contiguous"), ("float32", "channels_last")


@pytest.mark.parametrize(
    ("costs", "wanted"),
    [
        ({PLAIN: 0.1, LAST: 0.05}, LAST),
        ({PLAIN: 0.1, LAST: 0.2}, PLAIN),
        ({PLAIN: 0.1, LAST: 0.099}, PLAIN),  # within what clocks err
    ],
)
def test_the_faster_layout_is_kept(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    costs: dict[tuple[str, str], float],
    wanted: tuple[str, str],
) -> None:
    monkeypatch.setattr(calibration, "_timed", stopwatch(costs))
    spec = input_spec("rgb", BackboneChoice(**S3D))
    mode = calibrate(network(S3D), spec, make_recipe(tmp_path, precision="float32"))
    assert (mode.precision, mode.layout) == wanted
    assert mode.batch_size == 4  # a clip in a batch of 1, 2, 4, 8 costs 1, .9, .85, .825
    assert mode.chosen.startswith("by calibration on ")


@pytest.mark.parametrize(("bound", "wanted"), [(0.5, "bfloat16"), (0.999999, "float32")])
def test_a_faster_precision_is_kept_only_if_it_is_accurate(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, bound: float, wanted: str
) -> None:
    costs = {PLAIN: 0.1, ("bfloat16", "contiguous"): 0.01}
    monkeypatch.setattr(calibration, "_timed", stopwatch(costs))
    monkeypatch.setattr(calibration, "precisions", lambda _: ("bfloat16",))
    monkeypatch.setattr(calibration, "COSINE", bound)
    recipe = make_recipe(tmp_path, layout="contiguous", batch_size=2)
    spec = input_spec("rgb", BackboneChoice(**S3D))
    assert calibrate(network(S3D), spec, recipe).precision == wanted


def test_what_the_recipe_fixes_is_not_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(modes, "calibrate", None)
    recipe = make_recipe(tmp_path, layout="channels_last", precision="bfloat16", batch_size=3)
    networks = Networks(recipe)
    decide(networks, {}, print)
    (one,) = networks.all.values()
    assert one.mode == Mode(precision="bfloat16", layout="channels_last", batch_size=3)
    assert not (tmp_path / "out").exists()


def test_a_batch_that_would_not_fit_twice_is_the_last_that_is_tried(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sizes = iter([0.5e9, 1e9, 2e9, 4e9])

    @contextmanager
    def told(_: object) -> Iterator[Growth]:
        yield Growth(int(next(sizes)))

    monkeypatch.setattr(memory, "measured", told)
    monkeypatch.setattr(jobs, "cpu_count", lambda: 1)
    monkeypatch.setattr(calibration, "_timed", lambda one, x: (one.tokens(x), 0.1))
    recipe = make_recipe(tmp_path, layout="contiguous", precision="float32", memory_gb=3)
    spec = input_spec("rgb", BackboneChoice(**S3D))
    assert calibrate(network(S3D), spec, recipe).batch_size == 4


def forward_facts(store: Path) -> dict[str, Any]:
    return FeatureStore.open(store).spec.modalities["rgb"].computed


def test_a_store_keeps_to_the_choice_that_its_first_run_made(
    clips: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resumed run takes over what is recorded, though it would measure something else."""
    first = Mode(layout="channels_last", batch_size=2, chosen="by calibration on a first machine")
    monkeypatch.setattr(modes, "calibrate", lambda *_: first)
    extract(make_recipe(clips))
    assert forward_facts(clips / "out/student") == first.model_dump()
    before = {p: p.read_bytes() for p in clips.glob("out/student/rgb/tokens/c/*/*")}
    assert len(before) == 2
    (clips / "out/student/commit/000001.safetensors").unlink()  # shard 1 is to be done again
    (clips / "out/student/manifest.json").unlink()
    monkeypatch.setattr(modes, "calibrate", None)
    shutil.rmtree(clips / "out/forward")
    extract(make_recipe(clips))
    assert {p: p.read_bytes() for p in before} == before
    assert forward_facts(clips / "out/student") == first.model_dump()
    with pytest.raises(StoreError, match=r"computed\.precision is 'float32' there and 'bfloat16'"):
        extract(make_recipe(clips, precision="bfloat16"))


HERE = f"by calibration on {calibration.device_name(CPU)}"


def decided(folder: Path) -> Mode:
    networks = Networks(make_recipe(folder))
    decide(networks, {"student": folder / "out/student"}, print)
    (network,) = networks.all.values()
    (file,) = (folder / "out/forward").iterdir()
    assert json.loads(file.read_text()) == network.mode.model_dump()
    return network.mode


def write_choice(folder: Path, mode: Mode) -> None:
    name = f"{network_key(BackboneChoice(**S3D))[:16]}.json"
    files.write_json(folder / "out/forward" / name, mode.model_dump())


def test_jobs_that_begin_together_agree_on_one_choice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = Mode(batch_size=2, chosen=HERE)

    def slower(*_: object) -> Mode:
        """While this job measures, another one is done."""
        write_choice(tmp_path, theirs)
        return Mode(batch_size=4, chosen=HERE)

    monkeypatch.setattr(modes, "calibrate", slower)
    assert decided(tmp_path) == theirs


def test_a_later_job_takes_over_what_the_first_has_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = Mode(batch_size=64, chosen="by calibration on a GPU")
    write_choice(tmp_path, theirs)
    monkeypatch.setattr(modes, "calibrate", None)
    assert decided(tmp_path) == theirs


def test_a_clip_lost_to_an_error_leaves_the_batches_of_the_others_alone(tmp_path: Path) -> None:
    """A decoder's bad day must not change the bytes of other clips; what was never there may."""
    recipe = make_recipe(tmp_path, precision="float32", layout="contiguous", batch_size=4)
    networks = Networks(recipe)
    decide(networks, {}, print)
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
    one = network(S3D, Mode(compile=True))
    with pytest.raises(
        ConfigError, match=r"compile=true: .* s3d here \(no C\+\+ compiler\); leave"
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
    assert speed_up(ours) == 1
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
    assert speed_up(nets) == 0


@pytest.mark.parametrize("name", ["s3d", "r2plus1d_18", "efficientnet_b0"])
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
