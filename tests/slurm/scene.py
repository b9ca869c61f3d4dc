"""What `pipeline.py` works with: poisoned clips, recipes, a chain, and jobs to be held."""

import csv
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from slurm.watch import KARMMA, expect

HERE = Path(__file__).parent
PARTS = 8
WARNING_S = 20
LOCAL = {"PET_LOCAL_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
"""For torchrun and gloo, should the machine not know its own name."""
HOLDS = "KARMMA_TEST_HOLDS"

POISON = {
    "poison_raise": "decode_error",
    "poison_crash": "crashed",
    "poison_hang": "timeout",
}
RESOURCES = {"cpus": 2, "gpus": 0, "memory_gb": 4, "hours": 0.5}
SIZE = {"dim": 32, "layers": 1, "attention_heads": 4, "ffn_width": 32, "head_width": 64}
TRAINING = {"epochs": 12, "batch_size": 16, "size": SIZE, "optimiser": {"lr": 1e-3}}
RUNS = ("teacher", "baseline", "student", "two_nodes")
RGB = {"name": "s3d", "weights": "random:0", "frames": 8}
FLOW = {"name": "s3d", "weights": "random:1", "frames": 8}
AUDIO = {"name": "resnet18", "weights": "random:2"}
RECIPES: dict[str, dict[str, Any]] = {
    "extract": {
        "manifest": "../clips/manifest.csv",
        "out": "features",
        "flow": {"bound_px": 4},
        "audio": {"sample_rate": 16000, "n_fft": 512, "win_length": 400, "mels": 32},
        "sets": {
            "teacher": {
                "rgb": {**RGB, "size": 48},
                "flow": {**FLOW, "size": 48},
                "audio": {**AUDIO, "image": [32, 64]},
            },
            "student": {
                "rgb": {**RGB, "size": 32},
                "flow": {**FLOW, "size": 32},
                "audio": {**AUDIO, "image": [32, 32]},
            },
        },
        "store": {"clips_per_shard": 4},
        "decode": {"workers": 1, "timeout_s": 30, "stall_s": 10},  # a poisoned clip sleeps
        "batch_size": 2,
        "precision": "float32",
        "memory_format": "contiguous",
    },
    "teacher": {**TRAINING, "store": "features/teacher", "out": "runs/teacher"},
    "baseline": {**TRAINING, "store": "features/student", "out": "runs/baseline"},
    "two_nodes": {**TRAINING, "store": "features/teacher", "out": "runs/two_nodes"},
    "student": {
        **TRAINING,
        "store": "features/student",
        "out": "runs/student",
        "teacher": "runs/teacher",
        "teacher_store": "features/teacher",
    },
    "report": {
        "runs": ["runs/teacher", "runs/baseline", "runs/student"],
        "stores": ["features/teacher", "features/student"],
        "out": "report",
        "draws": 2,
    },
}
STAGES: dict[str, dict[str, Any]] = {
    "extract": {"command": "extract", "array": PARTS},
    "teacher": {"command": "train-teacher"},
    "baseline": {"command": "train-baseline"},
    "two_nodes": {"command": "train-teacher", "nodes": 2},
    "student": {"command": "distill"},
    "report": {"command": "evaluate"},
}


def karmma(*arguments: str, cwd: Path | None = None) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([*KARMMA, *arguments], cwd=cwd, capture_output=True, text=True)


def prepare(folder: Path) -> tuple[Path, Path]:
    """Write clips, three of them poisoned, and two folders with the same recipes.

    Returns:
        Folders of the undisturbed and of the disturbed run.
    """
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE / "faults"), str(HERE.parents[1])])
    os.environ[HOLDS] = str(folder / "holds")
    (folder / "holds").mkdir(parents=True)
    made = karmma("sample", str(folder / "clips"), "--clips", "64")
    expect(made.returncode == 0, made.stderr)
    _poison(folder / "clips/manifest.csv")
    reference, disturbed = folder / "reference", folder / "a cluster"  # a name with a space
    for place in (reference, disturbed):
        for name, tree in RECIPES.items():
            _write_yaml(place / f"recipes/{name}.yaml", tree)
        stages = {
            name: {**stage, "recipe": f"recipes/{name}.yaml", "resources": RESOURCES}
            for name, stage in STAGES.items()
        }
        if place == reference:
            stages["extract"]["array"] = 1
            del stages["two_nodes"]  # two processes of this machine stand in for it
        _write_yaml(place / "chain.yaml", {"name": "pipeline", "stages": stages})
        site = {"env": {**LOCAL, "OMP_NUM_THREADS": "1"}, "warning_s": WARNING_S}
        _write_yaml(place / "site.yaml", site)
    return reference, disturbed


def prepare_inside(folder: Path) -> Path:
    """Write a small chain, and the job of an array that submits it while it runs.

    Its training is on two nodes, so that it starts with ``srun``, which reads a job's variables.
    """
    with (folder / "clips/manifest.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["clip_id"] not in POISON][:12]
    with (folder / "clips/few.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    place = folder / "inside"
    extract = {**RECIPES["extract"], "manifest": "../clips/few.csv"}
    extract["sets"] = {"teacher": {"rgb": {**RGB, "size": 32}}}
    _write_yaml(place / "recipes/extract.yaml", extract)
    train = {**RECIPES["two_nodes"], "out": "runs/inside", "train_split": "", "val_split": ""}
    _write_yaml(place / "recipes/inside.yaml", train)
    commands = {"extract": {"command": "extract"}, "inside": STAGES["two_nodes"]}
    stages = {
        name: {**stage, "recipe": f"recipes/{name}.yaml", "resources": RESOURCES}
        for name, stage in commands.items()
    }
    _write_yaml(place / "chain.yaml", {"name": "road", "stages": stages})
    shutil.copy(folder / "a cluster/site.yaml", place)
    submit = shlex.join([*KARMMA, "submit", "chain.yaml", "--site", "site.yaml"])
    script = place / "outer.sh"
    script.write_text(
        f"""#!/usr/bin/env bash
[ "$SLURM_ARRAY_TASK_ID" = 2 ] || exit 0
{submit} || exit 1
while [ -e {shlex.quote(str(_place("outer")))} ]; do sleep 0.2; done
"""
    )
    return place


def prepare_sweep(folder: Path) -> None:
    """Write a sweep of two methods and two seeds over the stores that a folder has."""
    few = {"epochs": 2, "save_every_s": 0}
    tree = {
        "name": "seeds",
        "out": "sweep",
        "seeds": [0, 1],
        "methods": {
            "teacher": {
                "command": "train-teacher",
                "recipe": "recipes/teacher.yaml",
                "set": few,
            },
            "student": {
                "command": "distill",
                "recipe": "recipes/student.yaml",
                "set": few,
                "teacher": "teacher",
            },
        },
        "evaluate": {"set": {"draws": 0, "costs": False}},
        "resources": {**RESOURCES, "cpus": 1, "memory_gb": 2},
    }
    _write_yaml(folder / "sweep.yaml", tree)


def _poison(manifest: Path) -> None:
    with manifest.open(newline="") as file:
        rows = list(csv.DictReader(file))
    good = manifest.parent / rows[0]["video"]
    (good.parent / "page.mp4").write_text("<html>")
    for number, clip_id in enumerate(POISON):
        video = "videos/page.mp4" if clip_id == "poison_raise" else f"videos/{clip_id}.mp4"
        if clip_id != "poison_raise":
            shutil.copy(good, manifest.parent / video)
        rows.insert(7 + 21 * number, {**rows[0], "clip_id": clip_id, "video": video})
    with manifest.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _write_yaml(path: Path, tree: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(tree, sort_keys=False))


def start_reference(folder: Path) -> "subprocess.Popen[bytes]":
    """Run the chain without Slurm, undisturbed, and the training of two ranks."""
    chain = [*KARMMA, "submit", "chain.yaml", "--site", "site.yaml", "--launcher", "local"]
    ranks = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    ranks += ["-m", KARMMA[2], "train-teacher", "recipes/two_nodes.yaml"]
    both = f"{shlex.join(chain)} && {shlex.join(ranks)}"
    environment = {**os.environ, **LOCAL, "OMP_NUM_THREADS": "1"}
    with (folder / "out.txt").open("wb") as out:
        return subprocess.Popen(
            ["bash", "-c", both],  # noqa: S607
            cwd=folder,
            env=environment,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )


def hold(name: str) -> None:
    """Let a job wait from some point on until it is released; see faults/sitecustomize.py."""
    _place(name).touch()


def is_held(name: str) -> bool:
    return _place(f"{name}.here").exists()


def release(name: str) -> None:
    _place(name).unlink()


def _place(name: str) -> Path:
    return Path(os.environ[HOLDS]) / name
