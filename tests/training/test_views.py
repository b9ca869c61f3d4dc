"""Stores with several views of each clip: what is averaged, and which one is trained on."""

from pathlib import Path

import numpy as np
import pytest
import torch
from support.any_store import fill_store
from support.evaluation import save_run
from support.training import baseline_recipe, student_recipe, teacher_recipe

from karmma_pipeline.data.loading.clips import clips_of_split
from karmma_pipeline.errors import StoreError
from karmma_pipeline.evaluation import robustness
from karmma_pipeline.evaluation.drop_curve import Correct
from karmma_pipeline.evaluation.predict import predict
from karmma_pipeline.evaluation.predictions import predict_clips
from karmma_pipeline.evaluation.recipe import EvaluateRecipe, RobustnessTests
from karmma_pipeline.jobs import StopFlag
from karmma_pipeline.models.exported import open_model
from karmma_pipeline.models.saved import load_model
from karmma_pipeline.store import FeatureStore
from karmma_pipeline.store.joined import JoinedStore
from karmma_pipeline.store.tools.rewrite import select
from karmma_pipeline.training.clips import make_loaders, usable_clips
from karmma_pipeline.training.ranks import Ranks
from karmma_pipeline.training.stages import distill, train_baseline, train_teacher
from karmma_pipeline.training.teacher_logits import TeacherLogitsCache
from karmma_pipeline.views import Views, are_whole, clip_names

CPU = torch.device("cpu")
VIEWS = Views(clips=2, crops=3)
ABSENT = [("c05.v2", "audio"), *((f"c07.v{view}", "audio") for view in range(6))]
SENSORS = {f"s{i}": (1, 4) for i in range(8)}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fill_store(tmp_path_factory.mktemp("stores") / "views", views=VIEWS, absent=ABSENT)


def test_logits_are_the_mean_of_those_of_six_stores_of_one_view(
    store: Path, tmp_path: Path
) -> None:
    run = save_run(tmp_path / "run", store, name="r", provenance={})
    recipe = {"runs": (run,), "out": tmp_path / "report", "split": "", "batch_size": 7}
    alone = []
    for view in range(6):
        one = fill_store(tmp_path / f"v{view}", absent=ABSENT, like=f".v{view}")
        asked = EvaluateRecipe(stores=(one,), **recipe)
        alone.append(predict(run, FeatureStore.open(one), asked, CPU, StopFlag()))
    asked = EvaluateRecipe(stores=(store,), **recipe)
    found = predict(run, FeatureStore.open(store), asked, CPU, StopFlag())
    assert found.clip_ids.tolist() == alone[0].clip_ids.tolist()
    wanted = np.stack([one.logits["verb"] for one in alone])  # [V, subsets, N, C]
    seen = np.stack([[one.present[:, [m in s for m in one.store.modalities]].any(axis=1)
                      for s in one.subsets] for one in alone])  # fmt: skip
    some = seen.any(axis=0)
    seen = np.where(some, seen, True)[..., None]  # nothing is seen of c07 by its sound alone
    wanted = (wanted * seen).sum(axis=0) / seen.sum(axis=0)
    np.testing.assert_allclose(found.logits["verb"], wanted, rtol=1e-5, atol=1e-6)
    assert seen.all(axis=(0, -1)).sum() == seen[0, ..., 0].size - 1  # one view of c05 is mute
    assert found.present[:, 1].tolist() == [i != 7 for i in range(12)]
    assert found.labels["verb"].tolist() == alone[0].labels["verb"].tolist()
    again = predict_clips(open_model(run), FeatureStore.open(store), "", batch_size=20)
    np.testing.assert_allclose(again.logits["verb"], found.logits["verb"][0], rtol=1e-5, atol=1e-6)
    assert again.clip_ids == tuple(i.decode() for i in found.clip_ids)


def test_a_stale_sensor_is_stale_in_every_view(store: Path, tmp_path: Path) -> None:
    run = save_run(tmp_path / "run", store, name="r", provenance={})
    recipe = EvaluateRecipe(
        runs=(run,), stores=(store,), out=tmp_path / "o", split="", batch_size=13,
        robustness=RobustnessTests(missing=[], stale=[1.0]),
    )  # fmt: skip
    found = predict(run, FeatureStore.open(store), recipe, CPU, StopFlag())
    model, opened = load_model(run / "best")[0], FeatureStore.open(store)
    right = []
    for clip in range(12):
        before = clip - 2  # of the same group
        logits = []
        for view in range(6):
            rows = {"rgb": 6 * clip + view, "audio": 6 * before + view}
            has = {m: before >= 0 or m == "rgb" for m in rows}
            has["audio"] &= clip != 7 and before != 7 and opened.present[rows["audio"], 1]
            if clip - 2 == 7:  # c07 has no sound: the one before it is heard
                rows["audio"], has["audio"] = 6 * 5 + view, bool(opened.present[6 * 5 + view, 1])
            tokens = {m: opened.gather(m, torch.tensor([max(r, 0)])) for m, r in rows.items()}
            with torch.inference_mode():
                out = model(tokens, torch.tensor([[has[m] for m in opened.modalities]]))
            logits.append(out["verb"])
        right.append(int(torch.cat(logits).mean(dim=0).argmax()) == clip % 2)
    correct = Correct(found)
    (test,) = [t for t in robustness.robustness(correct, run, recipe, CPU) if t.what == "audio"]
    assert test.points[0].scores["verb_top1"].value == pytest.approx(100 * np.mean(right))


def test_an_epoch_trains_on_one_view_of_each_clip_drawn_for_it(store: Path, tmp_path: Path) -> None:
    opened = FeatureStore.open(store)
    recipe = baseline_recipe(store, tmp_path / "run", batch_size=4, seed=3)
    train, val = (usable_clips(recipe, opened, s, s == "val") for s in ("train", "val"))
    loader, validation = make_loaders(recipe, opened, train, val, CPU, Ranks())
    drawn = np.stack([loader.rows(epoch) for epoch in range(40)])  # [epochs, clips]
    assert (drawn // 6 == [1, 2, 4, 5, 7, 8, 10, 11]).all()
    assert np.bincount((drawn % 6).ravel(), minlength=6).min() > 30  # of 320, 53 on average
    assert len(np.unique(drawn, axis=0)) == 40
    assert len(np.unique(drawn % 6, axis=1).T) == 8
    got = np.concatenate([batch.clip_index for batch in loader.epoch(5)])
    assert sorted(got) == drawn[5].tolist()
    for batch in loader.epoch(5):
        assert torch.equal(batch.tokens["rgb"], opened.gather("rgb", batch.clip_index))
    plain = FeatureStore.open(fill_store(tmp_path / "plain", absent=[("c07", "audio")]))
    clips = usable_clips(recipe, plain, "train")
    alike, _ = make_loaders(recipe, plain, clips, clips, CPU, Ranks())
    there = (drawn[5] != 6 * 5 + 2)[:, None]  # which has no sound
    assert ((loader.masks(5) == alike.masks(5)) | ~there).all()
    assert (loader.places(5) == alike.places(5)).all()
    seen = [int(i) for batch in validation.epoch(0) for i in batch.clip_index]
    assert seen == [6 * clip + 4 for clip in (0, 3, 6, 9)]  # the middle window and crop


def test_teacher_and_student_see_the_same_view(store: Path, tmp_path: Path) -> None:
    teacher = tmp_path / "teacher"
    train_teacher(teacher_recipe(store, teacher, epochs=2))
    opened = FeatureStore.open(store)
    recipe = student_recipe(store, teacher, tmp_path / "student", epochs=2, batch_size=5)
    train = usable_clips(recipe, opened, "train")
    loader, _ = make_loaders(recipe, opened, train, train, CPU, Ranks())
    cached = TeacherLogitsCache(teacher / "best", store, opened, train)
    table = cached.load(tmp_path / "t", CPU, Ranks(), StopFlag(), (loader, 2))
    model, _ = load_model(teacher / "best")
    for batch in loader.epoch(1):
        tokens = {m: opened.gather(m, batch.clip_index) for m in opened.modalities}
        with torch.inference_mode():
            theirs = model(tokens, batch.mask)["verb"]
        mine = table.logits(batch.clip_index, batch.mask)["verb"].float()
        torch.testing.assert_close(mine, theirs, atol=2e-3, rtol=2e-3)
    distill(recipe)
    one = fill_store(tmp_path / "one")
    with pytest.raises(StoreError, match="different views per clip"):
        distill(student_recipe(one, teacher, tmp_path / "other", teacher_store=str(store)))


@pytest.mark.slow
def test_of_many_modalities_the_masks_of_the_drawn_views_are_computed(tmp_path: Path) -> None:
    root = fill_store(tmp_path / "s", modalities=SENSORS, views=Views(clips=2), absent=())
    train_teacher(teacher_recipe(root, tmp_path / "teacher", epochs=1))
    distill(student_recipe(root, tmp_path / "teacher", tmp_path / "student", epochs=3))


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_with_the_clips_it_knows(
    store: Path, tmp_path: Path
) -> None:
    from support.training import results, stopped_and_resumed

    recipe = baseline_recipe(store, tmp_path / "a", epochs=3, batch_size=3)
    train_baseline(recipe)
    again = baseline_recipe(store, tmp_path / "b", epochs=3, batch_size=3)
    stopped_and_resumed(train_baseline, again, [4], "saved")
    assert results(tmp_path / "a") == results(tmp_path / "b")


def test_lists_of_clips_name_clips_and_not_their_views(store: Path, tmp_path: Path) -> None:
    opened = FeatureStore.open(store)
    (tmp_path / "out.txt").write_text("c01\nc04\n")
    rows = clips_of_split(opened, "train", tmp_path / "out.txt")
    assert set(opened.names(rows).tolist()) == {b"c02", b"c05", b"c07", b"c08", b"c10", b"c11"}
    assert len(rows) == 36
    select(store, tmp_path / "some", ["c04", "c02"])
    some = FeatureStore.open(tmp_path / "some")
    assert some.clip_ids.tolist() == [f"c0{i}.v{v}".encode() for i in (4, 2) for v in range(6)]
    assert some.views == VIEWS


def test_stores_of_other_views_are_not_joined(store: Path, tmp_path: Path) -> None:
    one = fill_store(tmp_path / "one", modalities={"flow": (1, 3)})
    with pytest.raises(StoreError, match="clips=2 crops=3 and one"):
        JoinedStore([FeatureStore.open(store), FeatureStore.open(one)])
    same = fill_store(tmp_path / "same", modalities={"flow": (1, 3)}, views=VIEWS, absent=())
    assert JoinedStore([FeatureStore.open(store), FeatureStore.open(same)]).views == VIEWS


def test_rows_that_are_not_all_views_of_each_clip_are_refused(tmp_path: Path) -> None:
    names = VIEWS.names("a.v1") + VIEWS.names("b")
    ids = np.array([name.encode() for name in names])
    assert clip_names(ids, VIEWS).tolist() == [b"a.v1"] * 6 + [b"b"] * 6
    assert are_whole(ids, VIEWS)
    assert not are_whole(ids[:-1], VIEWS)
    assert not are_whole(ids[::-1], VIEWS)


def test_a_store_without_views_says_nothing_of_them(tmp_path: Path) -> None:
    one = fill_store(tmp_path / "one")
    assert b"views" not in (one / "spec.json").read_bytes()
    assert FeatureStore.open(one).views is None
