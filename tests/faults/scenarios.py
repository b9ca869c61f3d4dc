"""The commands that are hurt: what they read, what they write, what must be the same at the end."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any

import librosa
import numpy as np
import torch
from support.any_store import IDS, fill_store
from support.media_files import write_video
from support.tiny_store import write_store
from support.training import SIZE, common, what
from torchvision.models import resnet18
from torchvision.models.video import s3d

from karmma_pipeline import config, files
from karmma_pipeline.models.backbones import BackboneChoice
from karmma_pipeline.models.saved import load_model
from karmma_pipeline.training.progress import HOW
from karmma_pipeline.training.recipe import TeacherRecipe
from karmma_pipeline.training.stages import train_teacher
from karmma_pipeline.training.state import load_state, read_checksummed

Tree = dict[str, str]
"""Name to digest; the names of folders end in a slash."""


@dataclass(frozen=True)
class Scenario:
    """One command.

    prepare: makes what it reads in a folder, and returns its arguments; it is to write into
        ``work`` there, which is not there yet. varies: names of files that no two runs have alike.
    """

    name: str
    prepare: Callable[[Path], list[str]]
    varies: tuple[str, ...] = ()

    def tree(self, work: Path) -> Tree:
        """Return everything that counts under ``work``."""
        found = {}
        for path in work.rglob("*"):
            name = str(path.relative_to(work))
            if any(fnmatch(name, pattern) for pattern in self.varies):
                continue
            found[name + "/" * path.is_dir()] = "" if path.is_dir() else digest(path)
        return found


def digest(path: Path) -> str:
    """Return the SHA-256 of a file; of a training state, of what it says.

    The bytes of a pickle depend on which equal strings are one object.
    """
    data = path.read_bytes()
    if path.name == "metrics.jsonl":
        data = what(path)
    if path.suffix == ".pt":
        state = torch.load(BytesIO(read_checksummed(path)), weights_only=True)
        data = "\n".join(_plain(state)).encode()
    return sha256(data).hexdigest()


def _plain(value: Any, name: str = "") -> Iterator[str]:
    if isinstance(value, dict):
        for key in (key for key in value if key not in HOW):
            yield from _plain(value[key], f"{name}.{key}")
    elif isinstance(value, list | tuple):
        for number, one in enumerate(value):
            yield from _plain(one, f"{name}.{number}")
    elif isinstance(value, torch.Tensor):
        yield f"{name} {value.dtype} {value.shape} {value.numpy().tobytes().hex()}"
    else:
        yield f"{name} {value!r}"


def recipe(folder: Path, tree: dict[str, Any]) -> str:
    """Write a recipe and return its path."""
    path = folder / "recipe.yaml"
    files.write_text(path, json.dumps(tree))  # JSON is YAML
    return str(path)


_RGB: dict[str, Any] = {"name": "s3d", "frames": 8, "size": 32}
_SOUND: dict[str, Any] = {"name": "resnet18", "image": [32, 32]}


def warm() -> None:
    """Do here once what forks would each do again: late imports, and what is remembered."""
    librosa.stft(np.zeros(1024, np.float32), n_fft=512)
    librosa.filters.mel(sr=16000, n_fft=512)
    for choice in (_RGB, _SOUND):
        BackboneChoice.model_validate(choice).output_shape  # noqa: B018


def _extract(folder: Path) -> list[str]:
    write_video(folder / "v.mp4", seconds=1.5, click_s=0.7)
    rows = ["clip_id,video,start,stop,verb,split"]
    rows += [f"c{i},v.mp4,{i * 0.5},{i * 0.5 + 0.5},{'ab'[i % 2]},train" for i in range(3)]
    (folder / "m.csv").write_text("\n".join([*rows, "gone,gone.mp4,0,1,a,val"]) + "\n")
    torch.manual_seed(0)
    for net in (s3d(), resnet18()):
        torch.save(net.state_dict(), folder / f"{type(net).__name__}.pt")
    rgb = {**_RGB, "weights": str(folder / "S3D.pt")}
    sound = {**_SOUND, "weights": str(folder / "ResNet.pt")}
    tree = {
        "manifest": str(folder / "m.csv"),
        "out": str(folder / "work/out"),
        "audio": {"sample_rate": 16000, "n_fft": 512, "win_length": 400, "mels": 32},
        "sets": {"teacher": {"rgb": rgb}, "student": {"audio": sound}},
        "store": {"clips_per_shard": 2},
        "decode": {"workers": 1},
        "batch_size": 2,
        "precision": "float32",
        "memory_format": "contiguous",
        "max_failures": 1.0,
    }
    return ["extract", recipe(folder, tree)]


def _train_teacher(folder: Path) -> list[str]:
    store, out = write_store(folder / "store"), folder / "work/run"
    tree = common(store, out, epochs=2, batch_size=32, save_every_s=0.0)
    return ["train-teacher", recipe(folder, tree)]


def _taught(folder: Path) -> tuple[Path, Path]:
    """Return a store and a teacher that was trained on it."""
    store, run = write_store(folder / "store"), folder / "teacher"
    train_teacher(config.build(TeacherRecipe, common(store, run, epochs=1), "faults"))
    return store, run


def _distill(folder: Path) -> list[str]:
    store, teacher = _taught(folder)
    changes: dict[str, Any] = {
        "teacher": str(teacher),
        "teacher_store": str(store),
        "size": {**SIZE, "dropout": 0.2},
        "epochs": 2,
        "batch_size": 32,
        "accumulate": 2,
        "ema": 0.9,
        "class_balance": 0.5,
        "temperature": 2.0,
        "save_every_s": 0.0,
    }
    return ["distill", recipe(folder, common(store, folder / "work/run", **changes))]


def _evaluate(folder: Path) -> list[str]:
    store, teacher = _taught(folder)
    out = str(folder / "work/report")
    more = ["--set", "draws=2", "--set", "drop_rates=[0.0, 0.5]"]
    return ["evaluate", str(teacher), "--store", str(store), "--out", out, *more]


def _convert(folder: Path) -> list[str]:
    store = fill_store(folder / "store", IDS[:4], per_shard=2)
    return ["store", "convert", str(store), str(folder / "work/int8"), "--dtype", "int8"]


def _stage(folder: Path) -> list[str]:
    store = fill_store(folder / "store", IDS[:4], per_shard=2)
    return ["store", "stage", str(store), str(folder / "work/node")]


_RUN = ("run/log.txt", "run/environment.json", "run/tensorboard/*")

SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        Scenario("extract", _extract, ("out/extract.json", "out/media_notes/*")),
        Scenario("train-teacher", _train_teacher, _RUN),
        Scenario("distill", _distill, _RUN),
        Scenario("evaluate", _evaluate),
        Scenario("convert", _convert),
        Scenario("stage", _stage, ("node/*.verified",)),  # inodes and times of the copy
    )
}


def losses(work: Path, wanted: Tree) -> Iterator[str]:
    """Yield what a run that was hurt has lost, or says wrongly."""
    for manifest in work.rglob("manifest.json"):
        yield from _differing(work, manifest.parent, wanted)
    for mark in work.rglob("*.verified"):
        yield from _differing(work, mark.with_suffix(""), wanted)
    for card in work.rglob("model.json"):
        load_model(card.parent)
    for folder in work.rglob("state"):
        state, faults = load_state(folder)
        yield from (f"a training state: {fault}" for fault in faults)
        if state is None and any(folder.glob("*.pt")):
            yield f"{folder}: no state"
    for path in work.rglob("*.json"):
        json.loads(path.read_text())


def _differing(work: Path, folder: Path, wanted: Tree) -> Iterator[str]:
    """Yield what a finished folder lacks or has otherwise; what is left over may be there."""
    start = f"{folder.relative_to(work)}/"
    for name, sha in wanted.items():
        path = work / name
        if name.startswith(start) and not name.endswith("/"):
            if not path.is_file():
                yield f"{name} is missing"
            elif digest(path) != sha:
                yield f"{name} differs"
