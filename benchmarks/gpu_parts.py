"""The parts of `gpu.py`: each a function that yields rows as soon as it has measured them.

All of them take the device's name from a `Bench` and nothing else from it that a CPU has not, so
that a rehearsal on a CPU runs the same lines with smaller sizes.
"""

import json
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import extract as extraction
import train as training
from karmma_pipeline import config, jobs
from karmma_pipeline.data.loading.loader import Batch
from karmma_pipeline.data.manifest import read_manifest
from karmma_pipeline.errors import StoppedError
from karmma_pipeline.evaluation.paper import BACKBONES, HEADS, SIZES
from karmma_pipeline.extraction.decode.pool import open_pool
from karmma_pipeline.extraction.inference.batching import plan_batches
from karmma_pipeline.extraction.inference.networks import Networks, configure, example
from karmma_pipeline.extraction.inference.runner import ComputeConfig, Network
from karmma_pipeline.extraction.pipeline import extract
from karmma_pipeline.extraction.recipe import ExtractRecipe
from karmma_pipeline.extraction.types import DecodeSettings, input_spec
from karmma_pipeline.jobs import StopFlag
from karmma_pipeline.models.backbones import ARCHITECTURES, Backbone, BackboneChoice
from karmma_pipeline.models.exported import open_model
from karmma_pipeline.models.fusion import FusionModel
from karmma_pipeline.runs import METRICS
from karmma_pipeline.store import FeatureStore
from karmma_pipeline.training.objective import (
    DistillationObjective,
    LabelObjective,
    Objective,
)
from karmma_pipeline.training.ranks import Ranks
from karmma_pipeline.training.recipe import BaselineRecipe
from karmma_pipeline.training.stages import train_baseline

EPIC_CLIPS, EPIC_EPOCHS = 67_217, 50
"""Training clips of EPIC-KITCHENS-100, and the epochs that a goal is stated for."""

SMALL = {"dim": 48, "layers": 1, "attention_heads": 3, "ffn_width": 48, "head_width": 96}
"""Size of fusion models in a rehearsal."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Bench:
    """Where and how large.

    Attributes:
        device: of all parts.
        rehearse: small sizes, to see that every line works.
        folder: that parts may write into.
    """

    device: torch.device
    rehearse: bool
    folder: Path

    def pick(self, real: Any, small: Any) -> Any:
        """Return a size: the real one, or that of a rehearsal."""
        return small if self.rehearse else real

    def wait(self) -> None:
        """Wait until the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @property
    def precisions(self) -> tuple[str, ...]:
        """The precisions that the device has, float32 first."""
        return ("float32", "tf32", "bfloat16") if self.device.type == "cuda" else ("float32",)


def row(what: str, value: float, unit: str, goal: str = "", **more: Any) -> Row:
    """Return a row of the table: what was measured, and what was hoped for."""
    return {"what": what, "value": float(value), "unit": unit, "goal": goal, **more}


def peak(bench: Bench) -> Row:
    """Return the most memory of the device that the part has taken; of a CPU, of the process."""
    if bench.device.type == "cuda":
        return row("peak memory of the device", torch.cuda.max_memory_allocated() / 2**30, "GiB")
    return row("peak memory of the process", psutil.Process().memory_info().rss / 2**30, "GiB")


def skipped(why: str) -> Row:
    """Return a row that says why the rest of a part was not measured."""
    return {"skipped": why}


# Correctness ------------------------------------------------------------------------------------


def tokens(bench: Bench) -> Iterator[Row]:
    """Compare each shipped backbone's tokens with those of plain float32 on the CPU."""
    names = [n for n, a in ARCHITECTURES.items() if a.weights is not None]
    for name in bench.pick(names, ["s3d", "resnet18"]):
        image = ARCHITECTURES[name].kind == "image"
        tree: dict[str, Any] = {"name": name, "weights": "random:0"}
        if image:
            tree["image"] = bench.pick([128, 256], [64, 64])
        elif not name.startswith("mvit"):  # those have one size
            tree |= bench.pick({"frames": 16, "size": 112}, {"frames": 8, "size": 64})
        choice = config.build(BackboneChoice, tree, "benchmark")
        clips = example(input_spec("audio" if image else "rgb", choice), 2)
        backbone = Backbone(choice)
        with torch.inference_mode():
            plain = backbone(backbone.prepare(clips)).float()
        for precision in bench.precisions:
            network = Network(Backbone(choice), bench.device, ComputeConfig(precision=precision))
            found = network.tokens(clips).float().cpu()
            error = (found - plain).abs().max().item() / plain.abs().max().item()
            cosine = extraction.cosine(found, plain)
            yield row(f"{name}, {precision}: least cosine of a token", cosine, "", error=error)


def losses(bench: Bench) -> Iterator[Row]:
    """Compare the losses of the first training steps with those of the CPU."""
    steps = bench.pick(50, 5)
    case = replace(training.SMALL_CASE, steps=steps)
    store = training.write_store(
        bench.folder / "store", training.token_specs(case), case.batch * steps
    )
    found = {
        device.type: list(_losses(case, store, bench.folder / device.type, device))
        for device in (torch.device("cpu"), torch.device(bench.device.type, bench.device.index))
    }
    mine, plain = np.array(found[bench.device.type]), np.array(found["cpu"])
    off = np.abs(mine - plain) / plain
    yield row(f"loss of the first {steps} steps: largest difference to the CPU", off.max(), "")


def _losses(
    case: training.Case, store: FeatureStore, folder: Path, device: torch.device
) -> Iterator[float]:
    torch.manual_seed(0)
    trainer = training.make_trainer(case, store, folder, device, Ranks())
    objective = LabelObjective(tuple(training.HEADS), 0.0)
    training.begin(trainer, objective)
    trainer.model.train()
    for batch in trainer.setup.train.epoch(0):
        yield trainer._step(objective, batch, objective.counts(batch))
        trainer.progress.batch += 1


class _StopAfter(StopFlag):
    """Asks for a stop when it was looked at so often."""

    def __init__(self, looks: int) -> None:
        super().__init__()
        self._looks = looks

    @property
    def requested(self) -> bool:
        self._looks -= 1
        return self._looks < 0 or self._signal is not None


def resume(bench: Bench) -> Iterator[Row]:
    """Stop trainings and go on, on the same device and on the other one."""
    case = replace(training.SMALL_CASE, steps=6)
    store = training.write_store(
        bench.folder / "store", training.token_specs(case), case.batch * case.steps
    )
    here = str(bench.device)
    ways = {
        "stopped and resumed": (here, here),
        "begun on the CPU, resumed on the device": ("cpu", here),
        "begun on the device, resumed on the CPU": (here, "cpu"),
    }
    whole = _weights(bench.folder / "whole", store, [here])
    for number, (what, devices) in enumerate(ways.items()):
        found = _weights(bench.folder / f"run{number}", store, devices)
        off = max((found[k] - whole[k]).abs().max().item() for k in whole)
        same = "the same weights as in one go" if devices == (here, here) else ""
        yield row(f"{what}: largest difference of a weight", off, "", "0" if same else "")


def _weights(out: Path, store: FeatureStore, devices: Any) -> dict[str, Tensor]:
    """Train for two epochs, each of the devices but the last for some steps."""
    for number, device in enumerate(devices):
        tree = {
            "store": str(store.path),
            "out": str(out),
            "size": training.SMALL,
            "epochs": 2,
            "device": device,
            "precision": "float32",
            "val_split": "train",
        }
        last = number == len(devices) - 1
        try:
            train_baseline(
                config.build(BaselineRecipe, tree, "benchmark"),
                StopFlag() if last else _StopAfter(8),
            )
        except StoppedError:
            continue
    return dict(open_model(out / "last").network.state_dict())


# Extraction -------------------------------------------------------------------------------------


class Busy:
    """How busy the device is meanwhile: a GPU as nvidia-smi says, else the CPUs; in percent."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._ended = device, threading.Event()
        self.seen: list[float] = []

    def _look(self) -> float:
        if self._device.type != "cuda":
            return psutil.cpu_percent()
        command = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return float(said.splitlines()[self._device.index or 0])

    def _watch(self) -> None:
        while not self._ended.wait(0.25):
            self.seen.append(self._look())

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Look at it a few times a second."""
        thread = threading.Thread(target=self._watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._ended.set()
            thread.join()

    @property
    def share(self) -> float:
        """The mean of the middle: the first batch comes late, and the last ones end one by one."""
        some = self.seen[len(self.seen) // 4 : -1] or self.seen
        return sum(some) / max(1, len(some))


def write_clips(bench: Bench, videos: int = 16, clips: int = 192) -> Path:
    """Write videos and a list of their clips, of which there may be more than videos hold."""
    videos, clips = bench.pick(videos, 1), bench.pick(clips, 6)
    seconds = bench.pick(extraction.FILE_S, 4.0)
    size = bench.pick((854, 480), (160, 96))
    of_video = int(seconds / extraction.CLIP_S)
    paths = [bench.folder / f"v{number}.mp4" for number in range(videos)]
    for number, path in enumerate(paths):
        extraction.write_video(path, number, seconds, size)
    rows = []
    for number in range(clips):
        at = number // videos % of_video * extraction.CLIP_S
        rows.append(f"{paths[number % videos]},{at},{at + extraction.CLIP_S}")
    return extraction.write_rows(bench.folder / "manifest.csv", sorted(rows))


def decode(bench: Bench) -> Iterator[Row]:
    """Decode alone, as fast as the CPUs can."""
    manifest = write_clips(bench)
    choice = config.build(BackboneChoice, _video(bench, "swin3d_t"), "benchmark")
    tree = {"one": {"rgb": choice.model_dump(mode="json")}}
    recipe = make_recipe(bench, manifest, tree, "cpu")
    clips = read_manifest(manifest).clips
    count, plans = jobs.cpu_count(), plan_batches(0, clips, ["one"], 8, range(len(clips)))
    settings = DecodeSettings.of(recipe)
    with open_pool(settings, recipe.decode, count, 8, StopFlag()) as pool:
        started, done, begun = time.perf_counter(), 0, 0.0
        for _, decoded in pool.batches(plans):
            begun = begun or time.perf_counter()  # processes have started
            done += len(decoded)
        seconds = time.perf_counter() - (begun if done > 8 else started)
    rate = max(done - 8, 1) / max(seconds, 1e-9)
    yield row(f"decoding alone, {count} processes: 32 of 60 frames", rate, "clips/s")


def make_recipe(
    bench: Bench, manifest: Path, sets: extraction.Sets, device: str, **more: Any
) -> ExtractRecipe:
    """Return a recipe that needs no optional package, nor many processes in a rehearsal."""
    more |= {
        "flow": {"source": "dis"},
        "audio": {"front_end": "vggish"},  # librosa's own would need numba and SciPy
        "decode": bench.pick({}, {"workers": 1}),
    }
    return extraction.make_recipe(manifest, bench.folder / "out", sets, device, **more)


def student_sets(bench: Bench) -> dict[str, Any]:
    """Return the choices of the paper's student."""
    if not bench.rehearse:
        return {m: choice.model_dump(mode="json") for m, choice in BACKBONES["student"].items()}
    small = {"name": "s3d", "weights": "random:0", "frames": 8, "size": 32}
    sound = {"name": "resnet18", "weights": "random:0", "image": [64, 96]}
    return {"rgb": small, "flow": small, "audio": sound}


def _video(bench: Bench, name: str) -> dict[str, Any]:
    small = {"frames": 8, "size": 64}
    real = {"frames": 32, "tokens": [12, 5, 5]}
    return {"name": name, "weights": "random:0", **bench.pick(real, small)}


def extract_features(bench: Bench) -> Iterator[Row]:
    """Run the whole extraction, and the forward passes alone."""
    manifest = write_clips(bench)
    for name in ("swin3d_t", "swin3d_b") if not bench.rehearse else ("s3d",):
        for precision in bench.precisions:
            yield from _extraction(bench, manifest, name, precision)
    yield peak(bench)


def _extraction(bench: Bench, manifest: Path, name: str, precision: str) -> Iterator[Row]:
    tree = {f"{name}-{precision}": {"rgb": _video(bench, name)}}
    recipe = make_recipe(bench, manifest, tree, str(bench.device), precision=precision)
    busy = Busy(bench.device)
    with busy.watched():
        report = extract(recipe)
    networks = Networks(recipe)
    configure(networks, {}, lambda _: None)
    few = read_manifest(manifest).clips[: 4 * networks.batch_size]
    batches = list(extraction.preload(networks, recipe, few))
    bare_s, _ = extraction.time_bare(networks, batches, report.forward_workers)
    over = report.total_s / report.clips / (bare_s / len(few))
    what = f"extraction, {name} of {_video(bench, name)['frames']} frames, {precision}"
    yield row(what, report.rate, "clips/s", bound=report.bound, batch=networks.batch_size)
    yield row(f"{what}: time over the bare forward pass", over, "", "at most 1.15")
    yield row(f"{what}: device busy", busy.share, "%", "at least 90")


# Training ---------------------------------------------------------------------------------------


@dataclass
class OnDevice:
    """Batches of noise that are made on the device, one after another: no store holds so many."""

    store: FeatureStore
    device: torch.device
    batch: int
    steps: int
    _generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self._generator = torch.Generator(self.device)
        self._rng = np.random.default_rng(0)

    def __len__(self) -> int:
        return self.steps

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[Batch]:
        """Yield the batches; epoch and start do not matter to noise."""
        for _ in range(self.steps - start_batch):
            mask = self._rng.random((self.batch, len(self.store.modalities))) > 0.3
            mask[:, 0] |= ~mask.any(axis=1)
            labels = {
                h: torch.from_numpy(self._rng.integers(len(of), size=self.batch))
                for h, of in self.store.heads.items()
            }
            index = torch.from_numpy(self._rng.integers(len(self.store), size=self.batch))
            noise = {m: self._noise(m) for m in self.store.modalities}
            present = torch.ones_like(torch.from_numpy(mask))
            yield Batch(noise, present, torch.from_numpy(mask), labels, index)

    def _noise(self, modality: str) -> Tensor:
        shape = (self.batch, *self.store.shape(modality))
        return torch.randn(
            shape, generator=self._generator, device=self.device, dtype=torch.float16
        )

    def prefetch(self, epoch: int) -> None:
        """Begin the next epoch: nothing to do."""

    def close(self) -> None:
        """End: nothing to do."""


def _case(bench: Bench, kind: str, tokens_of: int, width: int) -> training.Case:
    size = SIZES[kind].model_dump() | {"absent": "learned"}
    return training.Case(
        f"paper {kind}, 3 x {tokens_of} x {width}",
        bench.pick(size, SMALL),
        bench.pick(tokens_of, 4),
        bench.pick(width, 32),
        bench.pick(64, 8),
        bench.pick(200, 4),
        bench.pick(SIZES["teacher"].model_dump(), SMALL),
    )


def train(bench: Bench) -> Iterator[Row]:
    """Train the paper's models at the scale of EPIC-KITCHENS-100, beside a bare loop."""
    for kind, width in (("teacher", 1024), ("student", 768)):
        case = _case(bench, kind, 300, width)
        store = training.write_store(
            bench.folder / f"{kind}-store", training.token_specs(case), 2 * case.batch
        )
        trainer = training.make_trainer(case, store, bench.folder / kind, bench.device, Ranks())
        noise = OnDevice(store, bench.device, case.batch, case.steps)
        trainer.setup = replace(trainer.setup, train=noise)
        trainer.bfloat16 = bench.device.type == "cuda"
        timer = training.EpochTimer()
        objective = LabelObjective(tuple(training.HEADS), 0.0)
        turns = {
            "ours": training.ours(trainer, objective, timer),
            "bare": _bare(bench, training.make_card(case.size, store).build(), noise),
            "noise": partial(_empty, bench, noise),
        }
        best = training.compare(turns, 1)
        made, ours, by_hand = (best[name].wall for name in ("noise", "ours", "bare"))
        step = (ours - made) / case.steps
        epoch_s = step * EPIC_CLIPS / case.batch
        yield row(f"{case.name}: a step of {case.batch} clips", 1e3 * step, "ms")
        yield row(f"{case.name}: time over a bare loop", ours / by_hand, "", "at most 1.05")
        yield row(f"{case.name}: an epoch of {EPIC_CLIPS:,} clips", epoch_s, "s")
        goal = "at most 15" if kind == "teacher" else ""
        whole = epoch_s * EPIC_EPOCHS / 60
        yield row(f"{case.name}: {EPIC_EPOCHS} epochs, extrapolated", whole, "min", goal)
        speed = 3 * _flops(case, store) * case.batch / step / 1e12
        yield row(f"{case.name}: computed", speed, "TFLOP/s")
    yield peak(bench)


def _empty(bench: Bench, noise: OnDevice) -> None:
    for _ in noise.epoch(0):
        pass
    bench.wait()


def _flops(case: training.Case, store: FeatureStore) -> float:
    """Return the FLOPs of one clip's forward pass, 2 per multiply-add."""
    card = training.make_card(case.size, store)
    heads = {head: len(of) for head, of in store.heads.items()}
    with torch.device("meta"):
        model = FusionModel(card.size, card.modalities, heads)
        some = {m: torch.empty(1, *shape) for m, shape in card.modalities.items()}
        with FlopCounterMode(display=False) as counter:
            model(some, torch.ones(1, len(some), dtype=torch.bool, device="cpu"))
    return float(counter.get_total_flops())


def _bare(bench: Bench, model: FusionModel, noise: OnDevice) -> Callable[[], None]:
    """Return an epoch as one would write it by hand."""
    model = model.to(bench.device).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4)
    half = bench.device.type == "cuda"

    def turn() -> None:
        for batch in noise.epoch(0):
            with torch.autocast(bench.device.type, torch.bfloat16, enabled=half):
                logits = model(batch.tokens, batch.mask)
            terms = [
                torch.nn.functional.cross_entropy(of.float(), batch.labels[h].to(bench.device))
                for h, of in logits.items()
            ]
            optimiser.zero_grad()
            torch.stack(terms).mean().backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimiser.step()
        bench.wait()

    return turn


class _Table:
    """Stands in for cached teacher logits: of every clip and mask some, on the device."""

    def __init__(self, device: torch.device) -> None:
        self._of = {h: torch.randn(1, n, device=device) for h, n in HEADS.items()}

    def valid(self, clip_index: Tensor, mask: Tensor) -> Tensor:
        """Return which clips it knows: all."""
        return mask.any(dim=1)

    def logits(self, clip_index: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Return logits, head to [B, C]."""
        return {h: of.expand(len(mask), -1) for h, of in self._of.items()}


def distill(bench: Bench) -> Iterator[Row]:
    """Compare a step of distillation with one of the labels alone."""
    case = _case(bench, "student", 300, 768)
    store = training.write_store(bench.folder / "store", training.token_specs(case), 2 * case.batch)
    trainer = training.make_trainer(case, store, bench.folder / "run", bench.device, Ranks())
    noise = OnDevice(store, bench.device, case.batch, case.steps // 4)
    trainer.setup = replace(trainer.setup, train=noise)
    trainer.bfloat16 = bench.device.type == "cuda"
    labels = LabelObjective(tuple(training.HEADS), 0.0)
    table: Any = _Table(bench.device)
    turns: dict[str, Objective] = {
        "labels": labels,
        "both": DistillationObjective(labels, [table], 0.5, 2.0),
    }
    best = training.compare(
        {n: training.ours(trainer, of, training.EpochTimer()) for n, of in turns.items()}, 2
    )
    over = best["both"].wall / best["labels"].wall
    yield row(f"{case.name}: distillation over the labels alone", over, "", "about 1")


#: Before the last stage of each network.
_LAST_STAGE = {"swin3d_t": "stage4", "efficientnet_b0": "stage7"}
_LAST_STAGE |= {"s3d": "stage5", "resnet18": "layer4"}  # of a rehearsal


def suffixes(bench: Bench) -> Iterator[Row]:
    """Train the student with its networks: all of them, and their last stages, as users do."""
    manifest = write_clips(bench, videos=12, clips=96)
    chosen = student_sets(bench)
    sets = {
        "end_to_end": {m: {**of, "cut": "input"} for m, of in chosen.items()},
        "last_stage": {m: {**of, "cut": _LAST_STAGE[of["name"]]} for m, of in chosen.items()},
    }
    recipe = make_recipe(bench, manifest, sets, str(bench.device))
    extract(recipe)
    for name in sets:
        for save_memory in bench.pick((False, True), (False,)):
            yield from _with_suffixes(bench, recipe.out / name, save_memory)


def _with_suffixes(bench: Bench, store: Path, save_memory: bool) -> Iterator[Row]:
    tree = {
        "store": str(store),
        "out": str(bench.folder / f"{store.name}-{save_memory}"),
        "size": bench.pick(SIZES["student"].model_dump(), SMALL),
        "batch_size": bench.pick(16, 3),
        "epochs": bench.pick(4, 2),
        "device": str(bench.device),
        "val_split": "train",
        "suffix": {"save_memory": save_memory},
    }
    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(bench.device)
    report = train_baseline(config.build(BaselineRecipe, tree, "benchmark"))
    lines = (report.run / METRICS).read_text(encoding="utf-8").splitlines()
    fastest = max((json.loads(line) for line in lines[1:]), key=lambda of: of["clips_per_s"])
    what = f"{store.name}{', save_memory' if save_memory else ''}, batches of {tree['batch_size']}"
    step_ms = 1e3 * tree["batch_size"] / fastest["clips_per_s"]
    yield row(f"{what}: a step", step_ms, "ms", clips_per_s=fastest["clips_per_s"])
    yield row(f"{what}: waiting for data", 100 * fastest["waiting_for_data"], "%")
    yield {**peak(bench), "of": what}


def compiled(bench: Bench) -> Iterator[Row]:
    """Compare networks that `torch.compile` has compiled with those as they are."""
    choices, modality = student_sets(bench), bench.pick("rgb", "audio")  # small ones compile soon
    choice = config.build(BackboneChoice, choices[modality], "benchmark")
    clips = example(input_spec(modality, choice), bench.pick(8, 1))
    precision = bench.precisions[-1]
    seconds = {}
    for compile_ in (False, True):
        way = ComputeConfig(precision=precision, compile=compile_, batch_size=len(clips))
        network = Network(Backbone(choice), bench.device, way)
        network.use(way)
        network.tokens(clips)
        bench.wait()
        seconds[compile_] = min(timed(bench, lambda n=network: n.tokens(clips)) for _ in range(5))
    gain = seconds[True] / seconds[False]
    yield row(f"{choice.name}, {precision}: time compiled over as it is", gain, "")


def timed(bench: Bench, work: Callable[[], object]) -> float:
    """Return the seconds that the device, too, needs for something."""
    started = time.perf_counter()
    work()
    bench.wait()
    return time.perf_counter() - started
