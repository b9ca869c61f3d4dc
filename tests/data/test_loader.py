import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from support.tiny_store import write_store

from karmma_pipeline.data.loading.loader import Batch, FeatureLoader
from karmma_pipeline.errors import StoreError
from karmma_pipeline.store import FeatureStore
from karmma_pipeline.store.format.layout import PAYLOAD_OFFSET, shard_file


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    return FeatureStore.open(write_store(tmp_path_factory.mktemp("loader") / "s", clips=50))


def flat(batches: Iterator[Batch]) -> list[tuple[list[int], list[list[bool]], float]]:
    return [
        (
            b.clip_index.tolist(),
            b.mask.tolist(),
            float(sum(t.float().sum() for t in b.tokens.values())),
        )
        for b in batches
    ]


@pytest.mark.parametrize("threads", [1, 4])
def test_batches_do_not_depend_on_the_number_of_threads(store: FeatureStore, threads: int) -> None:
    def load(n: int) -> list[tuple[list[int], list[list[bool]], float]]:
        return flat(FeatureLoader(store, range(50), 8, p=0.5, shuffle=True, threads=n).epoch(3))

    assert load(threads) == load(0)
    assert len(load(0)) == 7


def test_every_clip_comes_once_and_each_epoch_has_its_order_and_masks(store: FeatureStore) -> None:
    loader = FeatureLoader(store, range(50), 8, p=0.5, shuffle=True)
    first, second = flat(loader.epoch(0)), flat(loader.epoch(1))
    for epoch in (first, second):
        assert sorted(i for clips, *_ in epoch for i in clips) == list(range(50))
    assert first != second
    assert flat(loader.epoch(0)) == first


def test_an_epoch_goes_on_in_the_middle_exactly(store: FeatureStore) -> None:
    loader = FeatureLoader(store, range(50), 8, p=0.5, shuffle=True)
    assert flat(loader.epoch(2, start_batch=4)) == flat(loader.epoch(2))[4:]


def gathering() -> list[str]:
    """The threads of loaders; other tests of this process may have left some of their own."""
    return [one.name for one in threading.enumerate() if one.name.startswith("loader")]


@pytest.mark.parametrize("threads", [0, 2])
def test_what_is_gathered_before_its_epoch_is_the_same_or_dropped(
    store: FeatureStore, threads: int
) -> None:
    loader = FeatureLoader(store, range(50), 8, p=0.5, shuffle=True, threads=threads)
    wanted = [flat(loader.epoch(epoch)) for epoch in range(3)]
    loader.prefetch(1)
    assert bool(gathering()) == (threads > 0)  # it has begun
    assert flat(loader.epoch(1)) == wanted[1]
    loader.prefetch(1)
    assert flat(loader.epoch(2)) == wanted[2]  # another one was wanted
    loader.prefetch(1)
    assert flat(loader.epoch(1, start_batch=4)) == wanted[1][4:]
    loader.prefetch(0)
    loader.close()
    assert not gathering()
    assert flat(loader.epoch(0)) == wanted[0]


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_each_batch_without_repeating_a_clip(
    store: FeatureStore, world_size: int
) -> None:
    whole = flat(FeatureLoader(store, range(50), 8, p=0.5, shuffle=True).epoch(0))
    ranks = [
        FeatureLoader(store, range(50), 8, p=0.5, shuffle=True, rank=r, world_size=world_size)
        for r in range(world_size)
    ]
    for (clips, masks, _), *parts in zip(whole, *(flat(r.epoch(0)) for r in ranks), strict=True):
        mask_of = dict(zip(clips, masks, strict=True))
        assert sorted(clips) == sorted(i for part in parts for i in part[0])
        for part_clips, part_masks, _ in parts:
            assert [mask_of[i] for i in part_clips] == part_masks


def test_what_is_absent_is_masked_and_labels_belong_to_their_clips(store: FeatureStore) -> None:
    for batch in FeatureLoader(store, range(50), 16, p=0.6, shuffle=True).epoch(0):
        index = batch.clip_index.numpy()
        np.testing.assert_array_equal(batch.present.numpy(), store.present[index])
        assert not (batch.mask & ~batch.present).any()
        assert batch.mask.any(dim=1).all()
        np.testing.assert_array_equal(batch.labels["verb"].numpy(), store.labels["verb"][index])
        wanted = store.gather("rgb", batch.clip_index)
        assert torch.equal(batch.tokens["rgb"], wanted)


def test_an_error_in_the_thread_reaches_the_consumer(
    store: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise OSError("gone")

    monkeypatch.setattr(FeatureStore, "gather_parts", broken)
    with pytest.raises(OSError, match="gone"):
        list(FeatureLoader(store, range(50), 8).epoch(0))


def test_a_store_pickles_as_its_path(store: FeatureStore) -> None:
    import pickle

    data = pickle.dumps(store)
    assert len(data) < 1000
    again: FeatureStore = pickle.loads(data)  # noqa: S301  (made one line above)
    assert again.digest == store.digest
    assert isinstance(again.path, Path)


@pytest.mark.parametrize("threads", [0, 2])
def test_a_batch_stays_what_it_is_for_as_long_as_it_is_held(
    store: FeatureStore, threads: int
) -> None:
    loader = FeatureLoader(store, range(50), 8, shuffle=True, threads=threads)
    kept = [batch.tokens["audio"][1:3] for epoch in range(2) for batch in loader.epoch(epoch)]
    index = [batch.clip_index[1:3] for epoch in range(2) for batch in loader.epoch(epoch)]
    for found, clips in zip(kept, index, strict=True):
        assert torch.equal(found, store.gather("audio", clips))


def test_memory_that_nobody_holds_is_used_again(store: FeatureStore) -> None:
    loader = FeatureLoader(store, range(48), 8, threads=0)
    places = {batch.tokens["rgb"].data_ptr() for _ in range(3) for batch in loader.epoch(0)}
    assert len(places) <= 2


def test_a_rank_without_a_clip_gets_an_empty_batch(store: FeatureStore) -> None:
    (batch,) = FeatureLoader(store, range(1), 8, p=0.5, rank=1, world_size=2).epoch(0)
    assert {m: tuple(t.shape) for m, t in batch.tokens.items()} == {
        m: (0, *store.shape(m)) for m in store.modalities
    }
    assert tuple(batch.mask.shape) == (0, 3)


def test_a_shard_that_was_cut_or_replaced_under_the_loader(tmp_path: Path) -> None:
    root = write_store(tmp_path / "s", clips=50)
    loader = FeatureLoader(FeatureStore.open(root), range(50), 8, p=0.5)
    first = flat(loader.epoch(0))
    path = shard_file(root, "rgb", 0)
    other = path.with_name("other")
    other.write_bytes(b"")
    other.replace(path)  # as a shard is that is made again: what is mapped stays
    assert flat(loader.epoch(0)) == first
    path = shard_file(root, "rgb", 1)
    with path.open("r+b") as file:
        file.truncate(PAYLOAD_OFFSET)
    with pytest.raises(StoreError, match="to 16384 bytes while in use"):
        next(loader.epoch(1))
    with pytest.raises(StoreError, match="was truncated"):
        loader.prefetch(2)


def test_a_store_that_changes_between_opening_and_mapping_is_refused(tmp_path: Path) -> None:
    root = write_store(tmp_path / "s", clips=10)
    store = FeatureStore.open(root)
    (root / "manifest.json").unlink()  # as whoever makes a shard again does first
    with pytest.raises(StoreError, match="changed after it was opened"):
        store.gather("rgb", torch.arange(2))
