"""Extractions that are run again when files have come, changed or gone, or on `--retry`."""

import csv
import os
import shutil
import signal
from collections.abc import Callable, Iterable
from functools import cache, partial
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from support.forks import in_fork
from support.here_pool import HerePool
from support.media_files import write_video
from support.nth_call import kill_at_call

from karmma_pipeline.cli import main
from karmma_pipeline.extraction import pipeline
from karmma_pipeline.extraction.decode import pool
from karmma_pipeline.extraction.decode.worker import decode_clips
from karmma_pipeline.extraction.inference.networks import Networks
from karmma_pipeline.extraction.recipe import ExtractRecipe
from karmma_pipeline.extraction.types import DecodedClip
from karmma_pipeline.modalities import Reason
from karmma_pipeline.store import FeatureStore, verify

RECIPE: dict[str, Any] = {
    "manifest": "m.csv",
    "audio": {"front_end": "vggish", "n_fft": 512, "win_length": 400, "mels": 32},
    "sets": {
        "one": {
            "rgb": {"name": "s3d", "weights": "random:0", "frames": 8, "size": 32},
            "audio": {"name": "resnet18", "weights": "random:2", "image": [32, 32]},
        },
        "two": {"audio": {"name": "resnet18", "weights": "random:2", "image": [32, 32]}},
    },
    "store": {"clips_per_shard": 4},
    "batch_size": 2,
    "precision": "float32",
    "memory_format": "contiguous",
    "max_failures": 1.0,
}
STORES = ("one", "two")


@cache
def built() -> list[Networks]:
    return []


def networks(recipe: ExtractRecipe) -> Networks:
    """Build them once: all extractions here have the same."""
    if not built():
        built().append(Networks(recipe))
    return built()[0]


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five videos of two seconds, the third without sound."""
    folder = tmp_path_factory.mktemp("videos")
    for number in range(5):
        write_video(folder / f"v{number}.mkv", sound=number != 2, click_s=number / 3)
    return folder


@pytest.fixture
def folder(tmp_path: Path, videos: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder of an extraction of ten clips, two of each video."""
    return prepare(tmp_path, videos, monkeypatch)


@pytest.fixture(scope="module")
def whole(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What such an extraction leaves that nothing disturbed."""
    with pytest.MonkeyPatch.context() as patched:
        prepare(tmp_path_factory.mktemp("whole"), videos, patched)
        karmma()
        return contents()


def prepare(folder: Path, videos: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(pool, "DecodePool", HerePool)
    monkeypatch.setattr(pipeline, "Networks", networks)
    monkeypatch.chdir(folder)
    list_clips([(f"c{i}", f"v{i // 2}", i % 2, i % 2 + 1) for i in range(10)])
    for video in videos.iterdir():
        shutil.copy(video, folder)
    return folder


def list_clips(rows: Iterable[tuple[str, str, Any, Any]]) -> None:
    lines = [f"{clip},{video}.mkv,{a},{b},x,train" for clip, video, a, b in rows]
    Path("m.csv").write_text("\n".join(["clip_id,video,start,stop,verb,split", *lines]) + "\n")


def karmma(*arguments: str, out: str = "out", code: int = 0, command: str = "extract") -> str:
    Path(f"{out}.yaml").write_text(yaml.safe_dump({**RECIPE, "out": out}))
    result: Result = CliRunner().invoke(main, [command, f"{out}.yaml", *arguments])
    assert result.exit_code == code, result.output
    return result.output + str(result.exception or "")


def contents(out: str = "out") -> dict[str, bytes]:
    found = {
        str(p): p.read_bytes() for name in STORES for p in Path(out, name).rglob("*") if p.is_file()
    }
    found["failures"] = Path(out, "failures.csv").read_bytes()
    found["media"] = Path(out, "media.csv").read_bytes()
    return {name.removeprefix(out): data for name, data in found.items()}


def inodes(out: str = "out") -> dict[str, int]:
    """Files of the shards, and which they are."""
    return {str(p): p.stat().st_ino for p in Path(out).glob("*/*/tokens/c/*/0")}


def reasons(out: str = "out") -> dict[str, str]:
    with Path(out, "failures.csv").open(newline="") as file:
        return {f"{r['clip_id']} {r['modality']}": r["reason"] for r in csv.DictReader(file)}


def half_download(folder: Path) -> Callable[[], None]:
    """Leave one file missing, one half there and one damaged; return what completes them."""
    whole = {name: (folder / name).read_bytes() for name in ("v1.mkv", "v2.mkv", "v4.mkv")}
    (folder / "v1.mkv").unlink()
    (folder / "v2.mkv").write_bytes(b"<html>not yet")
    (folder / "v4.mkv").write_bytes(whole["v4.mkv"][: len(whole["v4.mkv"]) // 2])

    def complete() -> None:
        for name, data in whole.items():
            (folder / name).write_bytes(data)

    return complete


def test_a_disk_that_is_too_small_is_said_before_the_first_clip(
    folder: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = {"rgb": 1 * 1024, "audio": 1 * 512}  # of s3d and resnet18 at this size, float16
    needed = 2 * (10 * tokens["rgb"] + 2 * 10 * tokens["audio"])

    def free(count: float) -> None:
        disk = SimpleNamespace(f_bavail=int(count), f_frsize=1, f_files=0, f_favail=0)
        monkeypatch.setattr(os, "statvfs", lambda _: disk)

    free(needed)  # leaves no room for anything else
    said = f"{folder}: 41.0kB needed, but only 41.0kB free; choose another folder"
    plan = partial(karmma, "--no-probe", "--no-calibrate", command="plan")
    assert said in karmma(code=1)
    planned = plan(code=1)
    assert (said in planned, "next: karmma extract" in planned) == (True, False)
    assert not (folder / "out").exists()
    free(1.2 * needed)
    assert "next: karmma extract" in plan()
    karmma()
    free(0)
    plan()
    karmma()  # nothing is left to do
    assert contents() == whole


def test_a_half_downloaded_set_that_is_completed_is_the_same_as_a_whole_one(
    folder: Path, whole: dict[str, bytes]
) -> None:
    complete = half_download(folder)
    karmma()
    assert {"c2 rgb", "c4 rgb", "c9 rgb"} <= reasons().keys()
    before = inodes()
    karmma()  # nothing has changed: nothing is done
    assert inodes() == before
    complete()
    assert "extracting 6 clips again: c2, c3, c4, c5, c8, ..." in karmma()
    assert contents() == whole
    assert all(verify(Path("out", name)) == [] for name in STORES)
    assert not any(inodes()[path] == inode for path, inode in before.items())


@pytest.mark.slow
def test_what_is_made_again_survives_kills(folder: Path, whole: dict[str, bytes]) -> None:
    complete = half_download(folder)
    karmma()
    complete()

    def killed(call: int) -> int:
        def work() -> None:
            kill_at_call(folder / "out", call)
            karmma()

        return in_fork(work)

    calls = next(n for n in count(20, 110) if killed(n) != -signal.SIGKILL)
    assert calls > 100
    karmma()
    assert contents() == whole


@pytest.mark.slow
def test_parts_make_their_own_shards_again_in_any_order(
    folder: Path, whole: dict[str, bytes]
) -> None:
    complete = half_download(folder)
    karmma("--part", "2/2")
    karmma("--part", "1/2")
    complete()
    for part in ("1/2", "2/2"):
        karmma("--part", part)
    assert contents() == whole


def test_tokens_stay_where_their_files_are_gone(folder: Path, whole: dict[str, bytes]) -> None:
    complete = half_download(folder)
    karmma()
    complete()
    (folder / "v0.mkv").unlink()
    (folder / "v3.mkv").unlink()
    karmma()
    assert contents() == whole
    karmma("--retry")
    assert contents() == whole


def test_what_was_mapped_stays_as_it_was(folder: Path) -> None:
    complete = half_download(folder)
    karmma()
    mapped = FeatureStore.open(Path("out/one"))
    everything = torch.arange(10)
    before = mapped.gather("rgb", everything).clone()
    complete()
    karmma()
    assert torch.equal(mapped.gather("rgb", everything), before)
    after = FeatureStore.open(Path("out/one"))
    changed = [
        clip
        for clip in range(10)
        if mapped.digest and after.present[clip].tolist() != mapped.present[clip].tolist()
    ]
    assert {2, 3, 4, 5, 9} <= {*changed}
    assert not torch.equal(after.gather("rgb", everything), before)


def test_only_what_is_asked_for_is_tried_again_where_files_are_the_same(
    folder: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:

    def failing(reason: Reason) -> Callable[..., list[DecodedClip]]:
        def decode(clips: Any, settings: Any) -> list[DecodedClip]:
            (clip,) = decode_clips(clips, settings)
            if clip.clip_id in {"c1", "c7"}:
                clip.reasons = dict.fromkeys(settings.inputs, reason)
                clip.arrays.clear()
            return [clip]

        return decode

    monkeypatch.setitem(globals(), "decode_clips", decode_clips)
    with monkeypatch.context() as patched:
        patched.setattr(
            HerePool,
            "batches",
            lambda self, plans: (
                (plan, [failing(Reason.TIMEOUT)([c], self.settings)[0] for c in plan.clips])
                for plan in plans
            ),
        )
        karmma()
    before = inodes()
    karmma()
    os.utime("v0.mkv", (1, 1))  # a time alone is no change
    karmma()
    karmma("--retry", "crashed", "decode_error")
    assert inodes() == before
    assert set(reasons().values()) == {"timeout", "no_stream"}
    karmma("--retry", "timeout", "crashed")
    assert contents() == whole


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--retry", "no_stream"], "no_stream: is permanent, so"),
        (["--retry=no_stream"], "is permanent, so"),
        (["--retry=slow"], "slow: is not a reason; allowed: file_missing, decode_error"),
    ],
)
def test_reasons_that_cannot_be_retried_are_named(
    folder: Path, arguments: list[str], said: str
) -> None:
    assert said in karmma(*arguments, code=2)


def test_a_file_that_was_replaced_by_another_is_named_and_nothing_is_done(folder: Path) -> None:
    karmma()
    before = contents()
    list_clips([(f"c{i}", f"v{4 if i == 3 else i // 2}", i % 2, i % 2 + 1) for i in range(10)])
    said = karmma(code=1)
    assert "v4.mkv (clip 'c3')" in said
    assert "--retry changed" in said
    assert contents() == before
    karmma("--retry", "changed")
    after = contents()
    karmma(out="fresh")
    assert after == contents("fresh")
    shutil.copy("v3.mkv", "v0.mkv")  # other bytes at the same path
    assert "v0.mkv (clip 'c0' and 1 more)" in karmma(code=1)
    assert contents() == after


def test_a_data_set_that_was_moved_is_the_same(folder: Path) -> None:
    karmma()
    before = inodes()
    for number in range(5):
        shutil.copy(f"v{number}.mkv", f"w{number}.mkv")
        (folder / f"v{number}.mkv").unlink()
    list_clips([(f"c{i}", f"w{i // 2}", i % 2, i % 2 + 1) for i in range(10)])
    karmma()
    assert inodes() == before


def test_a_list_that_grows_is_extracted_into_new_shards(folder: Path) -> None:
    karmma()
    before, shards = inodes(), FeatureStore.open(Path("out/one")).shard_digests
    rows = [(f"c{i}", f"v{i // 2}", i % 2, i % 2 + 1) for i in range(10)]
    list_clips([("first", "v0", 0.5, 1.5), *rows, ("last", "v3", 0, 2)])
    karmma("--part", "2/2")
    karmma("--part", "1/2")
    store = FeatureStore.open(Path("out/one"))
    assert [i.decode() for i in store.clip_ids] == [*(row[0] for row in rows), "first", "last"]
    assert {path: inode for path, inode in inodes().items() if path in before} == before
    assert store.shard_digests[:3] == shards
    list_clips(rows)
    assert "of the store, such as 'first'" in karmma(code=1)


def test_what_the_hints_advise_makes_the_reasons_go_away(folder: Path) -> None:
    still = write_video(folder / "still.mkv", times=[0.0], seconds=0.04)
    (folder / "page.mkv").write_text("<html>")
    (folder / "list.mkv").write_text("#EXTM3U\nfile:///etc/hostname\n")
    names = ("gone", "page", "list", "still", "v1", "v0")
    rows: list[tuple[str, str, Any, Any]] = [(f"c{i}", n, 0, 1) for i, n in enumerate(names)]
    rows[3], rows[4] = ("c3", "still", 5, 6), ("c4", "v1", 50, 51)
    list_clips(rows)
    karmma()
    assert {clip: reasons()[f"{clip} rgb"] for clip in ("c0", "c1", "c2", "c3", "c4")} == {
        "c0": "file_missing",
        "c1": "decode_error",
        "c2": "unsafe_file",
        "c3": "out_of_range",
        "c4": "out_of_range",
    }
    for name in ("gone", "page", "list"):
        shutil.copy("v3.mkv", f"{name}.mkv")
    shutil.copy("v4.mkv", still)
    rows[3], rows[4] = ("c3", "still", 0, 1), ("c4", "v1", 1, 2)
    list_clips(rows)
    karmma()
    assert reasons() == {}
    karmma(out="fresh")
    assert contents() == contents("fresh")
    rows[5] = ("c5", "v0", 0.5, 1.5)  # which has tokens
    list_clips(rows)
    assert "v0.mkv (clip 'c5')" in karmma(code=1)
