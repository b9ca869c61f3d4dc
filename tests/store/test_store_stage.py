"""Copies near the processor: whole or not there, used again, never without space."""

import json
import os
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from click.testing import CliRunner
from support.any_store import fill_store
from support.leftovers import leave

from karmma_pipeline.cli import main
from karmma_pipeline.data.loading.loader import LoaderSettings
from karmma_pipeline.data.loading.open import open_source
from karmma_pipeline.errors import KarmmaError, StoppedError, StoreError
from karmma_pipeline.jobs import StopFlag
from karmma_pipeline.store import FeatureStore, stage
from karmma_pipeline.store.format.layout import shard_file
from karmma_pipeline.store.tools.export import export
from karmma_pipeline.store.tools.rewrite import convert


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fill_store(tmp_path_factory.mktemp("stage") / "s")


def tree(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_a_copy_is_the_same_and_is_used_again(store: Path, tmp_path: Path) -> None:
    place = stage(store, tmp_path / "ssd")
    assert tree(place) == tree(store)
    before = shard_file(place, "rgb", 0).stat()
    assert stage(store, tmp_path / "ssd") == place
    assert shard_file(place, "rgb", 0).stat().st_ino == before.st_ino
    source = open_source(store, LoaderSettings(stage=tmp_path / "ssd"), torch.device("cpu"))
    assert source.path == place


def test_nothing_else_is_written_into_a_store(store: Path) -> None:
    before = tree(store)
    for place in (store, store / "x", store / "rgb" / ".." / "y"):
        for write in (
            stage,
            lambda s, to: export(s, to, "npy"),
            lambda s, to: convert(s, to / "z"),
        ):
            with pytest.raises(
                StoreError, match=r"is inside the feature store .*; choose another folder"
            ):
                write(store, place)
    assert tree(store) == before


def test_a_copy_that_was_cut_or_killed_is_mended(store: Path, tmp_path: Path) -> None:
    place = stage(store, tmp_path)
    shard_file(place, "rgb", 1).write_bytes(b"cut")
    (place / ".zarr.json.x.tmp").write_text("left by a kill")
    left = leave(place.with_name(f"{place.name}.verified"))
    assert stage(store, tmp_path) == place
    assert not left.exists()
    assert tree(place) == tree(store)


def flip(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read()[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))


def test_a_copy_in_which_a_byte_was_changed_is_copied_again(store: Path, tmp_path: Path) -> None:
    place = stage(store, tmp_path)
    path = shard_file(place, "rgb", 1)
    before = path.stat()
    flip(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert stage(store, tmp_path) == place
    assert tree(place) == tree(store)


def test_a_byte_that_flipped_on_the_disk_itself_is_found_when_asked(
    store: Path, tmp_path: Path
) -> None:
    place = stage(store, tmp_path)
    path = shard_file(place, "rgb", 1)
    flip(path)
    done = place.with_name(f"{place.name}.verified")
    record = json.loads(done.read_text())
    state = path.stat()
    record["files"][str(path.relative_to(place))] = [
        state.st_size,
        state.st_ino,
        state.st_ctime_ns,
    ]
    done.write_text(json.dumps(record))
    stage(store, tmp_path)
    assert tree(place) != tree(store)
    assert CliRunner().invoke(main, ["store", "stage", str(store), str(tmp_path)]).exit_code == 0
    assert tree(place) == tree(store)


def test_a_damaged_store_is_not_staged(store: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(store, tmp_path / "broken"))
    path = shard_file(broken, "rgb", 1)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(StoreError, match=r"the copy of .*broken is damaged.*padding"):
        stage(broken, tmp_path / "ssd")
    assert not list((tmp_path / "ssd").glob("karmma-*"))


class Disk(NamedTuple):
    f_bavail: int
    f_frsize: int = 4096
    f_files: int = 1000
    f_favail: int = 1000


@pytest.mark.parametrize(
    ("disk", "named"),
    [(Disk(1), r"4\.10kB free"), (Disk(10**9, f_favail=3), "3 inodes free")],
)
def test_without_space_or_inodes_nothing_is_begun(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, disk: Disk, named: str
) -> None:
    monkeypatch.setattr(os, "statvfs", lambda _: disk)
    with pytest.raises(StoreError, match=named):
        stage(store, tmp_path)
    assert not (tmp_path / f"karmma-{FeatureStore.open(store).digest[:16]}").exists()


def test_a_stop_keeps_what_is_copied(store: Path, tmp_path: Path) -> None:
    stop = StopFlag()
    stop.request()
    with pytest.raises(StoppedError, match="run the same command again"):
        stage(store, tmp_path, stop)
    assert tree(stage(store, tmp_path)) == tree(store)


def test_a_folder_that_is_a_file_is_one_sentence(store: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises((KarmmaError, OSError)):
        stage(store, tmp_path / "file")


def test_recipes_with_the_old_cache_node_are_staged_in_memory(
    caplog: pytest.LogCaptureFixture,
) -> None:
    settings = LoaderSettings.model_validate({"cache": "node"})
    assert (settings.cache, settings.stage) == ("map", Path("/dev/shm"))  # noqa: S108
    assert "loader.cache=node is now loader.stage=/dev/shm" in caplog.text
    both = LoaderSettings.model_validate({"cache": "node", "stage": "/scratch"})
    assert both.stage == Path("/scratch")


def test_where_everybody_may_write_nobody_elses_copy_is_used(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = stage(store, tmp_path)
    monkeypatch.setattr(os, "getuid", lambda: 12_345)
    assert stage(store, tmp_path) == place
    tmp_path.chmod(0o1777)
    with pytest.raises(StoreError, match="belongs to another user"):
        stage(store, tmp_path)
