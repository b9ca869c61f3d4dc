"""Stores by somebody who means harm: refused by name, and no other file is read."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from support.any_store import fill_store

from karmma_pipeline import files
from karmma_pipeline.errors import StoreError
from karmma_pipeline.store import FeatureStore, StoreSpec, create_store, finalize, verify
from karmma_pipeline.store.catalog import Catalog
from karmma_pipeline.store.format.hdf5_safety import index_faults, shard_faults
from karmma_pipeline.store.format.layout import PAYLOAD_OFFSET, shard_file

SECRET = b"the user's private key, long enough to be tokens of a clip or two of this store"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fill_store(tmp_path_factory.mktemp("whole") / "s")


@pytest.fixture
def store(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "s"))


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    (tmp_path / "secret").write_bytes(SECRET * 1000)
    return tmp_path / "secret"


def external(file: h5py.File, secret: Path) -> None:
    file.create_dataset("tokens", (32, 6), "<f2", external=[(str(secret), 0, 384)])


def external_link(file: h5py.File, secret: Path) -> None:
    with h5py.File(secret.with_suffix(".h5"), "w") as other:
        other["x"] = np.zeros((32, 6), np.float16)
    file["tokens"] = h5py.ExternalLink(str(secret.with_suffix(".h5")), "x")


def soft_link(file: h5py.File, secret: Path) -> None:
    file["tokens"] = h5py.SoftLink("/anything")


def virtual(file: h5py.File, secret: Path) -> None:
    layout = h5py.VirtualLayout((32, 6), "<f2")
    layout[:] = h5py.VirtualSource(str(secret), "x", (32, 6))
    file.create_virtual_dataset("tokens", layout)


@pytest.mark.parametrize(
    ("attack", "named"),
    [
        (external, "external storage"),
        (external_link, "ExternalLink"),
        (soft_link, "SoftLink"),
        (virtual, "virtual dataset"),
    ],
)
def test_a_shard_that_points_elsewhere_is_named_and_never_followed(
    store: Path, secret: Path, attack: Callable[[h5py.File, Path], None], named: str
) -> None:
    array = Catalog(store).spec.modalities["rgb"].arrays[0]
    path = shard_file(store, "rgb", 0)
    honest = path.read_bytes()
    with h5py.File(store.parent / "evil.h5", "w", userblock_size=4096) as file:
        attack(file, secret)
    faults = " ".join(shard_faults(store.parent / "evil.h5", array, 32))
    assert named in faults
    # put the hostile header in front of tokens: the reader maps fixed offsets, whatever it says
    evil = (store.parent / "evil.h5").read_bytes()[:PAYLOAD_OFFSET].ljust(PAYLOAD_OFFSET, b"\0")
    path.write_bytes(evil + honest[PAYLOAD_OFFSET:])
    read = FeatureStore.open(store).gather("rgb", torch.arange(8)).numpy()
    assert SECRET[:6] not in read.tobytes()
    assert any(d.shard == 0 and d.modality == "rgb" for d in verify(store))


def test_an_index_over_other_files_is_named(store: Path, secret: Path) -> None:
    catalog = Catalog(store)
    with h5py.File(store / "index.h5", "r+") as file:
        del file["rgb/tokens"]
        virtual(file.require_group("rgb"), secret)
    faults = " ".join(index_faults(store / "index.h5", catalog.spec, catalog.shards))
    assert "virtual dataset" in faults
    assert str(secret) in faults
    assert verify(store)


def link_file(store: Path, secret: Path) -> None:
    path = shard_file(store, "rgb", 0)
    secret.write_bytes(path.read_bytes())
    path.unlink()
    path.symlink_to(secret)


def link_folder(store: Path, secret: Path) -> None:
    folder = shard_file(store, "rgb", 0).parent
    shutil.copytree(folder, secret.parent / "folder")
    shutil.rmtree(folder)
    folder.symlink_to(secret.parent / "folder")


def link_column(store: Path, secret: Path) -> None:
    path = store / "clips/label_verb/c/0"
    secret.write_bytes(path.read_bytes())
    path.unlink()
    path.symlink_to(secret)


def fifo(store: Path, secret: Path) -> None:
    path = shard_file(store, "rgb", 0)
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("attack", [link_file, link_folder, link_column, fifo])
def test_links_and_pipes_are_refused(
    store: Path, secret: Path, attack: Callable[[Path, Path], None]
) -> None:
    attack(store, secret)
    with pytest.raises(StoreError, match="link or not a regular file"):
        FeatureStore.open(store).gather("rgb", torch.arange(8))
    assert any("link or not a regular file" in str(d) for d in verify(store))


def test_a_linked_folder_above_the_store_is_the_users_own(store: Path) -> None:
    (store.parent / "link").symlink_to(store.parent)
    assert len(FeatureStore.open(store.parent / "link" / "s").gather("rgb", torch.arange(2))) == 2


def edit_spec(store: Path, change: Callable[[dict[str, Any]], None]) -> None:
    spec = json.loads((store / "spec.json").read_text())
    change(spec)
    files.write_json(store / "spec.json", spec)


@pytest.mark.parametrize(
    ("keys", "value", "named"),
    [
        (("clips",), 10**15, "implausible"),
        (("clips",), -1, "implausible"),
        (("clips",), 13, "bytes, not"),
        (("id_bytes",), 10**9, "implausible"),
        (("spec", "modalities", "rgb", "tokens"), 10**6, "bytes, not"),
        (("spec", "modalities", "rgb", "width"), 10**6, "bytes, not"),
        (("spec", "modalities", "rgb", "tokens"), 10**9, "less than or equal"),
        (("spec", "clips_per_shard"), 1, "bytes, not"),
        (("spec", "modalities", "../../evil"), {"tokens": 1, "width": 1}, "use 1 to"),
    ],
)
def test_implausible_and_wrong_shapes_are_refused(
    store: Path, keys: tuple[str, ...], value: object, named: str
) -> None:
    def change(spec: dict[str, Any]) -> None:
        for key in keys[:-1]:
            spec = spec[key]
        spec[keys[-1]] = value

    edit_spec(store, change)
    with pytest.raises(StoreError, match=named):
        FeatureStore.open(store).gather("rgb", torch.arange(8))


def test_a_store_of_a_newer_format_says_what_to_do(store: Path) -> None:
    edit_spec(store, lambda s: s.update(version=7))
    spec = StoreSpec.model_validate(json.loads((store / "spec.json").read_text())["spec"])
    newer = r"newer version \(store format 7; .*up to 6\); update"
    for touch in (FeatureStore.open, finalize, verify, lambda root: create_store(root, spec, [])):
        with pytest.raises(StoreError, match=newer):
            touch(store)
    edit_spec(store, lambda s: s.update(version=1))
    with pytest.raises(StoreError, match="version 1 was never released"):
        FeatureStore.open(store)


def test_a_store_without_a_version_is_of_the_oldest(store: Path) -> None:
    edit_spec(store, lambda s: s.pop("version"))
    assert len(FeatureStore.open(store).gather("rgb", torch.arange(2))) == 2


def test_values_too_many_for_one_clip_are_refused(store: Path) -> None:
    edit_spec(store, lambda s: s["spec"]["modalities"]["rgb"].update(tokens=10**6, width=10**6))
    with pytest.raises(StoreError, match="values per clip"):
        FeatureStore.open(store)


@pytest.mark.parametrize(
    ("column", "value", "named"),
    [("label_verb", 2, "head verb"), ("label_verb", -2, "head verb"), ("split", 9, "split")],
)
def test_a_label_beyond_its_classes_is_refused(
    store: Path, column: str, value: int, named: str
) -> None:
    path = store / f"clips/{column}/c/0"
    codes = np.fromfile(path, "<i4")
    codes[3] = value
    path.write_bytes(codes.tobytes())
    with pytest.raises(StoreError, match=named):
        _ = FeatureStore.open(store).split


def test_an_unknown_reason_is_refused(store: Path) -> None:
    path = store / "clips/reason/c/0/0"
    path.write_bytes(b"\xff" * path.stat().st_size)
    with pytest.raises(StoreError, match="unknown reason 255"):
        FeatureStore.open(store)


def test_a_huge_small_file_is_not_read(store: Path) -> None:
    with (store / "spec.json").open("r+b") as file:
        file.truncate(1 << 40)  # sparse
    with pytest.raises(StoreError, match="larger than 64 MB"):
        FeatureStore.open(store)


def test_a_zarr_hole_is_an_error_and_not_zeros(store: Path) -> None:
    path = shard_file(store, "rgb", 0)
    with path.open("r+b") as file:
        file.write(b"\xff" * 16)  # the index says that the chunk was never written
    assert any("Zarr index" in str(d) for d in verify(store))
    path.unlink()
    with pytest.raises(StoreError, match="missing"):
        FeatureStore.open(store).gather("rgb", torch.arange(8))


def test_spec_that_is_no_object_or_too_deep_is_one_sentence(store: Path) -> None:
    for text in ("[]", "{", "[" * 100_000, '{"format": 1}', "\0"):
        (store / "spec.json").write_text(text)
        with pytest.raises(StoreError):
            FeatureStore.open(store)


def test_finalize_takes_up_no_foreign_column(store: Path) -> None:
    (store / "clips/evil").mkdir()
    (store / "clips/evil/zarr.json").write_text('{"shape": [1], "data_type": "object"}')
    (store / "manifest.json").unlink()
    finalize(store)
    with h5py.File(store / "index.h5") as file:
        assert "evil" not in file["clips"]
