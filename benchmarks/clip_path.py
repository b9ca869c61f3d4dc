"""Which modules one clip passes through: python benchmarks/clip_path.py [--tree FOLDER].

One generated RGB clip goes through `karmma extract`, from its row of a manifest to a committed
shard, with every setting as a recipe has it that names no more than a small network. A profile
hook in each thread of each process notes the modules of karmma_pipeline whose functions run. What
only runs while a module is imported does not count, nor do config, errors, files and logs, which
are everywhere.
"""

import argparse
import ast
import os
import subprocess
import sys
import tempfile
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

FOUNDATION = {"config", "errors", "files", "logs"}

RECIPE = """\
manifest: manifest.csv
out: features
sets: {one: {rgb: {name: swin3d_t, weights: "random:0", frames: 2, size: 64}}}
decode: {workers: 1}
"""

HOOK = '''\
"""Python imports a module of this name at its start, in decode processes too."""

import os
import sys
import threading
from inspect import CO_NEWLOCALS

notes = os.open(NOTES, os.O_WRONLY | os.O_APPEND)
seen = set()


def within_import(frame):
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


def hook(frame, event, argument):
    code = frame.f_code
    # The bodies of modules and classes have no locals of their own.
    if event != "call" or not code.co_flags & CO_NEWLOCALS:
        return
    module = frame.f_globals.get("__name__") or ""
    key = module, threading.get_ident()
    if not module.startswith("karmma_pipeline") or key in seen or within_import(frame):
        return
    seen.add(key)
    thread = threading.current_thread()
    role = "main" if thread is threading.main_thread() else "thread"
    line = f"{os.getpid()}\\t{role}\\t{frame.f_globals['__file__']}\\n"
    os.write(notes, line.encode())  # at once: a worker may be killed at any moment


threading.setprofile(hook)
sys.setprofile(hook)
'''

PLACES = {
    "main": "the main process",
    "decode": "the decode process",
    "thread": "other threads of the main process",
}


def main() -> None:
    """Print the modules, in the order in which their functions first ran, and their number."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--tree",
        type=Path,
        default=Path(__file__).resolve().parent.parent,
        help="the checkout that is traced; default: this one",
    )
    tree = parser.parse_args().tree.resolve()
    with tempfile.TemporaryDirectory(prefix="karmma-clip-path-") as name:
        passed = trace(tree, Path(name))
    for role, place in PLACES.items():
        print(f"In {place}:\n")
        for path in (path for path, first in passed.items() if first == role):
            print(f"- `{path}`: {first_sentence(tree / path)}")
        print()
    print(f"{len(passed)} modules")


def trace(tree: Path, folder: Path) -> dict[str, str]:
    """Extract the clip; return each module's file and where its functions ran."""
    write_clip(folder)
    notes = folder / "notes.tsv"
    notes.touch()
    (folder / "sitecustomize.py").write_text(HOOK.replace("NOTES", repr(str(notes))))
    paths = os.pathsep.join([str(folder), str(tree)])
    process = subprocess.Popen(
        [sys.executable, "-m", "karmma_pipeline.cli", "extract", "recipe.yaml"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    output, _ = process.communicate()
    if process.returncode or not (folder / "features" / "extract.json").is_file():
        sys.exit(f"extract ended with {process.returncode}:\n{output}")
    return arranged(tree, process.pid, notes.read_text())


def write_clip(folder: Path) -> None:
    """Write a video of one second, a manifest with one row, and the recipe."""
    with av.open(str(folder / "clip.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(10))
        stream.width, stream.height, stream.pix_fmt = 96, 96, "yuv420p"
        for shade in range(20, 220, 20):
            picture = np.full((96, 96, 3), shade, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    (folder / "manifest.csv").write_text("clip_id,video,start,stop\nclip,clip.mp4,0,1\n")
    (folder / "recipe.yaml").write_text(RECIPE)


def arranged(tree: Path, pid: int, notes: str) -> dict[str, str]:
    """Return the modules, those of the main thread first.

    Processes and threads run beside one another, so that only the order within one of them is
    the same every time. Whatever the main thread runs is counted there, then what the decode
    process runs, then what is left to the other threads, in the order of their names.
    """
    found: dict[str, dict[str, None]] = {"main": {}, "decode": {}, "thread": {}}
    for line in notes.splitlines():
        process, role, file = line.split("\t")
        path = Path(file).resolve().relative_to(tree)
        if path.with_suffix("").name not in FOUNDATION or len(path.parts) > 2:
            found[role if int(process) == pid else "decode"].setdefault(str(path))
    for path in sorted(found.pop("thread")):
        found.setdefault("thread", {})[path] = None
    passed: dict[str, str] = {}
    for role, paths in found.items():
        passed |= {path: role for path in paths if path not in passed}
    return passed


def first_sentence(path: Path) -> str:
    """Return the first line of a module's docstring."""
    return (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0]


if __name__ == "__main__":
    main()
