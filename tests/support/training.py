"""Recipes of small trainings, and ways to hurt and compare what they leave behind."""

import json
import os
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from support import forks

from karmma_pipeline import config
from karmma_pipeline.errors import KarmmaError, StoppedError
from karmma_pipeline.jobs import StopFlag
from karmma_pipeline.models.saved import load_model
from karmma_pipeline.store import FeatureStore
from karmma_pipeline.training import loop
from karmma_pipeline.training.progress import HOW
from karmma_pipeline.training.recipe import (
    BaselineRecipe,
    DistillRecipe,
    TeacherRecipe,
    TrainRecipe,
)

SIZE = {"dim": 16, "layers": 1, "attention_heads": 2, "ffn_width": 16, "head_width": 16}


def common(store: Path, out: Path, /, **changes: Any) -> dict[str, Any]:
    tree = {"store": str(store), "out": str(out), "size": SIZE, "epochs": 12, "batch_size": 16}
    return {**tree, "optimiser": {"lr": 5e-3}, "name": "t", **changes}


def teacher_recipe(store: Path, out: Path, /, **changes: Any) -> TeacherRecipe:
    return config.build(TeacherRecipe, common(store, out, **changes), "test")


def baseline_recipe(store: Path, out: Path, /, **changes: Any) -> BaselineRecipe:
    return config.build(BaselineRecipe, common(store, out, **changes), "test")


def student_recipe(store: Path, teacher: Path, out: Path, /, **changes: Any) -> DistillRecipe:
    more = {"teacher": str(teacher), "teacher_store": str(store), **changes}
    return config.build(DistillRecipe, common(store, out, **more), "test")


def losses_of(recipe: TrainRecipe, train: Any, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Train, and return the loss of every step."""
    losses: list[float] = []
    step = loop.Trainer._step

    def record(self: loop.Trainer, *arguments: Any) -> float:
        losses.append(step(self, *arguments))
        return losses[-1]

    with monkeypatch.context() as patch:
        patch.setattr(loop.Trainer, "_step", record)
        train(recipe)
    return losses


def says(run: Path, root: Path) -> torch.Tensor:
    """The logits of a run's last model for every clip of a store, [clips, classes].

    Weights themselves are no measure: the bias of attention keys has no influence at all, so
    that rounding alone moves it.
    """
    store = FeatureStore.open(root)
    model, _ = load_model(run / "last")
    index = torch.arange(len(store))
    with torch.inference_mode():
        tokens = {m: store.gather(m, index) for m in store.modalities}
        out = model(tokens, torch.from_numpy(store.present))
    return torch.cat(list(out.values()), dim=1)


MODELS = ("best/model.safetensors", "last/model.safetensors")


def results(run: Path) -> tuple[bytes, ...]:
    """What must not depend on how often a run was stopped: all but how fast it was."""
    return *((run / name).read_bytes() for name in MODELS), what(run / "metrics.jsonl")


def what(metrics: Path) -> bytes:
    """The columns of the metrics that say what came out."""
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    return json.dumps([{k: v for k, v in row.items() if k not in HOW} for row in rows]).encode()


class SignalAt(StopFlag):
    """Sends its process a signal at the n-th time that anybody looks; else it is another flag."""

    def __init__(self, flag: StopFlag, looks: int, number: int) -> None:
        super().__init__()
        self.flag, self.looks, self.number = flag, looks, number

    @property
    def requested(self) -> bool:
        self.looks -= 1
        if self.looks == 0:
            os.kill(os.getpid(), self.number)
        return self.flag.requested

    def check(self, saved: str) -> None:
        self.flag.check(saved)


class StopAt(StopFlag):
    """Asks for a stop at the n-th time that anybody looks."""

    def __init__(self, looks: int) -> None:
        super().__init__()
        self.looks = looks

    @property
    def requested(self) -> bool:
        self.looks -= 1
        if self.looks == 0:
            self.request()
        return super().requested


def stopped_and_resumed(
    train: Callable[..., Any], recipe: Any, looks: Iterable[int], says: str
) -> None:
    """Train to the end, stopped after so many looks at the flag each time, which is said."""
    for count in looks:
        with pytest.raises(StoppedError, match=says):
            train(recipe, stop=StopAt(count))
    train(recipe)


def exit_code(train: Callable[[StopFlag], object]) -> int:
    """Train as the command line does, signals and exit codes included."""
    try:
        with StopFlag() as stop:
            train(stop)
    except KarmmaError as error:
        print(f"Error: {error}", file=sys.stderr)
        return int(error.exit_code)
    except BaseException:
        traceback.print_exc()
        return 99
    finally:
        sys.stderr.flush()
    return 0


def fork(train: Callable[[StopFlag], object], log: Path, **environment: str) -> int:
    """Train in a process of its own, which costs no imports; return its id."""
    child = forks.fork()
    if child:
        return child
    os.environ.update(environment)
    said = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(said, number)
        setattr(sys, name, os.fdopen(number, "w"))
    os._exit(exit_code(train))


def fork_ranks(train: Callable[[StopFlag], object], log: Path, size: int = 2) -> list[int]:
    """Train in several processes that find one another as under torchrun."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    return [
        fork(
            train,
            log.with_suffix(f".{rank}"),
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(size),
            **address,
        )
        for rank in range(size)
    ]


def _free_port() -> int:
    """Return a port that no other test process takes, and below those that systems give away."""
    first = 10_000 + os.getpid() % 10_000
    for port in range(first, first + 10_000):
        with socket.socket() as free, suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no port is free")


def karmma(*arguments: str, ranks: int = 1, **environment: str) -> "subprocess.Popen[str]":
    """Start a command, under torchrun if there are several ranks."""
    command = [sys.executable, "-m"]
    if ranks > 1:
        launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        command += [*launcher, "-m"]
    return subprocess.Popen(
        [*command, "karmma_pipeline.cli", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )
