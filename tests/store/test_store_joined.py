"""Stores that were never aligned are one: clips meet by id, classes by name, or say why not."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.any_store import fill_store, tokens_of

from karmma_pipeline.data.loading.loader import FeatureLoader, LoaderSettings
from karmma_pipeline.data.loading.open import open_source
from karmma_pipeline.errors import StoreError
from karmma_pipeline.modalities import Reason
from karmma_pipeline.store import (
    FeatureStore,
    JoinedStore,
    find_joined,
    joined_digests,
    open_joined,
)

IDS = [f"c{i:02d}" for i in range(12)]


def check_tokens(source: JoinedStore, shapes: dict[str, tuple[int, int]]) -> None:
    for column, m in enumerate(source.modalities):
        found = source.gather(m, torch.arange(len(source))).numpy()
        for i, clip_id in enumerate(source.clip_ids.tolist()):
            wanted = tokens_of(clip_id.decode(), m, shapes[m]).astype(np.float16)
            here = source.present[i, column]
            np.testing.assert_array_equal(found[i], wanted if here else 0)


def join(*paths: Path) -> JoinedStore:
    return JoinedStore([FeatureStore.open(path) for path in paths])


def test_modalities_of_two_jobs_meet_by_clip_id(tmp_path: Path) -> None:
    a = fill_store(tmp_path / "a", IDS[:9], {"rgb": (4, 6)}, absent=[("c03", "rgb")])
    b = fill_store(tmp_path / "b", IDS[:3:-1], {"audio": (2, 5)}, per_shard=3)
    joined = join(a, b)
    assert [i.decode() for i in joined.clip_ids] == IDS[:9] + IDS[:8:-1]
    assert joined.modalities == ("rgb", "audio")
    check_tokens(joined, {"rgb": (4, 6), "audio": (2, 5)})
    where = {i.decode(): n for n, i in enumerate(joined.clip_ids)}
    assert joined.present[where["c01"]].tolist() == [True, False]
    assert joined.reasons[where["c01"], 1] == Reason.NOT_IN_DATASET
    assert joined.reasons[where["c03"], 0] == Reason.NO_STREAM
    assert joined.present[where["c06"]].tolist() == [True, True]
    assert joined.present[where["c11"]].tolist() == [False, True]
    assert joined.labels["verb"][where["c11"]] == 1
    assert joined.split[where["c09"]] == "val"


def test_data_sets_are_put_one_after_the_other_in_one_gather(tmp_path: Path) -> None:
    a = fill_store(tmp_path / "a", IDS[:7], dtype="int8")
    b = fill_store(tmp_path / "b", IDS[7:], dtype="int8", per_shard=2)
    whole = FeatureStore.open(fill_store(tmp_path / "w", IDS, dtype="int8"))
    joined = join(a, b)
    for m in whole.modalities:
        assert torch.equal(joined.gather(m, torch.arange(12)), whole.gather(m, torch.arange(12)))
    batches = [list(FeatureLoader(s, range(12), 5, shuffle=True).epoch(1)) for s in (joined, whole)]
    for mine, theirs in zip(*batches, strict=True):
        assert torch.equal(mine.clip_index, theirs.clip_index)
        assert torch.equal(mine.tokens["rgb"], theirs.tokens["rgb"])
        assert torch.equal(mine.scales["rgb"], theirs.scales["rgb"])


def test_label_spaces_that_differ_are_refused_with_the_differences_or_joined(
    tmp_path: Path,
) -> None:
    a = fill_store(tmp_path / "a", IDS[:6], classes=("open", "shut"))
    b = fill_store(tmp_path / "b", IDS[6:], classes=("shut", "wash", "open"))
    with pytest.raises(StoreError, match=r"only the second has 'wash'.*label_spaces=join"):
        open_joined([a, b])
    joined = open_joined([a, b], "join")
    assert joined.heads["verb"] == ("open", "shut", "wash")
    named = [joined.heads["verb"][n] for n in joined.labels["verb"]]
    assert named[:2] == ["open", "shut"]
    assert named[6:9] == ["shut", "wash", "open"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"split": "test"}, "a different split"),
        ({"classes": ("shut", "open")}, "the same classes in another order"),
        ({"modalities": {"rgb": (4, 6)}}, "rgb, which a previous store has too"),
        ({"modalities": {"rgb": (5, 6)}}, r"rgb\.tokens differs \(4 and 5\)"),
        (
            {"dtype": "int8", "modalities": {"rgb": (4, 6)}},
            r"dtype differs \('float16' and 'int8'\)",
        ),
        (
            {"provenance": {"backbone": "other"}, "modalities": {"rgb": (4, 6)}},
            r"provenance differs \({} and {'backbone': 'other'}\)",
        ),
    ],
)
def test_contradictions_are_refused_by_name(
    tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    a = fill_store(tmp_path / "a", IDS, {"rgb": (4, 6)})
    b = fill_store(tmp_path / "b", IDS[3:], **{"modalities": {"audio": (2, 5)}, **change})
    with pytest.raises(StoreError, match=named):
        join(a, b)


def test_the_digest_tells_joins_apart(tmp_path: Path) -> None:
    a = fill_store(tmp_path / "a", IDS[:6])
    b = fill_store(tmp_path / "b", IDS[6:])
    assert join(a, b).digest == join(a, b).digest
    assert len({join(a, b).digest, join(b, a).digest, FeatureStore.open(a).digest}) == 3


def test_nine_stores_are_found_as_one_in_any_order(tmp_path: Path) -> None:
    """Nine have 986,400 orders; the right one is recorded with what learned from them."""
    paths = [fill_store(tmp_path / f"s{i}", IDS[:2], {f"s{i}": (1, 2)}) for i in range(9)]
    stores = [FeatureStore.open(path) for path in paths]
    joined = JoinedStore(stores, "join")
    turned = stores[::-1]
    found = find_joined(turned, joined.digest, joined_digests(joined))
    assert found is not None
    assert found.digest == joined.digest
    assert find_joined(turned[1:], joined.digest, joined_digests(joined)) is None
    # what earlier versions have trained: any order of a few stores, many only as they were given
    few = JoinedStore([stores[2], stores[0], stores[1]])
    assert find_joined(stores[:5], few.digest) is not None
    assert find_joined(stores, joined.digest) is not None
    assert find_joined(turned, joined.digest) is None


@pytest.mark.parametrize("cache", ["map", "device"])
def test_a_recipe_opens_several_stores_as_one(tmp_path: Path, cache: str) -> None:
    a = fill_store(tmp_path / "a", IDS[:7], dtype="int8")
    b = fill_store(tmp_path / "b", IDS[7:], dtype="int8")
    settings = LoaderSettings.model_validate({"cache": cache})
    source = open_source((a, b), settings, torch.device("cpu"))
    plain = join(a, b)
    for batch in FeatureLoader(source, range(12), 5, shuffle=True, p=0.3).epoch(0):
        found = batch.tokens_on(torch.device("cpu"))
        for m in plain.modalities:
            assert torch.equal(found[m], plain.gather(m, batch.clip_index))
