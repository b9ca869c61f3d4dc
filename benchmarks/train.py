"""How much the trainer adds to a bare loop: one command that prints a Markdown table of ratios.

    python benchmarks/train.py [--quick | --cut] [--device cuda] [--threads N]

Every line compares ways of training the same model on the same batches, taken in turns in one
process, so that a busy machine slows all; ratios are of the best turn of each. On a CPU the
ratio of CPU seconds stands beside it, which other people's jobs hardly touch. The bare loop is
what one would write by hand: batches already in memory, forward, cross-entropy, backward,
`clip_grad_norm_`, `AdamW.step`. No validation and no saving on either side.
"""

import argparse
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from karmma_pipeline import config
from karmma_pipeline.data.loading.loader import Batch, FeatureLoader
from karmma_pipeline.extraction.types import stored_as
from karmma_pipeline.jobs import StopFlag
from karmma_pipeline.models.backbones import Backbone, BackboneChoice
from karmma_pipeline.models.fusion import FusionModel, FusionSize, TokenModel
from karmma_pipeline.models.saved import ModelCard, save_model
from karmma_pipeline.runs import RunFolder
from karmma_pipeline.store import (
    ClipRow,
    FeatureStore,
    ModalitySpec,
    ShardWriter,
    StoreSpec,
    create_store,
    finalize,
)
from karmma_pipeline.training.loop import Trainer, TrainingSetup
from karmma_pipeline.training.objective import DistillationObjective, LabelObjective, Objective
from karmma_pipeline.training.optimization import Gradient
from karmma_pipeline.training.progress import EpochTimer, progress_bar
from karmma_pipeline.training.ranks import Ranks, joined
from karmma_pipeline.training.recipe import TrainRecipe
from karmma_pipeline.training.suffixes import adapt
from karmma_pipeline.training.teacher_logits import TeacherLogitsCache

MODALITIES = ("rgb", "flow", "audio")
HEADS = {"verb": 97, "noun": 300}
TEACHER = {"dim": 768, "layers": 2, "attention_heads": 12, "ffn_width": 768, "head_width": 1536}
STUDENT = {"dim": 384, "layers": 1, "attention_heads": 6, "ffn_width": 384, "head_width": 768}
SMALL = {"dim": 96, "layers": 1, "attention_heads": 6, "ffn_width": 96, "head_width": 192}


@dataclass(frozen=True)
class Case:
    """A model on features of one shape. ``steps``: of a turn."""

    name: str
    size: dict[str, int]
    tokens: int
    width: int
    batch: int
    steps: int
    teacher: dict[str, int]


SMALL_CASE = Case("small student, 8 x 512", SMALL, 8, 512, 64, 40, {**SMALL, "dim": 192})
PAPER = (
    Case("paper student, 8 x 1024", STUDENT, 8, 1024, 64, 12, TEACHER),
    Case("paper student, 300 x 768", STUDENT, 300, 768, 4, 2, TEACHER),
    Case("paper teacher, 300 x 1024", TEACHER, 300, 1024, 4, 2, TEACHER),
)


#: Networks that are cut, at sizes that a CPU trains; see `cut_specs`.
NETWORKS: dict[str, dict[str, Any]] = {
    "rgb": {"name": "r2plus1d_18", "frames": 4, "size": 48},
    "flow": {"name": "r2plus1d_18", "frames": 4, "size": 48},
    "audio": {"name": "resnet18", "image": [64, 128]},
}
LAST_STAGE, WHOLE = "layer4", "input"
CUT_BATCH, CUT_STEPS = 8, 6


def token_specs(case: Case) -> dict[str, ModalitySpec]:
    """Return tokens in fp16."""
    return {
        m: ModalitySpec(tokens=case.tokens, width=case.width, provenance={"backbone": "noise"})
        for m in MODALITIES
    }


def cut_specs(cut: str) -> dict[str, ModalitySpec]:
    """Return what a store holds of `NETWORKS` at a cut."""
    specs = {}
    for m, tree in NETWORKS.items():
        choice = BackboneChoice.model_validate({**tree, "weights": "random:0", "cut": cut})
        facts = Backbone(choice).provenance()
        specs[m] = ModalitySpec(**stored_as(m, choice, "float16"), provenance=facts)
    return specs


def write_store(root: Path, specs: Mapping[str, ModalitySpec], clips: int) -> FeatureStore:
    """Write a store of noise; a fifth of the modalities is absent."""
    spec = StoreSpec(
        modalities=dict(specs),
        heads={h: tuple(f"{h}{i}" for i in range(n)) for h, n in HEADS.items()},
        clips_per_shard=256,
    )
    rng = np.random.default_rng(0)
    labels = [{h: int(rng.integers(n)) for h, n in HEADS.items()} for _ in range(clips)]
    create_store(root, spec, [ClipRow(f"c{i}", of, "train", "") for i, of in enumerate(labels)])
    for shard in range(-(-clips // 256)):
        with ShardWriter(root, shard) as writer:
            for clip_id in writer.clip_ids:
                here = [m for m in MODALITIES if m == "rgb" or rng.random() > 0.3]
                tokens = {m: _noise(rng, specs[m]) for m in here}
                absent = {m: _reason() for m in MODALITIES if m not in here}
                writer.append(clip_id, tokens, absent, {})
            writer.commit()
    finalize(root)
    return FeatureStore.open(root)


def _noise(rng: np.random.Generator, spec: ModalitySpec) -> npt.NDArray[Any]:
    shape = (spec.tokens, spec.width)
    if spec.dtype == "uint8":
        return rng.integers(0, 256, shape, np.uint8)
    return rng.standard_normal(shape, np.float32)


def _reason() -> Any:
    from karmma_pipeline.modalities import Reason

    return Reason.NO_STREAM


def make_trainer(
    case: Case, store: FeatureStore, folder: Path, device: torch.device, ranks: Ranks
) -> Trainer:
    """Set up the trainer as the stages do; what lies behind a cut has fresh weights."""
    recipe = config.build(
        TrainRecipe,
        {
            "store": str(store.path),
            "out": str(folder / "run"),
            "size": case.size,
            "batch_size": case.batch,
            "epochs": 1000,
        },
        "benchmark",
    )
    train = FeatureLoader(
        store,
        np.arange(len(store)),
        case.batch,
        p=0.3,
        shuffle=True,
        pin=device.type == "cuda",
        rank=ranks.rank,
        world_size=ranks.size,
    )
    card = make_card(case.size, store)
    run = RunFolder(folder / "run", recipe, writes=ranks.main)
    model = card.build()
    adapt(recipe, model, ranks)
    return Trainer(TrainingSetup(recipe, run, store, model, card, train, train, device, ranks, {}))


def make_card(size: dict[str, int], store: FeatureStore) -> ModelCard:
    """Describe a model for a store."""
    return ModelCard(
        kind="teacher",
        name="benchmark",
        size=FusionSize.model_validate(size),
        modalities={m: store.shape(m) for m in store.modalities},
        heads=store.heads,
        provenance=store.provenance,
        store_digest=store.digest,
    )


Turn = Callable[[], None]
"""Trains an epoch."""


def ours(trainer: Trainer, objective: Objective, timer: EpochTimer) -> Turn:
    """Take an epoch of our loop, its loader included."""
    device = trainer.setup.device

    def turn() -> None:
        begin(trainer, objective)
        trainer.progress.epoch, trainer.progress.batch = trainer.progress.epoch + 1, 0
        with progress_bar(1, 0, "", shown=False) as bar:
            trainer._train_epoch(objective, StopFlag(), timer, bar)
        _wait(device)

    return turn


def begin(trainer: Trainer, objective: Objective) -> None:
    """Set up what `Trainer.fit` does before its first epoch: turns have different losses."""
    trainer.gradient = Gradient(trainer.model, len(objective.terms))


def bare(model: TokenModel, batches: list[Batch], device: torch.device) -> Turn:
    """Take the same number of steps by hand, on tensors that are already there."""
    model = model.to(device).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=1e-4)
    ready = [
        (
            {m: t.to(device) for m, t in b.tokens.items()},
            b.mask,
            {h: t.to(device) for h, t in b.labels.items()},
        )
        for b in batches
    ]

    def turn() -> None:
        for tokens, mask, labels in ready:
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                logits = model(tokens, mask)
            terms = [F.cross_entropy(logits[h].float(), labels[h]) for h in logits]
            optimiser.zero_grad()
            torch.stack(terms).mean().backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(trained, 5.0)
            optimiser.step()
        _wait(device)

    return turn


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class LiveTeacher:
    """Stands in for the cached logits: loads the teacher's tokens and asks it, in every step."""

    def __init__(self, model: FusionModel, store: FeatureStore, device: torch.device) -> None:
        self.model, self.store, self.device = model.to(device).eval(), store, device

    def valid(self, clip_index: Tensor, mask: Tensor) -> Tensor:
        """Return which clips it sees anything of."""
        return mask.any(dim=1)

    @torch.inference_mode()
    def logits(self, clip_index: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Return its logits."""
        tokens = {m: self.store.gather(m, clip_index) for m in self.store.modalities}
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            return dict(self.model({m: t.to(self.device) for m, t in tokens.items()}, mask))


@dataclass
class Best:
    """Seconds of the best turn, by the wall's timer and by the processor's."""

    wall: float = math.inf
    cpu: float = math.inf


def compare(turns: dict[str, Turn], rounds: int) -> dict[str, Best]:
    """Take turns; the first of each warms up and does not count."""
    best = {name: Best() for name in turns}
    for number in range(rounds + 1):
        for name, turn in turns.items():
            wall, cpu = time.perf_counter(), time.process_time()
            turn()
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            if number:
                found = best[name]
                best[name] = Best(min(found.wall, wall), min(found.cpu, cpu))
    return best


def ratio(over: Best, under: Best) -> str:
    """Compare best turns: by the wall's timer, and in brackets by the processor's."""
    return f"{over.wall / under.wall:.2f} ({over.cpu / under.cpu:.2f})"


def overhead(case: Case, folder: Path, device: torch.device, rounds: int) -> list[str]:
    """Compare our loop, with and without teachers, with the bare one."""
    store = write_store(folder / "store", token_specs(case), case.batch * case.steps)
    clips = np.arange(len(store))
    labels = LabelObjective(tuple(HEADS), 0.0)
    teacher = make_card(case.teacher, store)
    save_model(folder / "teacher", teacher.build(), teacher)
    cache = TeacherLogitsCache(folder / "teacher", store.path, store, clips)
    table = cache.load(folder / "table", device, Ranks(), StopFlag())
    live = LiveTeacher(teacher.build(), store, device)
    trainer = make_trainer(case, store, folder, device, Ranks())
    batches = list(trainer.setup.train.epoch(0))
    timers = {name: EpochTimer() for name in ("labels", "table", "live")}
    turns = {
        "labels": ours(trainer, labels, timers["labels"]),
        "bare": bare(make_card(case.size, store).build(), batches, device),
        "table": ours(trainer, DistillationObjective(labels, [table], 0.5, 2.0), timers["table"]),
        "live": ours(trainer, DistillationObjective(labels, [live], 0.5, 2.0), timers["live"]),
    }
    best = compare(turns, rounds)
    timer = timers["labels"]
    waited = timer.waited / (rounds + 1) / best["labels"].wall
    return [
        case.name,
        f"{case.batch}",
        f"{1e3 * best['labels'].wall / case.steps:.1f}",
        ratio(best["labels"], best["bare"]),
        f"{waited:.1%}",
        ratio(best["table"], best["labels"]),
        ratio(best["live"], best["labels"]),
    ]


def cut_overhead(cut: str, folder: Path, device: torch.device, rounds: int) -> list[str]:
    """Compare our loop with the bare one where a part of the networks trains."""
    store = write_store(folder / "store", cut_specs(cut), CUT_BATCH * CUT_STEPS)
    case = replace(SMALL_CASE, batch=CUT_BATCH)
    trainer = make_trainer(case, store, folder, device, Ranks())
    other = make_card(case.size, store).build()
    adapt(trainer.setup.recipe, other, Ranks())
    timer, batches = EpochTimer(), list(trainer.setup.train.epoch(0))
    turns = {
        "ours": ours(trainer, LabelObjective(tuple(HEADS), 0.0), timer),
        "bare": bare(other, batches, device),
    }
    best = compare(turns, rounds)
    waited = timer.waited / (rounds + 1) / best["ours"].wall
    step = f"{1e3 * best['ours'].wall / CUT_STEPS:.0f}"
    return [cut, f"{CUT_BATCH}", step, ratio(best["ours"], best["bare"]), f"{waited:.1%}"]


def rank_worker(folder: Path, device_name: str, rounds: int) -> None:
    """Be one of several ranks; the first prints the seconds of a step."""
    torch.set_num_threads(1)
    device = torch.device(device_name)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    store = FeatureStore.open(folder / "store")
    with joined(device) as ranks:
        trainer = make_trainer(SMALL_CASE, store, folder, device, ranks)
        turn = ours(trainer, LabelObjective(tuple(HEADS), 0.0), EpochTimer())
        best = compare({"turn": turn}, rounds)["turn"].wall
        if ranks.main:
            print(best)


def scaling(folder: Path, device: str, rounds: int) -> str:
    """Compare one and two ranks at the same batch, one thread each, in turns."""
    clips = SMALL_CASE.batch * SMALL_CASE.steps
    write_store(folder / "store", token_specs(SMALL_CASE), clips)
    seconds: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(2):
        for ranks, found in seconds.items():
            launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            launch += [f"--nproc-per-node={ranks}", __file__, "--worker", str(folder)]
            out = subprocess.run(
                [*launch, "--device", device, "--rounds", str(rounds)],
                check=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            ).stdout
            found.append(float(out.split()[-1]))
    one, two = (min(found) for found in seconds.values())
    return f"2 ranks, {SMALL_CASE.name}: {two / one:.2f} of the step of 1 rank (same batch)"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the small model only")
    parser.add_argument("--cut", action="store_true", help="only networks that are cut")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        rank_worker(options.worker, options.device, options.rounds)
        return
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    print(f"torch {torch.__version__}, {device}, {options.threads} threads\n")
    print("Ratios of wall time, in brackets of CPU time.\n")
    head = ["case", "batch", "step ms", "step / bare", "data wait", "table / alone", "live / alone"]
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    cases = () if options.cut else (SMALL_CASE,) if options.quick else (SMALL_CASE, *PAPER)
    for case in cases:
        with tempfile.TemporaryDirectory() as folder:
            cells = overhead(case, Path(folder), device, options.rounds)
        print(f"| {' | '.join(cells)} |", flush=True)
    names = ", ".join(tree["name"] for tree in NETWORKS.values())
    print(f"\nNetworks that are cut ({names}):\n")
    head = ["cut", "batch", "step ms", "step / bare", "data wait"]
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for cut in (LAST_STAGE, WHOLE):
        with tempfile.TemporaryDirectory() as folder:
            cells = cut_overhead(cut, Path(folder), device, options.rounds)
        print(f"| {' | '.join(cells)} |", flush=True)
    if options.cut:
        return
    with tempfile.TemporaryDirectory() as folder:
        print(f"\n{scaling(Path(folder), options.device, options.rounds)}")


if __name__ == "__main__":
    main()
