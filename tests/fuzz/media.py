"""Mutates media files and runs ``karmma plan`` and ``karmma extract`` on them, tens at a time.

A mutant may cost its own clip, with a reason, never more: the exit code is what the share of lost
clips asks for, the store is whole, clips of sound files beside it keep their tokens, and nothing
is written but the store. From the repository:
``PYTHONPATH=.:tests python -m fuzz.media --seconds 60``.
"""

import argparse
import csv
import hashlib
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import wave
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
import yaml
from support.epic import write_annotations
from support.media_files import pack, write_flow, write_frames, write_video

from karmma_pipeline.extraction.recipe import FEW_CLIPS
from karmma_pipeline.modalities import Reason
from karmma_pipeline.store import FeatureStore, verify

LONGEST_S = 900.0
"""A run that takes longer hangs: a clip may take its time limit three times."""

MAX_FAILURES = 0.5
REPOSITORY = Path(__file__).parents[2]
NAME = "frame_{:010d}.jpg"
TOKENS = [
    *(b"\x00" * 4, b"\xff" * 4, b"\x7f\xff\xff\xff", b"\x80\x00\x00\x00", b"\x00\x00\x00\x01"),
    *(b"\xff\xd8\xff", b"\xff\xd9", b"\x1a\x45\xdf\xa3", b"RIFF", b"#EXTM3U\n", b"ffconcat "),
    *(b"../../../x\x00", b"/etc/hostname\x00", b"file:/dev/zero\x00", b"%s%n", b"9" * 11),
]
BOXES = (b"stsz", b"stts", b"ctts", b"stsc", b"stco", b"stsd", b"avcC", b"esds", b"elst", b"tkhd")
"""Places of an MP4 in which a byte changes much."""

RECIPE: dict[str, Any] = {
    "audio": {"sample_rate": 16000, "n_fft": 512, "win_length": 400, "mels": 32},
    "flow": {"preset": "ultrafast"},
    "sets": {
        "one": {
            "rgb": {"name": "s3d", "weights": "random:0", "frames": 8, "size": 32},
            "flow": {"name": "s3d", "weights": "random:1", "frames": 8, "size": 32},
            "audio": {"name": "resnet18", "weights": "random:2", "image": [32, 32]},
        }
    },
    "decode": {"workers": 1, "timeout_s": 60, "memory_gb": 1.5},
    "max_failures": MAX_FAILURES,
}


def write_originals(folder: Path) -> None:
    """Write a sound file of every kind that a manifest can name."""
    silent: dict[str, Any] = {"sound": False}
    write_video(folder / "a.mp4")
    write_video(folder / "front.mp4", index_first=True)
    write_video(folder / "variable.mp4", times=[0, 0.04, 0.5, 0.9, 1.4, 1.9])
    write_video(folder / "m.mkv")
    write_video(folder / "t.ts")
    write_video(folder / "w.webm", codec="libvpx-vp9", seconds=1.0, **silent)
    write_video(folder / "r.avi", codec="mpeg4", times=(np.arange(40) / 25).tolist(), **silent)
    write_video(folder / "p.mpg", codec="mpeg2video", times=(np.arange(40) / 25).tolist(), **silent)
    write_video(folder / "sound.m4a", video=False)
    with wave.open(str(folder / "sound.wav"), "wb") as out:
        out.setparams((1, 2, 16_000, 0, "NONE", ""))
        out.writeframes(np.zeros(32_000, np.int16).tobytes())
    (folder / "list.mp4").write_text(f"ffconcat version 1.0\nfile {folder / 'a.mp4'}\n")
    pictures = folder / "pictures"
    pack(write_frames(pictures / "rgb", range(1, 51)), folder / "rgb.tar")
    pack(write_flow(pictures / "uv", range(1, 51), (3.0, 1.0), bound_px=20), folder / "flow.tar")
    shutil.rmtree(pictures)


def mutate(data: bytes, draw: random.Random) -> bytes:
    """Change one to six places of a file, more often where its structure lies."""
    for _ in range(draw.randint(1, 6)):
        at, length = _place(data, draw), draw.choice([1, 4, 30, 500, len(data) // 3])
        token = draw.choice(TOKENS)
        noise = draw.randbytes(draw.choice([1, 4, 200]))
        data = draw.choice(
            [
                *([data[:at] + noise + data[at + len(noise) :]] * 3),
                data[:at] + token + data[at + len(token) :],
                data[:at] + token + data[at:],
                data[:at] + data[at + length :],
                data[: at + length] + data[at:],
                data[:at] + bytes(length) + data[at + length :],
                data[:at],
            ]
        )
    return data


def _place(data: bytes, draw: random.Random) -> int:
    """Return where to change a file: in its head, its tail, an MP4's tables, or anywhere."""
    size = len(data)
    at = data.find(draw.choice(BOXES))
    places = [draw.randint(0, size), draw.randint(0, min(size, 600)), max(0, size - 3000)]
    places[2] = draw.randint(places[2], size)
    return draw.choice([*places, at + draw.randint(4, 40)] if at >= 0 else places)


def write_clips(originals: Path, folder: Path, count: int, draw: random.Random) -> dict[str, Any]:
    """Write mutants, and a manifest of them and the originals; return the recipe's clips."""
    names = sorted(path.name for path in originals.iterdir())
    rows = [_row(f"fine_{name}", originals / name, originals) for name in names]
    for number in range(count):
        name = draw.choice(names)
        path = folder / f"{number}_{name}"
        path.write_bytes(mutate((originals / name).read_bytes(), draw))
        rows.append(_row(path.name, path, originals))
    draw.shuffle(rows)
    with (folder / "m.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    pictures = {"frame_name": NAME}
    return {"kind": "csv", "path": str(folder / "m.csv"), "pictures": pictures}


def _row(clip_id: str, path: Path, originals: Path) -> dict[str, Any]:
    """Return a line in which a file serves as all that it can be."""
    row = {"clip_id": clip_id, "video": path, "frames": "", "fps": "", "flow": path, "audio": path}
    if path.suffix == ".tar":
        kind = "flow" if "flow" in path.name else "frames"
        row |= {"flow": "", "audio": "", kind: path, "fps": 25, "video": originals / "a.mp4"}
    return {**row, "start": 0.1, "stop": 0.9, "act": "x", "split": "train"}


def write_epic(folder: Path, count: int, draw: random.Random) -> dict[str, Any]:
    """Write an EPIC-KITCHENS-100 of tars and an array of sound, ``count`` of them mutants."""
    root = folder / "EPIC"
    write_annotations(folder / "a")
    paths = [root / "EPIC-KITCHENS-100_audio.hdf5"]
    for video in ("P01_01", "P02_103", "P03_02"):
        place = root / video[:3]
        for kind in ("rgb", "flow"):
            (place / f"{kind}_frames").mkdir(parents=True, exist_ok=True)
            paths.append(place / f"{kind}_frames" / f"{video}.tar")
        pack(write_frames(folder / "rgb", range(1, 120)), paths[-2])
        pack(write_flow(folder / "uv", range(1, 120), (3.0, 1.0), bound_px=8), paths[-1])
    with h5py.File(paths[0], "w") as file:
        for video in ("P01_01", "P02_103", "P03_02"):
            file[video] = np.zeros(48_000, np.float32)
    for path in draw.sample(paths, min(count, len(paths))):
        path.write_bytes(mutate(path.read_bytes(), draw))
    splits = {"train": "EPIC_100_train.csv", "val": "EPIC_100_validation.csv"}
    values = {"root": str(root), "annotations": str(folder / "a"), "splits": splits}
    return {"kind": "epic_kitchens_100", **values}


class Batch:
    """One extraction: its own folders for home, temporary files and work, all watched."""

    def __init__(self, folder: Path, dataset: dict[str, Any]) -> None:
        self.folder, self.out = folder, folder / "out"
        self.recipe = folder / "recipe.yaml"
        self.recipe.write_text(yaml.safe_dump({**RECIPE, "dataset": dataset, "out": str(self.out)}))
        for name in ("home", "tmp", "cwd"):
            (folder / name).mkdir()

    def run(self) -> Counter[str]:
        """Plan and extract; return how many clips and modalities had which reason.

        Raises:
            AssertionError: a mutant did more than cost its own clip.
        """
        before = dict(self._files())
        plan = self._karmma("plan", "--no-calibrate")
        assert not self.out.exists(), "plan wrote the store"
        if plan == 1:  # the one array of all sounds is damaged, which is said before any work
            assert self._karmma("extract") == 1
            return Counter(["refused before any work"])
        code = self._karmma("extract")
        assert dict(self._files()) == before, "a file outside the store was written"
        store = FeatureStore.open(self.out / "one")
        reasons = np.asarray(store.reasons)
        faults = (reasons != Reason.PRESENT) & (reasons != Reason.NO_STREAM)
        lost = (faults & (reasons != Reason.NOT_IN_DATASET)).any(axis=1).mean()
        few = len(reasons) < FEW_CLIPS and lost < 1  # of which any number may be lost
        wanted = 3 if lost > MAX_FAILURES and not few else 0
        assert code == wanted, f"{lost:.0%} lost, exit code {code}"
        assert not (faulty := verify(self.out / "one")), faulty
        for column, modality in enumerate(store.modalities):
            there = torch.from_numpy(np.flatnonzero(reasons[:, column] == Reason.PRESENT))
            assert torch.isfinite(store.gather(modality, there).float()).all(), modality
        return Counter(Reason(code).name.lower() for code in reasons.ravel().tolist())

    def _karmma(self, command: str, *options: str) -> int:
        home = {"HOME": self.folder / "home", "TMPDIR": self.folder / "tmp"}
        home["PYTHONPATH"] = REPOSITORY  # not a copy that is installed
        environment = {**os.environ, **{k: str(v) for k, v in home.items()}}
        arguments = [
            sys.executable,
            "-m",
            "karmma_pipeline.cli",
            command,
            str(self.recipe),
            *options,
        ]
        with (self.folder / f"{command}.log").open("wb") as log:
            code = subprocess.run(
                arguments,
                cwd=self.folder / "cwd",
                env=environment,
                stdout=log,
                stderr=log,
                timeout=LONGEST_S,
                check=False,
            ).returncode
        text = (self.folder / f"{command}.log").read_text(errors="replace")
        assert "Traceback" not in text, text[-3000:]
        refused = code == 1 and "Error: " in text and "not an HDF5 file" in text
        assert code in {0, 3} or refused, f"exit code {code}: {text[-1000:]}"
        return code

    def _files(self) -> Iterator[tuple[Path, bytes]]:
        for path in self.folder.rglob("*"):
            ours = self.out in (path, *path.parents) or path.suffix == ".log"
            if path.is_file() and not ours:
                yield path, hashlib.sha256(path.read_bytes()).digest()

    def fine(self) -> dict[str, np.ndarray]:
        """Return the tokens of the originals, by clip and modality."""
        store, found = FeatureStore.open(self.out / "one"), {}
        for number, clip_id in enumerate(store.clip_ids):
            if clip_id.startswith(b"fine_"):
                for column, modality in enumerate(store.modalities):
                    if store.reasons[number, column] == Reason.PRESENT:
                        tokens = store.gather(modality, torch.tensor([number])).float().numpy()
                        found[f"{clip_id.decode()} {modality}"] = tokens
        return found


def check_fine(wanted: dict[str, np.ndarray], found: dict[str, np.ndarray]) -> None:
    """Raise AssertionError where an original has lost or changed its tokens."""
    assert wanted.keys() == found.keys(), wanted.keys() ^ found.keys()
    for name, tokens in wanted.items():
        assert np.allclose(tokens, found[name], rtol=1e-2, atol=1e-3), f"{name} has changed"


def main() -> int:
    """Run until the time or the count is over; 1 at the first failure, with its seed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60, help="no batch starts later")
    parser.add_argument("--count", type=int, default=sys.maxsize, help="mutants")
    parser.add_argument("--seed", type=int, default=0, help="of the first batch")
    parser.add_argument("--batch", type=int, default=40, help="mutants of one extraction")
    options = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="karmma-fuzz-"))
    (root / "originals").mkdir()
    write_originals(root / "originals")
    seen: Counter[str] = Counter()
    wanted: dict[str, np.ndarray] = {}
    end, seed, mutants = time.monotonic() + options.seconds, options.seed, 0
    while time.monotonic() < end and mutants < options.count:
        draw, folder = random.Random(seed), root / str(seed)
        folder.mkdir()
        count = min(options.batch, options.count - mutants)
        epic = seed % 4 == 1
        if epic:
            count = min(count, 5)
            dataset = write_epic(folder, count, draw)
        else:
            dataset = write_clips(root / "originals", folder, count, draw)
        batch = Batch(folder, dataset)
        try:
            seen += batch.run()
            if not epic:
                wanted = wanted or batch.fine()
                check_fine(wanted, batch.fine())
        except (AssertionError, subprocess.TimeoutExpired) as error:
            print(f"seed {seed} failed, its files are in {folder}\n{error}")
            return 1
        shutil.rmtree(folder)
        seed, mutants = seed + 1, mutants + count
    shutil.rmtree(root)
    print(", ".join(f"{name} {n}" for name, n in seen.most_common()))
    print(f"{mutants} mutants, no crash, no wrong exit code, no file outside the store")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
