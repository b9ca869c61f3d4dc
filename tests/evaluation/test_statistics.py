"""Runs that are one method, differences between methods, and whether intervals cover the truth."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from scipy.stats import t, ttest_1samp
from support.coverage import MEASURED, coverage
from support.evaluation import make_recipe, save_run
from support.tiny_store import write_store

from karmma_pipeline.errors import ConfigError
from karmma_pipeline.evaluation import statistics
from karmma_pipeline.evaluation.evaluate import evaluate
from karmma_pipeline.evaluation.results import Difference, Results

pytestmark = pytest.mark.usefixtures("one_kind_of_figures")

FAST = {"costs": False, "draws": 0}
SEEDS = {"late": (0, 1, 2), "student": (2, 0, 1), "other": (7,)}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("methods")
    store = write_store(root / "store", clips=60)
    for name, seeds in SEEDS.items():
        for seed in seeds:
            training = {"seed": seed, "val_split": "val", "lr": 0.1, "out": f"{name}{seed}"}
            own = 10 * len(name) + seed
            save_run(root / f"{name}{seed}", store, name=name, seed=own, training=training)
    return root


def recipe_of(place: Path, *runs: str, **changes: Any) -> Any:
    return make_recipe(place, runs=[str(place / run) for run in runs], names={}, **FAST, **changes)


ALL = tuple(f"{name}{seed}" for name, seeds in SEEDS.items() for seed in seeds)


@pytest.fixture(scope="module")
def found(place: Path) -> Results:
    return evaluate(recipe_of(place, *ALL)).results


def top1_by_clip(folder: Path, results: Results) -> dict[str, np.ndarray]:
    """Recompute from the saved files alone: head to [runs, subsets and curve, clips]."""
    tables: dict[str, list[np.ndarray]] = {}
    for path in sorted((folder / "logits").iterdir()):
        with safe_open(path, "numpy") as file:
            subsets = json.loads(file.metadata()["karmma"])["subsets"]
            saved = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        present = saved["present"].astype(bool)
        columns = np.array([[m in s for m in results.modalities] for s in subsets])
        left = present[None] & columns[:, None]  # [subsets, clips, modalities]
        right = {
            head: (saved[f"logits.{head}"].argmax(2) == saved[f"labels.{head}"]) & left.any(2)
            for head in ("verb", "noun")
        }
        right["action"] = right["verb"] & right["noun"]
        chances = np.zeros((len(results.rates), *left.shape[:2]))
        for number, rate in enumerate(results.rates):
            for clip, has in enumerate(present):
                for s, column in enumerate(columns):
                    if not (column & ~has).any():
                        kept, count = column.sum(), has.sum()
                        restored = rate**count / count if kept == 1 else 0.0
                        chance = (1 - rate) ** kept * rate ** (count - kept) + restored
                        chances[number, s, clip] = chance
        for head, table in right.items():
            curve = (chances * table).sum(1).mean(0)
            tables.setdefault(head, []).append(np.concatenate([table, curve[None]]))
    return {head: 100 * np.stack(of).astype(float) for head, of in tables.items()}


def test_every_difference_follows_from_the_saved_logits(place: Path, found: Results) -> None:
    tables = top1_by_clip(place / "report", found)
    methods = {m.name: m for m in found.methods}
    names = [*found.subsets, ()]
    assert len(found.differences) == 3 * 3 * 8  # heads, pairs, subsets and the curve
    for d in found.differences:
        table = tables[d.head][:, names.index(d.modalities)]
        first, second = methods[d.first], methods[d.second]
        common = {*first.seeds} & {*second.seeds}
        assert {*d.seeds} == common
        ours, theirs = (
            table[[m.runs[m.seeds.index(s)] for s in d.seeds or m.seeds]] for m in (first, second)
        )
        assert d.value == pytest.approx(ours.mean() - theirs.mean())
        if not common:
            assert not d.paired
            continue
        D = ours - theirs
        np.testing.assert_allclose(d.by_seed, D.mean(1), atol=1e-9)
        seeds, clips = D.shape
        half = t.ppf(0.975, seeds - 1) * D.mean(1).std(ddof=1) / seeds**0.5
        assert d.seeds_low == pytest.approx(D.mean() - half)
        assert d.seeds_high == pytest.approx(D.mean() + half)
        of_seeds, of_clips = D.mean(1).var(ddof=1) / seeds, D.mean(0).var(ddof=1) / clips
        rest = D - D.mean(1)[:, None] - D.mean(0) + D.mean()
        rest_df = (seeds - 1) * (clips - 1)
        left = (rest**2).sum() / rest_df / D.size
        parts = [(of_seeds, of_seeds > left, seeds - 1), (of_clips, of_clips > left, clips - 1)]
        times = 1 - sum(counts for _, counts, _ in parts)
        variance = sum(part for part, counts, _ in parts if counts) + times * left
        spread = sum(part**2 / df for part, counts, df in parts if counts)
        df = variance**2 / (spread + (times * left) ** 2 / rest_df)
        df = max(df, min([df for _, counts, df in parts if counts], default=rest_df))
        half = t.ppf(0.975, df) * variance**0.5
        np.testing.assert_allclose((d.low, d.high), (D.mean() - half, D.mean() + half), atol=1e-6)
        draw = np.random.default_rng(1)
        again = [
            D[np.ix_(draw.integers(seeds, size=seeds), draw.integers(clips, size=clips))].mean()
            for _ in range(500)
        ]
        low, high = np.quantile(again, [0.025, 0.975])
        assert abs(d.bootstrap_low - low) + abs(d.bootstrap_high - high) < 0.25 * (high - low)


def test_runs_of_one_name_are_one_method_with_the_spread_of_its_seeds(
    place: Path, found: Results
) -> None:
    assert [(m.name, m.runs, m.seeds) for m in found.methods] == [
        ("late", (0, 1, 2), (0, 1, 2)),
        ("student", (3, 4, 5), (2, 0, 1)),
        ("other", (6,), (7,)),
    ]
    score = found.methods[1].subsets[0].scores["action_top1"]
    single = [run.subsets[0].scores["action_top1"].value for run in found.runs[3:6]]
    assert score.by_seed == tuple(single)
    assert score.mean == pytest.approx(np.mean(np.array(single, float)))
    assert score.sd == pytest.approx(np.std(np.array(single, float), ddof=1))
    ends = np.array([score.low, score.mean, score.high], float)
    assert ends[0] < ends[1] < ends[2]
    curve = found.curve(found.methods[1], "action", "all")
    assert curve is not None
    means = [run.curve("action", "all").mean for run in found.runs[3:6]]  # type: ignore[union-attr]
    assert curve.mean.by_seed == pytest.approx(means)
    assert found.methods[2].subsets == ()  # one seed: its run says all


def difference(found: Results, first: str, second: str) -> Difference:
    return next(
        d
        for d in found.differences
        if (d.first, d.second, d.head, d.modalities) == (first, second, "action", ())
    )


def test_what_an_interval_covers_is_said(place: Path, found: Results, tmp_path: Path) -> None:
    assert difference(found, "student", "late").covers == "60 clips, 3 seeds"
    apart = difference(found, "other", "student")
    assert apart.covers == "60 clips, one seed and 3 seeds, unpaired"
    assert apart.seeds_low is None
    of_groups = difference(found, "student", "late")  # P0, P1, P2: too few to be resampled
    assert set(of_groups.by_group) == {"P0", "P1", "P2"}
    signs = [np.sign(v) == np.sign(of_groups.value) for v in of_groups.by_group.values()]
    assert of_groups.groups_agree == sum(signs)
    out = str(tmp_path / "r")
    some = evaluate(recipe_of(place, "late0", "late1", "student1", out=out)).results
    only = difference(some, "student", "late")
    assert only.covers == "60 clips, one seed in common"
    assert only.seeds == (1,)
    assert only.by_seed == pytest.approx([only.value])


def test_runs_of_one_name_and_one_seed_are_refused(place: Path, tmp_path: Path) -> None:
    store = place / "store"
    twin = save_run(tmp_path / "twin", store, name="late", seed=99, training={"seed": 1})
    recipe = recipe_of(place, "late0", "late1", str(twin), out=str(tmp_path / "r"))
    with pytest.raises(ConfigError, match="are not the same model, and both are called 'late' and"):
        evaluate(recipe)
    with pytest.raises(ConfigError, match="are the same model"):
        evaluate(recipe_of(place, "late0", "late0", out=str(tmp_path / "r")))
    teacher = save_run(
        tmp_path / "t", store, name="late", seed=9, kind="teacher", training={"seed": 5}
    )
    with pytest.raises(ConfigError, match="one is a student and one a teacher"):
        evaluate(recipe_of(place, "late0", str(teacher), out=str(tmp_path / "r")))
    assert not (tmp_path / "r").exists()


def test_what_makes_numbers_less_than_they_seem_is_a_warning(place: Path, tmp_path: Path) -> None:
    store = place / "store"
    for seed, lr in ((0, 0.1), (1, 0.2)):
        training = {"seed": seed, "lr": lr, "val_split": "val", "teacher": ["t"]}
        save_run(tmp_path / f"n{seed}", store, name="new", seed=seed, training=training)
    runs = [str(tmp_path / "n0"), str(tmp_path / "n1")]
    found = evaluate(recipe_of(place, *runs, split="val", out=str(tmp_path / "r"))).results
    chosen, settings, teacher = found.warnings
    assert "the split 'val', on which the best epoch was chosen (new)" in chosen
    assert "differ in more than their seed (lr: 0.1, 0.2)" in settings
    assert "distilled from the same teacher" in teacher
    assert found.runs[0].chosen_on == "val"
    other = evaluate(recipe_of(place, "late0", split="train", out=str(tmp_path / "q"))).results
    assert other.warnings == ()


@pytest.mark.parametrize(
    ("groups", "names"),
    [
        (["b", "a", "b"], ["a", "b"]),
        (["b", "", "b"], []),  # a clip has none
        (["a", "a", "a"], []),
        (["a", "b", "c"], []),  # each clip is one
    ],
)
def test_groups_that_say_nothing_are_none(groups: list[str], names: list[str]) -> None:
    found, numbers = statistics.groups_of(np.array(groups))
    assert found.tolist() == names
    if names:
        assert [names[n] for n in numbers] == groups


def test_ten_groups_are_resampled_instead_of_clips() -> None:
    """Against the bootstrap of whole groups, and a t test where all groups have equal sizes."""
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(12), 20)
    values = (rng.normal(0.1, 0.3, 12)[groups] + rng.normal(0, 0.5, 240))[None]
    found = statistics.estimate([statistics.by_group(values, groups)])
    means = values[0].reshape(12, 20).mean(axis=1)
    expected = ttest_1samp(means, 0).confidence_interval()
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    uneven = np.sort(rng.integers(12, size=240))
    spread = statistics.by_group(values, uneven)
    assert spread.mean() == pytest.approx(values.mean())
    sums, sizes = np.bincount(uneven, values[0]), np.bincount(uneven)
    drawn = rng.integers(12, size=(20_000, 12))
    again = sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1)
    assert spread.std(ddof=1) / 12**0.5 == pytest.approx(again.std(), rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize(("apart", "rest"), [MEASURED[2:], (0.0, 0.5), (0.04, 0.5), (0.1, 0.5)])
def test_intervals_cover_the_known_difference(apart: float, rest: float) -> None:
    """Of 200 clips and 5 seeds, in 1,000 draws; first with seeds as they differ on UTD-MHAD."""
    assert 0.93 <= coverage(5, 200, apart, rest).t <= 0.97


def test_models_that_answer_alike_differ_by_nothing() -> None:
    found = statistics.estimate([np.zeros((3, 20))])
    assert (found.value, found.low, found.high) == (0, 0, 0)


def test_groups_agree_with_a_difference_and_with_none_there_is_nothing_to_agree_with(
    place: Path, tmp_path: Path
) -> None:
    runs = [place / "late0", tmp_path / "again"]
    shutil.copytree(runs[0], runs[1])
    names = {str(run): run.name for run in runs}
    recipe = make_recipe(
        place, runs=[*map(str, runs)], names=names, out=str(tmp_path / "r"), **FAST
    )
    for one in evaluate(recipe).results.differences:
        assert (one.value, one.groups_agree) == (0, None)
        assert set(one.by_group.values()) == {0}
    assert "same sign |" not in (tmp_path / "r/tables/differences.md").read_text()
