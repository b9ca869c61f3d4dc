"""Schedules of modality dropout: rates, ramps, bursts and lists, held against counts by hand."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.tiny_store import write_store

from karmma_pipeline import config
from karmma_pipeline.data.loading.dropout import DropoutSchedule, make_masks, patterns_digest
from karmma_pipeline.data.loading.masks import clip_keys, modality_mask
from karmma_pipeline.errors import ConfigError
from karmma_pipeline.store import FeatureStore, TokenSource
from karmma_pipeline.training.recipe import TrainRecipe

CLIPS = 400


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    return FeatureStore.open(write_store(tmp_path_factory.mktemp("s") / "s", clips=CLIPS, width=1))


class Recordings:
    """A store of nothing but what schedules look at: 8 recordings of 50 clips, all complete."""

    modalities = ("rgb", "flow", "audio")
    path = Path("s")
    present = np.ones((CLIPS, 3), bool)
    clip_ids = np.array([f"c{i:03d}" for i in range(CLIPS)], "S4")
    group = np.array([f"P{i // 100}" for i in range(CLIPS)])  # two recordings each
    views = None
    names = TokenSource.names

    def seconds(self, column: str) -> np.ndarray:
        assert column == "start_s"
        return np.arange(CLIPS) % 50 * 1.5


def masks(store: Any, epoch: int, /, **settings: Any) -> np.ndarray:
    dropout = settings.pop("plain", None)
    clips = settings.pop("clips", np.arange(CLIPS))
    schedule = DropoutSchedule(**settings) if dropout is None else dropout
    return make_masks(schedule, 7, store, clips)(epoch)


def lost(mask: np.ndarray) -> np.ndarray:
    return 1 - mask.mean(axis=0)


def test_a_constant_rate_gives_the_masks_that_it_always_gave(store: TokenSource) -> None:
    wanted = modality_mask(7, 3, clip_keys(store.clip_ids), store.present, 0.3)
    assert np.array_equal(masks(store, 3, plain=0.3), wanted)
    assert np.array_equal(masks(store, 3, rate=0.3), wanted)


def test_each_modality_has_its_own_rate() -> None:
    shares = np.mean(
        [lost(masks(Recordings(), e, rate={"rgb": 0.1, "audio": 0.5})) for e in range(10)], axis=0
    )
    assert shares == pytest.approx([0.1, 0, 0.5], abs=0.03)
    with pytest.raises(
        ConfigError, match="unknown modality 'gaze'; the store has rgb, flow, audio"
    ):
        masks(Recordings(), 0, rate={"gaze": 0.1})


def test_a_ramp_begins_where_it_is_told_and_ends_at_the_rate() -> None:
    shares = [lost(masks(Recordings(), e, rate=0.4, ramp_epochs=4)).mean() for e in range(6)]
    assert shares[0] == 0
    # 1 - p loses nothing, and of what would lose all three (p^3) one is restored
    for epoch, p in enumerate([0, 0.1, 0.2, 0.3, 0.4, 0.4]):
        assert shares[epoch] == pytest.approx(p - p**3 / 3, abs=0.04)
    down = [lost(masks(Recordings(), e, rate=0.1, ramp_epochs=2, ramp_from=0.5)) for e in (0, 2)]
    assert down[0].mean() > 0.4 > 0.2 > down[1].mean()
    plain = masks(Recordings(), 9, plain=0.4)
    assert np.array_equal(masks(Recordings(), 9, rate=0.4, ramp_epochs=4), plain)


def test_clips_of_a_burst_lose_the_same_and_bursts_end_with_a_recording() -> None:
    mask = masks(Recordings(), 0, rate=0.4, burst=10).reshape(8, 50, 3)
    changes = (mask[:, 1:] != mask[:, :-1]).any(axis=2)
    places = [np.flatnonzero(of) for of in changes]
    assert all(len({*(of % 10)}) <= 1 for of in places)  # every tenth clip of a recording at most
    assert len({int(of[0]) % 10 for of in places if len(of)}) > 1  # drawn for each
    other = masks(Recordings(), 1, rate=0.4, burst=10).reshape(8, 50, 3)
    assert not np.array_equal(other, mask)
    assert lost(mask.reshape(-1, 3)).mean() == pytest.approx(0.4 - 0.4**3 / 3, abs=0.1)
    edges = (mask[:-1, -1] != mask[1:, 0]).any(axis=1)
    assert edges.any()
    # A burst that outlasts every recording takes a modality from all of its clips at once.
    whole = masks(Recordings(), 0, rate=0.4, burst=10_000).reshape(8, 50, 3)
    assert (whole == whole[:, :1]).all()


def test_masks_do_not_depend_on_the_order_of_clips() -> None:
    order = np.random.default_rng(0).permutation(CLIPS)
    for settings in ({"rate": 0.4, "burst": 10}, {"rate": {"rgb": 0.5}}):
        whole = masks(Recordings(), 2, **settings)
        assert np.array_equal(masks(Recordings(), 2, clips=order, **settings), whole[order])


def write(path: Path, *rows: str, header: str = "clip_id,missing,epoch") -> Path:
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


def test_patterns_of_a_list_are_what_clips_lose(tmp_path: Path) -> None:
    rows = ("c000,rgb+audio,", "c001,rgb,", "c001,flow,2", "c002,rgb+flow+audio,", "c003,,")
    of = write(tmp_path / "p.csv", *rows)
    first, second = (masks(Recordings(), epoch, patterns=of)[:5].tolist() for epoch in (0, 1))
    assert first[0] == second[0] == [False, True, False]
    assert (first[1], second[1]) == ([False, True, True], [True, False, True])
    assert sum(first[2]) == 1  # one of those present always stays
    assert first[3:] == [[True] * 3] * 2
    store: Any = Recordings()
    again = write(tmp_path / "q.csv", *rows[::-1])
    assert patterns_digest(of, store) == patterns_digest(again, store)
    assert patterns_digest(of, store) != patterns_digest(write(again, *rows[1:]), store)


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        (["c900,rgb,"], "line 2: s has no clip 'c900'"),
        (["c000,rgb,", "c001,gaze,"], "line 3: missing='gaze' is not a modality"),
        (["c000,rgb,0"], "epoch='0': must be 1, 2"),
        (["c000,rgb,1", "c000,flow,1"], "'c000' is listed twice"),
    ],
)
def test_a_wrong_row_is_named(tmp_path: Path, rows: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        masks(Recordings(), 0, patterns=write(tmp_path / "p.csv", *rows))


def test_a_list_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no column 'missing'"):
        masks(Recordings(), 0, patterns=write(tmp_path / "p.csv", header="clip_id,rgb"))
    with pytest.raises(ConfigError, match="No such file"):
        masks(Recordings(), 0, patterns=tmp_path / "nowhere.csv")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (1.0, "modality_dropout=1.0: input should be at least 0 and less than 1"),
        ("often", "input should be a rate"),
        ({"rate": 1.5}, "a rate must be at least 0 and less than 1"),
        ({"rte": 0.5}, "did you mean 'rate'"),
        ({"rate": 0.5, "patterns": "p.csv"}, "give either patterns or a rate"),
        ({"ramp_from": 0.5}, "ramp_from requires ramp_epochs"),
    ],
)
def test_a_wrong_schedule_is_told_in_one_sentence(given: object, says: str) -> None:
    tree = {"store": "s", "out": "o", "modality_dropout": given}
    with pytest.raises(ConfigError, match=says) as caught:
        config.build(TrainRecipe, tree, "r.yaml")
    assert str(caught.value).count("modality_dropout") == 1


def test_a_schedule_is_written_and_read_as_it_is() -> None:
    tree = {"store": "s", "out": "o", "modality_dropout": {"rate": {"rgb": 0.5}, "burst": 3}}
    recipe = config.build(TrainRecipe, tree, "r.yaml")
    again = config.build(TrainRecipe, config.parse_yaml(config.dump(recipe), "r"), "r")
    assert again == recipe
    assert "modality_dropout: 0.3\n" in config.template(TrainRecipe)
