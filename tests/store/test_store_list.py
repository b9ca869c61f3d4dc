"""Lists of clips that grow: what was there stays, what came goes into new shards."""

import signal
import zlib
from collections.abc import Sequence
from itertools import count
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import zarr
from support.forks import in_fork
from support.nth_call import kill_at_call

from karmma_pipeline.errors import StoreError
from karmma_pipeline.store import (
    Catalog,
    ClipRow,
    FeatureStore,
    ModalitySpec,
    ShardWriter,
    StoreSpec,
    create_store,
    finalize,
    verify,
)
from karmma_pipeline.store.catalog import continue_list

OLD = {"d": "open", "b": "shut", "c": "open"}
NEW = {"d": "open", "a": "cut", "b": "shut", "longer_name": "open", "c": "open", "e": "cut"}
"""Clips and their classes, in the order of the list."""


def tokens_of(clip_id: str) -> np.ndarray:
    rng = np.random.default_rng(zlib.crc32(clip_id.encode()))
    return rng.normal(size=(2, 3)).astype(np.float16)


def list_clips(root: Path, clips: dict[str, str], start_s: float = 0.0) -> None:
    """Do what an extraction does at its start."""
    names = tuple(sorted(set(clips.values())))
    rows = [ClipRow(i, {"verb": names.index(v)}, "train", "P1", start_s) for i, v in clips.items()]
    whole = continue_list([root], {"verb": names}, rows)
    rgb = ModalitySpec(tokens=2, width=3, frames=1)
    spec = StoreSpec(modalities={"rgb": rgb}, heads=whole.heads, clips_per_shard=2)
    create_store(root, spec, whole.rows, whole.grown_from)


def fill(root: Path) -> FeatureStore:
    catalog = Catalog(root)
    for shard in sorted(set(range(catalog.shards)) - catalog.committed()):
        with ShardWriter(root, shard) as writer:
            for clip_id in writer.clip_ids[writer.next :]:
                writer.append(clip_id, {"rgb": tokens_of(clip_id)}, {}, {})
            writer.commit()
    finalize(root)
    return FeatureStore.open(root)


def contents(root: Path, pattern: str = "**/*") -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.glob(pattern) if p.is_file()}


def ids(store: FeatureStore) -> list[str]:
    return [clip_id.decode() for clip_id in store.clip_ids]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    list_clips(tmp_path / "s", OLD)
    fill(tmp_path / "s").close()
    return tmp_path / "s"


def test_what_a_list_grows_by_lies_in_new_shards_behind_the_old(root: Path) -> None:
    before, shards = FeatureStore.open(root), contents(root, "rgb/tokens/c/*/*")
    digests = before.shard_digests, before.clip_digests
    list_clips(root, NEW)
    with pytest.raises(StoreError, match="not complete"):
        FeatureStore.open(root)
    store = fill(root)
    assert ids(store) == ["d", "b", "c", "a", "longer_name", "e"]
    assert store.heads == {"verb": ("open", "shut", "cut")}
    assert store.labels["verb"].tolist() == [0, 1, 0, 2, 0, 2]
    assert {k: v for k, v in contents(root).items() if k in shards} == shards
    assert len(store.shard_digests) == 4
    assert store.shard_digests[:2] == digests[0]
    assert (store.clip_digests[:3] == digests[1]).all()
    assert verify(root) == []
    wanted = np.stack([tokens_of(clip_id) for clip_id in ids(store)])
    found = store.gather("rgb", torch.arange(6))
    np.testing.assert_array_equal(found.numpy(), wanted)
    start = store._catalog.column("start_rgb", "<i8")
    with h5py.File(root / "index.h5") as index:
        for rows in (zarr.open_group(root, mode="r")["rgb/tokens"], index["rgb/tokens"]):
            read = np.stack([rows[s : s + 2] for s in start.tolist()])  # type: ignore[index, misc]
            np.testing.assert_array_equal(read, wanted)


def test_a_list_may_grow_again_and_before_the_first_part_is_done(tmp_path: Path) -> None:
    root = tmp_path / "s"
    list_clips(root, OLD)
    list_clips(root, {**OLD, "a": "cut"})
    list_clips(root, NEW)
    store = fill(root)
    assert ids(store) == ["d", "b", "c", "a", "longer_name", "e"]
    assert [len(Catalog(root).shard_range(shard)) for shard in range(4)] == [2, 1, 1, 2]
    list_clips(root, NEW)  # the same: nothing to do
    assert verify(root) == []


@pytest.mark.slow
def test_a_list_that_grows_survives_a_kill_at_every_call(root: Path, tmp_path: Path) -> None:
    undisturbed = tmp_path / "undisturbed"
    list_clips(undisturbed, OLD)
    fill(undisturbed)
    list_clips(undisturbed, NEW)
    fill(undisturbed)

    def killed(call: int) -> int:
        def grow() -> None:
            kill_at_call(root, call)
            list_clips(root, NEW)

        return in_fork(grow)

    calls = next(n for n in count(1, 4) if killed(n) != -signal.SIGKILL)
    assert calls > 10
    list_clips(root, NEW)
    fill(root)
    assert contents(root) == contents(undisturbed)


@pytest.mark.parametrize(
    ("clips", "named"),
    [
        ({"d": "open", "b": "shut"}, r"no longer lists 1 clip of the store, such as 'c'"),
        ({**OLD, "b": "open"}, r"clip 'b': verb was 1, now 0"),
        ({**NEW, "c": "shut"}, r"clip 'c': verb was 0, now 1"),
    ],
)
def test_rows_that_are_gone_or_changed_are_named(
    root: Path, clips: dict[str, str], named: str
) -> None:
    before = contents(root)
    with pytest.raises(StoreError, match=named):
        list_clips(root, clips)
    assert contents(root) == before


@pytest.mark.parametrize("counts", [[0], [2, 2], [3, 1], [9], [-1]])
def test_a_list_that_cannot_have_grown_like_this_is_refused(
    root: Path, counts: Sequence[int]
) -> None:
    path = root / "spec.json"
    text = path.read_text()
    lists = ", ".join(f'{{"clips": {n}}}' for n in counts)
    path.write_text(text.replace("{", f'{{"grown_from": [{lists}],', 1))
    with pytest.raises(StoreError, match="implausible"):
        Catalog(root)
