"""Proves and measures the GPU path: one command, at most eight minutes, no network.

    python benchmarks/gpu.py [--out gpu-results]      # on a GPU
    python benchmarks/gpu.py --rehearse               # every part in small, on a CPU

First what must be right (tokens, losses, resume), then what should be fast. Each part writes its
rows as soon as it has them; one that fails or takes too long ends alone, and the others go on in
a new process, for CUDA does not survive some errors. At the end there are ``gpu.json`` and
``gpu.md``, a table with the card's name.

A rehearsal runs the same functions with the device's name changed and smaller sizes, and lists
the lines of the script that it did not execute.
"""

import argparse
import json
import os
import subprocess
import sys
import time
import traceback
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

WHEELS = """
A GPU host without network that has torch, torchvision and numpy needs two sets of wheels: the core
set (about 50 MiB) and OpenCV (about 60 MiB), apart because some hosts take small transfers only.
On a machine with network, for the Python of the host (here 3.12):

    get="pip download --only-binary :all: --python-version 3.12 --no-deps"
    $get --dest wheels/core 'av<19' click google-crc32c h5py absl-py lazy_loader 'librosa<1' \\
        'pebble<6' protobuf psutil pydantic==2.14.4 pydantic-core==2.50.5 annotated-types \\
        typing-inspection pyyaml safetensors 'soxr<2' tensorboard 'threadpoolctl<4' tqdm
    $get --dest wheels/opencv 'opencv-python-headless<5'

and on the host, in a clone of the repository:

    pip install --no-index --no-deps wheels/*/*.whl
    export PYTHONPATH=$PWD

The part `onnx` also takes onnx and, for the host's CUDA, onnxruntime-gpu. They are large and apart
from the others: where they are missing the part is skipped, and the table says so.
"""

#: Functions and their modules, in the order of their worth: what is not reached in time is missed
#: the least. Named here, so that this process imports no torch, which would take a part of the GPU.
PARTS = dict.fromkeys(("tokens", "losses", "resume"), "gpu_parts")
PARTS |= {"agreement": "gpu_answers"}
PARTS |= dict.fromkeys(("extract_features", "decode", "train", "distill"), "gpu_parts")
PARTS |= {"predict": "gpu_answers", "suffixes": "gpu_parts"}
PARTS |= {"live": "gpu_answers", "compiled": "gpu_parts", "onnx": "gpu_answers"}

PART_S, TOTAL_S = 150, 8 * 60
"""Seconds of a part, and of all parts together."""


def main() -> None:
    """Run the parts and write the table; exit 1 if a part failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=WHEELS, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), help="folder of results")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, ...")
    parser.add_argument("--only", nargs="*", default=[], choices=PARTS, help="these parts alone")
    parser.add_argument("--rehearse", action="store_true", help="every part in small, on a CPU")
    parser.add_argument("--child", nargs="*", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        work(arguments)
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    rows = arguments.out / "rows.jsonl"
    rows.unlink(missing_ok=True)
    failed = run_all(arguments, rows)
    write_table(arguments, rows)
    if arguments.rehearse:
        list_unexecuted(arguments.out)
    sys.exit(1 if failed else 0)


def run_all(arguments: argparse.Namespace, rows: Path) -> bool:
    """Run the parts in processes of their own, a new one after each failure; tell if any failed."""
    waiting = arguments.only or [*PARTS]
    began, failed = time.monotonic(), False
    while waiting:
        process = subprocess.Popen(command(arguments, waiting), start_new_session=True)
        why = wait_for(process, rows, began, limited=not arguments.rehearse)
        done = [entry["part"] for entry in read(rows) if "ended" in entry]
        left = [name for name in waiting if name not in done]
        if left and why:
            append(rows, {"part": left[0], "ended": False, "why": why})
            left = left[1:]
        if why == "out of time":
            for name in left:
                append(rows, {"part": name, "ended": False, "why": why})
            left = []
        failed |= bool(why)
        waiting = left
    return failed or any(entry.get("ended") is False for entry in read(rows))


def command(arguments: argparse.Namespace, parts: list[str]) -> list[str]:
    """Return the command of a child; a rehearsal notes the lines that it executes."""
    child = [__file__, "--out", str(arguments.out), "--device", arguments.device]
    child += ["--rehearse"] if arguments.rehearse else []
    noted = ["-m", "coverage", "run", "--rcfile=/dev/null", "--parallel-mode"]
    noted += [f"--data-file={arguments.out / 'coverage'}", f"--include={here('gpu*.py')}"]
    return [sys.executable, *(noted if arguments.rehearse else []), *child, "--child", *parts]


def here(name: str) -> Path:
    """Return a path beside this file."""
    return Path(__file__).resolve().parent / name


def wait_for(process: "subprocess.Popen[Any]", rows: Path, began: float, limited: bool) -> str:
    """Wait for a child; return why it ended too early, empty if it did not."""
    while process.poll() is None:
        time.sleep(0.1)
        entries = read(rows)
        begun = [entry["at"] for entry in entries if "at" in entry]
        late = time.time() - begun[-1] > PART_S if begun else False
        if limited and (late or time.monotonic() - began > TOTAL_S):
            os.killpg(process.pid, 9)
            process.wait()
            return "out of time" if time.monotonic() - began > TOTAL_S else f"over {PART_S} s"
    return f"its process ended with {process.returncode}" if process.returncode else ""


def work(arguments: argparse.Namespace) -> None:
    """Be a child: run some parts, one after another."""
    import gpu_parts
    import torch

    device = torch.device("cpu" if arguments.rehearse else arguments.device)
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    rows = arguments.out / "rows.jsonl"
    append(rows, {"facts": facts(device)})
    for name in arguments.child:
        append(rows, {"part": name, "at": time.time()})
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        started, why = time.perf_counter(), ""
        with TemporaryDirectory(prefix="karmma-gpu-") as folder:
            try:
                bench = gpu_parts.Bench(device, arguments.rehearse, Path(folder))
                for row in getattr(import_module(PARTS[name]), name)(bench):
                    append(rows, {"part": name, **row})
            except Exception as error:  # whatever a driver may raise
                traceback.print_exc()
                why = f"{type(error).__name__}: {error}"[:300]
        seconds = round(time.perf_counter() - started, 1)
        append(rows, {"part": name, "ended": not why, "why": why, "seconds": seconds})


def facts(device: Any) -> dict[str, Any]:
    """Return where it runs."""
    import torch
    import torchvision

    from karmma_pipeline.jobs import cpu_count
    from karmma_pipeline.models.device import device_name

    return {
        "device": device_name(device),
        "cpus": cpu_count(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "cuda": torch.version.cuda or "none",
        "python": sys.version.split()[0],
    }


def append(rows: Path, entry: dict[str, Any]) -> None:
    """Write an entry at once, and show it."""
    with rows.open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")
    if "what" in entry:
        print(line_of(entry), flush=True)


def read(rows: Path) -> list[dict[str, Any]]:
    """Read what has been written; the last line may be half there."""
    if not rows.exists():
        return []
    lines = rows.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def line_of(entry: dict[str, Any]) -> str:
    """Return a row of the Markdown table."""
    more = {k: v for k, v in entry.items() if k not in {"part", "what", "value", "unit", "goal"}}
    said = ", ".join(f"{k} {_short(v)}" for k, v in more.items())
    value = f"{_short(entry['value'])} {entry['unit']}".strip()
    return f"| {entry['part']} | {entry['what']} | {value} | {entry['goal']} | {said} |"


def _short(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def write_table(arguments: argparse.Namespace, rows: Path) -> None:
    """Write gpu.json and gpu.md."""
    entries = read(rows)
    where = next((entry["facts"] for entry in entries if "facts" in entry), {})
    measured = [entry for entry in entries if "what" in entry]
    skipped = {entry["part"]: entry["skipped"] for entry in entries if "skipped" in entry}
    ends = [entry for entry in entries if "ended" in entry]
    tree = {"where": where, "rehearsal": arguments.rehearse, "rows": measured}
    tree |= {"skipped": skipped, "parts": ends}
    (arguments.out / "gpu.json").write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
    head = "A rehearsal on a CPU; the figures mean nothing.\n\n" if arguments.rehearse else ""
    lines = [head + ", ".join(f"{k} {v}" for k, v in where.items()), ""]
    lines += ["| part | what | measured | goal | more |", "|---|---|---:|---|---|"]
    lines += [line_of(entry) for entry in measured]
    lines += [f"| {part} | skipped | | | {why} |" for part, why in skipped.items()]
    lines += [
        f"| {e['part']} | failed | | | {e['why']} |".replace("\n", " ")
        for e in ends
        if not e["ended"]
    ]
    (arguments.out / "gpu.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{arguments.out / 'gpu.md'}: {len(measured)} rows, {len(ends)} parts")


def list_unexecuted(out: Path) -> None:
    """Print the lines of the parts that no child of the rehearsal executed."""
    tool = [sys.executable, "-m", "coverage"]
    data = [f"--data-file={out / 'coverage'}", "--rcfile=/dev/null"]
    subprocess.run([*tool, "combine", "--quiet", *data], check=True)
    print("lines that the rehearsal did not execute (what only a GPU or the parent runs):")
    subprocess.run([*tool, "report", "--show-missing", *data], check=True)


if __name__ == "__main__":
    main()
