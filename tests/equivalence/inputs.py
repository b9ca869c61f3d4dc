"""What both programs read: odd files, a network of one's own, recipes; all of it tiny.

Everything is named relative to the folder in which the commands run, so that no path in a result
tells which program made it. Keys are spelled as the old program does: the new one must read them.
"""

import csv
import json
import shutil
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from equivalence import work
from support import media_files
from support.media_files import write_video

NETWORK = '''"""A network that comes through the door for other people's networks."""

import torch
from torch import nn

from karmma_pipeline.models.backbones import Architecture, FrameTransform


class Tubes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Conv3d(3, 24, kernel_size=(2, 8, 8), stride=(2, 8, 8))
        self.head = nn.Linear(24, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.project(x).mean((2, 3, 4)))


def tubes() -> Architecture:
    return Architecture(
        kind="video",
        build=lambda weights: Tubes(),
        weights=None,
        feature_map=lambda net, x: net.project(x),
        heads=("head",),
        frames=4,
        transform=FrameTransform(
            resize=(36,), crop=(32, 32), mean=(0.45, 0.45, 0.45), std=(0.225, 0.225, 0.225)
        ),
    )
'''

MEDIA = {".mp4", ".mkv", ".mov", ".avi", ".mpg", ".webm", ".ts"}

_COMPUTED: dict[str, Any] = {
    "device": "cpu",
    "batch_size": 4,
    "precision": "float32",
    "layout": "contiguous",
    "max_failures": 1.0,
}
"""How results are computed: stated, since what is chosen by the clock differs between two runs."""

_DEMO: dict[str, Any] = {
    **_COMPUTED,
    "manifest": "out/sample/manifest.csv",
    "flow": {"bound_px": 4},
    "audio": {
        "sample_rate": 16000,
        "n_fft": 512,
        "win_length": 400,
        "hop_length": 160,
        "mels": 32,
        "mean": -30,
        "std": 15,
    },
    "sets": {
        "teacher": {
            "rgb": {"name": "swin3d_t", "weights": "random:0", "frames": 2, "size": 64},
            "flow": {"name": "r3d_18", "weights": "random:1", "frames": 2, "size": 32},
            "audio": {"name": "resnet18", "weights": "random:2", "image": [32, 64]},
        },
        "student": {
            "rgb": {"name": "swin3d_t", "weights": "random:0", "frames": 2, "size": 32},
            "flow": {"name": "r3d_18", "weights": "random:1", "frames": 2, "size": 32},
            "audio": {"name": "resnet18", "weights": "random:2", "image": [32, 32]},
        },
    },
    "store": {"clips_per_shard": 6},  # batches of 4 and 2: a batch never reaches over a shard
    "decode": {"workers": 1},
}

_ODD: dict[str, Any] = {
    **_COMPUTED,
    "manifest": "inputs/odd/manifest.csv",
    "sampling": {"mode": "fps", "fps": 12, "short": "repeat_ends"},
    "flow": {"source": "raft_small", "weights": "random:0", "updates": 2, "bound_px": 8},
    "audio": {"front_end": "vggish"},
    "sets": {
        "own": {
            "rgb": {"name": "nets:tubes", "weights": "random:3"},
            "flow": {"name": "nets:tubes", "weights": "random:4", "size": 128, "frames": 2},
            "audio": {"name": "mobilenet_v3_large", "weights": "random:5", "image": [32, 96]},
        },
    },
    "store": {"clips_per_shard": 16, "dtype": "float32"},
    "decode": {"workers": 3},
}

_SMALL: dict[str, Any] = {
    "rgb": {"name": "nets:tubes", "weights": "random:3"},
    "flow": {"name": "mc3_18", "weights": "random:4", "frames": 4, "size": 32},
    "audio": {"name": "mobilenet_v3_large", "weights": "random:5", "image": [32, 64]},
}

_PICTURES: dict[str, Any] = {
    **_COMPUTED,
    "manifest": "inputs/pictures/manifest.csv",
    "audio": {"front_end": "ast"},
    "sets": {
        "own": {
            "rgb": {"name": "nets:tubes", "weights": "random:3"},
            "flow": {"name": "nets:tubes", "weights": "random:4"},
            "audio": {"name": "mobilenet_v3_large", "weights": "random:5", "image": [32, 96]},
        },
    },
    "store": {"dtype": "int8"},
    "decode": {"workers": 1},
}

_SIZE: dict[str, Any] = {
    "dim": 16,
    "layers": 1,
    "attention_heads": 2,
    "ffn_width": 16,
    "head_width": 16,
    "dropout": 0.2,
}


def _training(store: str, name: str, **more: Any) -> dict[str, Any]:
    return {
        "store": f"out/demo/{store}",
        "out": f"out/runs/{name}",
        "name": name,
        "size": _SIZE,
        "optimiser": {"lr": 5e-3},
        "epochs": 3,
        "batch_size": 8,
        "save_every_s": 0,  # a state after every step: where a kill comes does not matter
        "device": "cpu",
        "precision": "float32",
        **more,
    }


RECIPES: dict[str, dict[str, Any]] = {
    "demo": {**_DEMO, "out": "out/demo"},
    "parts": {**_DEMO, "out": "out/parts", "layout": "channels_last", "sets": {"own": _SMALL}},
    "odd": {**_ODD, "out": "out/odd"},
    "pictures": {**_PICTURES, "out": "out/pictures"},
    "real": {**_ODD, "manifest": "inputs/real/manifest.csv", "out": "out/real"},
    "teacher": _training("teacher", "teacher", modality_dropout=0.3),
    "baseline": _training(
        "student", "baseline", modality_dropout=0.0, size={**_SIZE, "absent": "zeros"}
    ),
    "delta": _training("student", "delta", modality_dropout=0.3, accumulate=2, class_balance=0.5),
    "student": _training(
        "student",
        "student",
        modality_dropout=0.3,
        teacher="out/runs/teacher",
        teacher_store="out/demo/teacher",
        temperature=2.0,
        ema=0.9,
    ),
    "report": {
        "runs": [f"out/runs/{name}" for name in ("teacher", "baseline", "delta", "student")],
        "stores": ["out/demo/teacher", "out/demo/student"],
        "out": "out/report",
        "draws": 2,
        "device": "cpu",
    },
}


def digest(media: Path | None) -> str:
    """Return a digest of what makes the inputs, and of the commands: Matroska has random bytes."""
    sources = [Path(__file__), Path(work.__file__), Path(media_files.__file__)]
    total = sha256()
    for path in [*sources, *(_clips(media) if media else [])]:
        total.update(f"{path.name}\n".encode() + path.read_bytes())
    return total.hexdigest()[:12]


def write_inputs(folder: Path, media: Path | None) -> None:
    """Write everything into a folder.

    Args:
        folder: in which the commands are to run.
        media: a folder with more clips; None for none.
    """
    inputs = folder / "inputs"
    shutil.rmtree(inputs, ignore_errors=True)
    _write_table(inputs / "odd", list(_odd(inputs / "odd")))
    _write_table(inputs / "pictures", list(_pictures(inputs / "pictures")))
    if media is not None:
        _write_table(inputs / "real", list(_real(inputs / "real", media)))
    (inputs / "nets.py").write_text(NETWORK)
    recipes = folder / "recipes"
    recipes.mkdir(exist_ok=True)
    for name, tree in RECIPES.items():
        (recipes / f"{name}.yaml").write_text(json.dumps(tree, indent=1))  # JSON is YAML


def _odd(folder: Path) -> Iterator[dict[str, Any]]:
    """Write what real media do to a pipeline, in small, and yield the clips."""
    folder.mkdir(parents=True)
    variable = [0, 0.04, 0.08, 0.5, 0.54, 0.9, 0.94, 1.3, 1.34, 1.7, 1.94]
    files: dict[str, dict[str, Any]] = {
        "constant.mp4": {},
        "ntsc.mp4": {"times": [i * 1001 / 60_000 for i in range(119)]},
        "variable.mp4": {"times": variable},
        "variable.mkv": {"times": variable},
        "transport.ts": {},
        "rotated.mp4": {},
        "panned.avi": {"pan_px_s": 30.0, "codec": "mpeg4", "sound": False},
        "late_picture.mp4": {"video_delay_s": 0.5},
        "late_sound.mp4": {"audio_delay_s": 0.5},
        "over_reported.mp4": {},
        "one_frame.mp4": {"times": [0.0]},
        "cut.mp4": {"seconds": 8.0, "index_first": True},
        "only_sound.mp4": {"video": False},
    }
    for name, options in files.items():
        write_video(folder / name, **{"click_s": 1.2, **options})
        yield from _two_clips(name)
    media_files.turn(folder / "rotated.mp4")
    media_files.over_report(folder / "over_reported.mp4")
    data = (folder / "cut.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(data[: int(0.6 * len(data))])
    (folder / "noise.mp4").write_bytes(np.random.default_rng(0).bytes(5000))
    yield from ({"clip_id": name[:4], "video": name} for name in ("noise.mp4", "gone.mp4"))
    yield {"clip_id": "outside", "video": "constant.mp4", "start": 5, "stop": 6}


def _two_clips(name: str) -> Iterator[dict[str, Any]]:
    yield {"clip_id": f"{name}-early", "video": name, "start": 0.1, "stop": 0.7}
    yield {"clip_id": f"{name}-whole", "video": name}


def _pictures(folder: Path) -> Iterator[dict[str, Any]]:
    """Write numbered pictures, in a folder and in a tar, with flow and sound beside them."""
    media_files.write_frames(folder / "frames", range(1, 41), "img_{:05d}.jpg")
    media_files.write_flow(folder / "flow", range(1, 41), (3.0, -1.0), 20)
    media_files.pack(folder / "frames", folder / "frames.tar")
    write_video(folder / "sound.mp4", video=False, click_s=0.9)
    clip = {"fps": 20, "start": 0.2, "stop": 1.7}
    yield {"clip_id": "folder", "frames": "frames", "flow": "flow", "audio": "sound.mp4", **clip}
    yield {"clip_id": "tar", "frames": "frames.tar", "audio": "sound.mp4", **clip}
    yield {"clip_id": "still", "frames": "frames", "flow": "flow", **clip}


def _real(folder: Path, media: Path) -> Iterator[dict[str, Any]]:
    """Copy somebody's clips and yield the whole of each and a piece."""
    folder.mkdir(parents=True)
    for path in _clips(media):
        shutil.copy(path, folder / path.name)
        yield {"clip_id": path.name, "video": path.name}
        yield {"clip_id": f"{path.name}-piece", "video": path.name, "start": 0.4, "stop": 1.3}


def _clips(media: Path) -> list[Path]:
    return sorted(p for p in media.rglob("*") if p.suffix.lower() in MEDIA)


def _write_table(folder: Path, clips: list[dict[str, Any]]) -> None:
    """Write the manifest; a clip's label is its place modulo 3, of which nothing here depends."""
    keys = ["clip_id", "video", "frames", "fps", "flow", "audio", "start", "stop", "verb", "split"]
    used = [k for k in keys if k in {"verb", "split"} or any(k in clip for clip in clips)]
    with (folder / "manifest.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, used, restval="")
        writer.writeheader()
        for number, clip in enumerate(clips):
            more = {"verb": "abc"[number % 3], "split": ("train", "val")[number % 4 == 3]}
            writer.writerow({**clip, **more})
