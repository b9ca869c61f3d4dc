"""Stores made of stores: nothing is lost, and a stopped command goes on to the same bytes."""

import csv
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from support.any_store import IDS, fill_store, tokens_of

from karmma_pipeline.cli import main
from karmma_pipeline.errors import StoppedError, StoreError
from karmma_pipeline.jobs import StopFlag
from karmma_pipeline.store import FeatureStore, verify
from karmma_pipeline.store.tools.info import diff
from karmma_pipeline.store.tools.rewrite import convert, merge, select
from karmma_pipeline.store.tools.stage import decompress

POOLED = {"token_grid": [2, 2, 2], "raw_grid": [4, 7, 7]}
AS_IT_CAME = {"token_grid": None, "raw_grid": [2, 2, 2]}


@pytest.fixture(scope="module", params=[POOLED, AS_IT_CAME], ids=["pooled", "whole"])
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("rewrite") / "s"
    return fill_store(place, modalities={"rgb": (8, 6)}, provenance=request.param)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fill_store(tmp_path_factory.mktemp("rewrite") / "p")


def tree(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def table(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def run(*words: object, code: int = 0) -> Result:
    result = CliRunner().invoke(main, ["store", *map(str, words)])
    assert result.exit_code == code, result.output
    return result


def test_split_and_merge_give_the_same_store_again(pair: Path, tmp_path: Path) -> None:
    run("split", pair, tmp_path / "parts", "--by", "group")
    parts = sorted((tmp_path / "parts").iterdir())
    assert [len(FeatureStore.open(part)) for part in parts] == [6, 6]
    run("merge", *parts, "--out", tmp_path / "merged")
    assert list(diff(pair, tmp_path / "merged")) == []
    (tmp_path / "ids").write_text("\n".join(IDS))
    run("split", tmp_path / "merged", tmp_path / "again", "--ids", tmp_path / "ids")
    assert tree(tmp_path / "again") == tree(pair)  # in the old order they are the old bytes


def test_merged_modalities_keep_reasons_and_times(tmp_path: Path) -> None:
    a = fill_store(tmp_path / "a", modalities={"rgb": (4, 6)}, absent=[("c02", "rgb")])
    b = fill_store(tmp_path / "b", modalities={"audio": (2, 5)})
    merge([a, b], tmp_path / "m")
    whole = fill_store(tmp_path / "w", absent=[("c02", "rgb"), ("c05", "audio")])
    assert tree(tmp_path / "m") == tree(whole)


def test_clips_that_are_not_there_are_named(pair: Path, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"lacks 1 of the clips: c99"):
        select(pair, tmp_path / "s", ["c01", "c99"])


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "int8"])
def test_a_converted_store_is_the_one_that_extraction_would_have_written(
    pair: Path, tmp_path: Path, dtype: str
) -> None:
    run("convert", pair, tmp_path / "c", "--dtype", dtype)
    found = FeatureStore.open(tmp_path / "c")
    one = found.specs["rgb"]
    assert one.dtype == dtype
    assert one.provenance == {"converted_from": "float16"}
    half = tokens_of("c07", "rgb", (4, 6)).astype(np.float16)
    wanted = one.decode(one.encode(half.astype(np.float32)))
    np.testing.assert_array_equal(found.gather("rgb", torch.tensor([7]))[0].float(), wanted)
    assert verify(tmp_path / "c") == []


def test_a_wider_type_and_back_is_lossless(pair: Path, tmp_path: Path) -> None:
    convert(pair, tmp_path / "wide", "float32")
    convert(tmp_path / "wide", tmp_path / "back", "float16")
    lines = list(diff(pair, tmp_path / "back"))
    assert all("provenance" in line for line in lines)  # it says where it came from
    assert not list(diff(pair, Path(shutil.copytree(pair, tmp_path / "copy"))))


def test_pooling_is_the_mean_over_blocks_of_the_grid(store: Path, tmp_path: Path) -> None:
    run("convert", store, tmp_path / "c", "--pool", "rgb=2,1,1", "--dtype", "float32")
    found = FeatureStore.open(tmp_path / "c")
    assert found.shape("rgb") == (2, 6)
    assert found.provenance["rgb"]["token_grid"] == [2, 1, 1]
    tokens = tokens_of("c03", "rgb", (8, 6)).astype(np.float16).astype(np.float64)
    wanted = np.stack([tokens[:4].mean(axis=0), tokens[4:].mean(axis=0)]).astype(np.float32)
    np.testing.assert_array_equal(found.gather("rgb", torch.tensor([3]))[0], wanted)
    result = run("convert", store, tmp_path / "d", "--pool", "rgb=2,2,3", code=1)
    assert "[2, 2, 2], which is not divisible by [2, 2, 3]" in result.output


def test_an_archive_of_an_older_program_gives_back_every_byte(tmp_path: Path) -> None:
    packed = Path(__file__).with_name("packed_by_8f5794a.tar.gz")
    with tarfile.open(packed) as archive:
        archive.extractall(tmp_path, filter="data")
    (tmp_path / "packed").rename(tmp_path / "a")
    run("convert", tmp_path / "a", tmp_path / "back")
    assert verify(tmp_path / "back") == []
    made = fill_store(tmp_path / "made", IDS[:3], absent=[("c01", "audio")], per_shard=2)
    assert tree(tmp_path / "back") == tree(made)
    target = tmp_path / "a/rgb/tokens/c/0/0.zst"
    data = bytearray(target.read_bytes())
    data[len(data) // 2] ^= 1
    target.write_bytes(data)
    result = run("convert", tmp_path / "a", tmp_path / "bad", code=1)
    assert "the archive is damaged" in result.output
    (tmp_path / "bad").mkdir(exist_ok=True)
    listed = json.loads((tmp_path / "a/archive.json").read_text())
    listed["files"]["../evil"] = {"bytes": 1, "sha256": ""}
    (tmp_path / "a/archive.json").write_text(json.dumps(listed))
    with pytest.raises(StoreError, match="is outside the store"):
        decompress(tmp_path / "a", tmp_path / "evil")


@pytest.mark.parametrize(
    "command",
    [
        lambda s, out, stop: merge([s], out, "same", stop),
        lambda s, out, stop: convert(s, out, "int8", None, stop),
    ],
)
def test_a_stopped_command_goes_on_to_the_same_bytes(
    pair: Path, tmp_path: Path, command: Callable[[Path, Path, StopFlag], object]
) -> None:
    command(pair, tmp_path / "whole", StopFlag())
    stops = 0
    for countdown in range(1, 40):
        try:
            command(pair, tmp_path / "stopped", StopAfter(countdown % 5))
        except StoppedError:
            stops += 1
        else:
            break
    if not (tmp_path / "stopped" / "manifest.json").is_file():
        command(pair, tmp_path / "stopped", StopFlag())
    assert stops
    assert tree(tmp_path / "stopped") == tree(tmp_path / "whole")


class StopAfter(StopFlag):
    def __init__(self, checks: int) -> None:
        super().__init__()
        self.left = checks

    def check(self, saved: str) -> None:
        self.left -= 1
        if self.left < 0:
            self.request()
        super().check(saved)


def test_diff_names_what_differs_and_where(pair: Path, tmp_path: Path) -> None:
    other = fill_store(tmp_path / "o", [*IDS[:-1], "c20"], split="test", absent=[])
    result = run("diff", pair, other, code=1)
    lines = result.output.splitlines()
    assert f"clips: 1 only in {pair}: c11" in lines
    assert f"clips: 1 only in {other}: c20" in lines
    assert "split: different in 11 clips, first c00: val and test" in lines
    assert "audio: reason: different in 1 clip, first c05: 2 and 0" in lines
    assert any(line.startswith("audio: tokens of 1 clip differ") for line in lines)
    assert "identical" in run("diff", pair, pair).output


def test_exported_files_hold_the_tokens(pair: Path, tmp_path: Path) -> None:
    wanted = tokens_of("c04", "rgb", (4, 6)).astype(np.float16)
    run("export", pair, tmp_path / "npy")
    np.testing.assert_array_equal(np.load(tmp_path / "npy/rgb/c04.npy"), wanted)
    assert not (tmp_path / "npy/audio/c05.npy").exists()
    rows = table(tmp_path / "npy/clips.csv")
    assert rows[5]["verb"] == "shut"
    assert (rows[5]["rgb"], rows[5]["audio"]) == ("1", "0")
    run("export", pair, tmp_path / "pt", "--layout", "pt")
    loaded = torch.load(tmp_path / "pt/rgb/c04.pt", weights_only=True)
    np.testing.assert_array_equal(loaded.numpy(), wanted)


def test_actionformer_and_tim_find_their_layouts(store: Path, tmp_path: Path) -> None:
    """Read as their own loaders do (actionformer_release epic_kitchens.py, TIM load_feats)."""
    tokens = tokens_of("c04", "rgb", (8, 6)).astype(np.float16).astype(np.float32)
    wanted = tokens.reshape(2, 4, 6).mean(axis=1)
    run("export", store, tmp_path / "af", "--layout", "actionformer")
    with np.load(tmp_path / "af/rgb/c04.npz") as data:
        np.testing.assert_array_equal(data["feats"], wanted)
    database = json.loads((tmp_path / "af/verb.json").read_text())["database"]
    assert database["c04"]["subset"] == "train"
    assert database["c04"]["annotations"] == [
        {"label": "open", "label_id": 0, "segment": [0.0, 2.0]}
    ]
    run("export", store, tmp_path / "tim", "--layout", "tim")
    features = np.load(tmp_path / "tim/rgb/train/c04.npy")
    np.testing.assert_array_equal(features, wanted[:, None])
    times = table(tmp_path / "tim/rgb_train_times.csv")
    spans = [(float(t["start_sec"]), float(t["stop_sec"])) for t in times if t["video_id"] == "c04"]
    assert spans == [(0, 1), (1, 2)]
