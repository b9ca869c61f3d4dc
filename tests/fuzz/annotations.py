"""Mutates annotation files of every data set and runs ``karmma plan`` on each.

A mutant may be read or refused, never more: exit code 0, 1 or 3, one sentence, no new file.
From the repository: ``PYTHONPATH=.:tests python -m fuzz.annotations --seconds 60``.
"""

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from click.testing import CliRunner
from support.epic import touch, write_annotations

from karmma_pipeline.cli import main as karmma

ALLOWED = {0, 1, 3}
TOKENS = [
    *(
        b"",
        b"\x00",
        b"\xff\xfe",
        b"\xef\xbb\xbf",
        b'"',
        b"''",
        b",",
        b"\n",
        b"\r\n",
        b"{",
        b"[",
        b"]",
    ),
    *(b"-1", b"9" * 400, b"1e999", b"NaN", b"Infinity", b"null", b"true", b"{}", b"[]", b"\\u0000"),
    *(b"../../x", b"/", b"-rf", b"a:b", b"P01_01_0", b"00:00:99", b"99999999:00:00", b"\xc3\xa9"),
    b"[" * 3000,
]


def epic(folder: Path) -> dict[str, Any]:
    """Write a small EPIC-KITCHENS-100."""
    write_annotations(folder / "a")
    touch(folder, "EPIC/P01/rgb_frames/P01_01.tar")
    splits = {"train": "EPIC_100_train.csv", "val": "EPIC_100_validation.csv"}
    splits["test"] = "EPIC_100_test_timestamps.csv"
    values = {"root": str(folder / "EPIC"), "annotations": str(folder / "a"), "splits": splits}
    return {"kind": "epic_kitchens_100", **values}


def something(folder: Path) -> dict[str, Any]:
    """Write a small Something-Something V2 with boxes."""
    (folder / "a").mkdir()
    labels = {"Holding something": "0", "Closing something": "1"}
    rows = [{"id": "7", "template": "Holding [something]", "placeholders": ["potato"]}]
    box = {"x1": 1.5, "y1": 2, "x2": 30, "y2": 40}
    frame = {"name": "7/0001.jpg", "labels": [{"box2d": box, "standard_category": "hand"}]}
    tables = {"labels": labels, "train": rows, "validation": [{"id": "8"}], "b": {"7": [frame]}}
    for name, table in tables.items():
        (folder / "a" / f"{name}.json").write_text(json.dumps(table))
    values = {"root": str(folder), "annotations": str(folder / "a")}
    return {"kind": "something_something_v2", "boxes": [str(folder / "a" / "b.json")], **values}


def ego4d(folder: Path) -> dict[str, Any]:
    """Write a small Ego4D."""
    (folder / "a").mkdir()
    row = {"video_uid": "v-1", "clip_uid": "c-1", "clip_parent_start_sec": 300.0, "action_idx": 4}
    row |= {"action_clip_start_sec": 7.5, "action_clip_end_sec": 15.5, "verb_label": 1}
    row |= {"noun_label": 0}
    tables = {
        "fho_lta_taxonomy": {"verbs": ["arrange", "cut"], "nouns": ["apple"]},
        "fho_lta_train": {"clips": [row, {**row, "action_idx": 5}]},
        "fho_lta_val": {"clips": [{**row, "clip_uid": "c-2"}]},
    }
    for name, table in tables.items():
        (folder / "a" / f"{name}.json").write_text(json.dumps(table))
    return {"kind": "ego4d_fho_lta", "root": str(folder), "annotations": str(folder / "a")}


def keysteps(folder: Path) -> dict[str, Any]:
    """Write a small Ego-Exo4D."""
    (folder / "a").mkdir()
    segment = {"start_time": 0.5, "end_time": 33.25, "step_unique_id": 843}
    for split in ("train", "val"):
        take = {"take_name": f"lab_{split}", "segments": [segment, segment]}
        table = {"annotations": {"77": take}, "vocabulary": {"843": "Unbox", "901": "Check"}}
        (folder / "a" / f"keystep_{split}.json").write_text(json.dumps(table))
    return {"kind": "ego_exo4d_keysteps", "root": str(folder), "annotations": str(folder / "a")}


def table(folder: Path) -> dict[str, Any]:
    """Write a CSV with every optional column."""
    (folder / "a").mkdir()
    (folder / "a" / "m.csv").write_text(
        "clip_id,video,video_stream,frames,fps,flow,audio,audio_stream,start,stop,verb,split,group\n"
        "a,v.mp4,1,,,,s.wav,0,00:00:01.5,4,open,train,p\n"
        'b,,,f,25,flow.tar,,,0,2.5,"put, down",val,p\n'
    )
    return {"kind": "csv", "path": str(folder / "a" / "m.csv")}


DATASETS: list[Callable[[Path], dict[str, Any]]] = [epic, something, ego4d, keysteps, table]
RECIPE = {
    "out": "never-made",
    "sets": {"one": {"rgb": {"name": "resnet18", "weights": "random:0", "image": [32, 32]}}},
}


def mutate(data: bytes, draw: random.Random) -> bytes:
    """Change one to four places of a file."""
    for _ in range(draw.randint(1, 4)):
        at, length = draw.randint(0, len(data)), draw.randint(0, 30)
        token = draw.choice(TOKENS)
        data = draw.choice(
            [
                data[:at] + token + data[at:],
                data[:at] + token + data[at + length :],
                data[:at] + data[at + length :],
                data[: at + length] + data[at:],
                data[:at],
                data[:at] + bytes(draw.randrange(256) for _ in range(3)) + data[at + 3 :],
                _swapped(data, draw),
            ]
        )
    return data


def _swapped(data: bytes, draw: random.Random) -> bytes:
    """Put one cell or value of the file in the place of another."""
    parts = data.replace(b"\n", b",").split(b",")
    return data.replace(draw.choice(parts) or b",", draw.choice(parts), 1)


def run(seed: int, folder: Path) -> tuple[str, int]:
    """Make one mutant, plan it; return its data set and exit code.

    Raises:
        AssertionError: something else happened than reading or refusing.
    """
    draw = random.Random(seed)
    make = draw.choice(DATASETS)
    recipe = {"dataset": make(folder), **RECIPE}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    victim = draw.choice(sorted((folder / "a").iterdir()))
    victim.write_bytes(mutate(victim.read_bytes(), draw))
    before = set(folder.rglob("*"))
    arguments = ["plan", str(folder / "recipe.yaml"), "--no-probe", "--no-calibrate"]
    result = CliRunner().invoke(karmma, arguments)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise AssertionError("".join(traceback.format_exception(result.exception)))
    assert result.exit_code in ALLOWED, f"exit code {result.exit_code}: {result.output}"
    if result.exit_code == 1:
        last = result.output.strip().splitlines()[-1]
        assert last.startswith("Error: "), result.output
        assert last.endswith("."), result.output
        assert "/a" in last, f"the file is not named: {last}"
    assert set(folder.rglob("*")) == before, "a file was written"
    assert not Path("never-made").exists(), "the output folder was made"
    return make.__name__, result.exit_code


def main() -> int:
    """Run until the time or the count is over; 1 at the first failure, with its seed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--count", type=int, default=sys.maxsize)
    parser.add_argument("--seed", type=int, default=0, help="of the first mutant")
    options = parser.parse_args()
    seen: Counter[tuple[str, int]] = Counter()
    end = time.monotonic() + options.seconds
    seed = options.seed
    while time.monotonic() < end and seed - options.seed < options.count:
        folder = Path(tempfile.mkdtemp(prefix="karmma-fuzz-"))
        try:
            seen[run(seed, folder)] += 1
        except AssertionError as error:
            print(f"seed {seed} failed, its files are in {folder}\n{error}")
            return 1
        shutil.rmtree(folder)
        seed += 1
    for (name, code), count in sorted(seen.items()):
        print(f"{name:12} exit code {code}: {count}")
    print(f"{seed - options.seed} mutants, no crash, no wrong exit code, no file written")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
