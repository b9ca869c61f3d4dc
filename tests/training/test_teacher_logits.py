"""Cached teacher logits: their checksums, their key, and several teachers in one average."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load
from support.any_store import fill_store
from support.leftovers import leave
from support.training import SIZE, StopAt, student_recipe, teacher_recipe

from karmma_pipeline.data.loading.loader import FeatureLoader
from karmma_pipeline.errors import CheckpointError, ConfigError, StoppedError, StoreError
from karmma_pipeline.jobs import StopFlag
from karmma_pipeline.models.saved import load_model, read_card
from karmma_pipeline.store import FeatureStore
from karmma_pipeline.training import teacher_logits
from karmma_pipeline.training.objective import teacher_log_probabilities
from karmma_pipeline.training.ranks import Ranks
from karmma_pipeline.training.stages import distill, train_teacher
from karmma_pipeline.training.state import read_checksummed
from karmma_pipeline.training.teacher_logits import TeacherLogits, TeacherLogitsCache

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def teachers(store: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("teachers")
    for seed in (0, 1):
        train_teacher(teacher_recipe(store, folder / f"t{seed}", epochs=2, seed=seed))
    return [folder / "t0", folder / "t1"]


def cache(store: Path, teacher: Path) -> TeacherLogitsCache:
    opened = FeatureStore.open(store)
    return TeacherLogitsCache(
        teacher / "best", store, opened, np.flatnonzero(opened.split == "train")
    )


def test_a_flipped_byte_is_noticed_and_its_chunk_computed_again(
    store: Path, teachers: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teacher_logits, "CHUNK", 32)
    made = cache(store, teachers[0]).load(tmp_path, CPU, Ranks(), StopFlag())
    chunks = sorted(tmp_path.glob("*/*.sealed"))
    assert len(chunks) == 3
    before = [c.read_bytes() for c in chunks]
    hurt = bytearray(before[1])
    hurt[len(hurt) // 2] ^= 1
    chunks[1].write_bytes(hurt)
    left = leave(chunks[2])
    again = cache(store, teachers[0]).load(tmp_path, CPU, Ranks(), StopFlag())
    assert [c.read_bytes() for c in chunks] == before
    assert not left.exists()
    assert torch.equal(again._logits, made._logits)


def test_stopped_in_the_middle_it_keeps_the_batches_that_are_done(
    store: Path, teachers: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teacher_logits, "CHUNK", 32)
    monkeypatch.setattr(teacher_logits, "_BATCH", 8)
    cache(store, teachers[0]).load(tmp_path / "whole", CPU, Ranks(), StopFlag())
    whole = {p.name: p.read_bytes() for p in tmp_path.glob("whole/*/*.sealed")}
    passes = 7 * 4  # masks of a batch, batches of a chunk
    with pytest.raises(StoppedError, match="the finished teacher logits"):
        cache(store, teachers[0]).load(tmp_path / "t", CPU, Ranks(), StopAt(passes + 2 * 7 + 3))
    times = {p.name: p.stat().st_mtime_ns for p in tmp_path.glob("t/*/*.sealed")}
    assert set(times) == {"00000.safetensors.sealed", "00001.part.sealed"}
    rest = StopAt(1000)
    cache(store, teachers[0]).load(tmp_path / "t", CPU, Ranks(), rest)
    assert 1000 - rest.looks == 2 * 7 + 7 + 1  # half a chunk, the last one's 8 clips, the end
    assert {p.name: p.read_bytes() for p in tmp_path.glob("t/*/*.sealed")} == whole
    (first,) = tmp_path.glob("t/*/00000.*")
    assert first.stat().st_mtime_ns == times[first.name]


SENSORS = {f"s{i}": (1, 4) for i in range(8)}


def test_of_many_modalities_only_the_masks_that_training_draws_are_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, epochs = [f"c{i:02d}" for i in range(20)], 5
    root = fill_store(tmp_path / "s", ids, SENSORS, absent=[("c01", f"s{i}") for i in range(7)])
    for name, absent in (("learned", "learned"), ("drop", "drop")):
        size = {**SIZE, "absent": absent}
        train_teacher(teacher_recipe(root, tmp_path / name, epochs=1, size=size))
        opened = FeatureStore.open(root)
        clips = np.flatnonzero(opened.split == "train")
        cached = TeacherLogitsCache(tmp_path / name / "best", root, opened, clips)
        loader = FeatureLoader(opened, clips, 4, seed=3, p=0.4, shuffle=True)
        stop = StopAt(10**6)
        monkeypatch.setattr(teacher_logits, "CHUNK", 8)
        found = cached.load(tmp_path / "t", CPU, Ranks(), stop, (loader, epochs))
        wanted = {
            (int(clip), mask.tobytes())
            for epoch in range(epochs)
            for clip, mask in zip(clips, loader.masks(epoch), strict=True)
        }
        assert len(found._valid) == len(wanted)
        assert sum(clip == 1 for clip, _ in wanted) == 1  # one modality: one mask in all epochs
        assert 10**6 - stop.looks <= 2 * epochs + 1  # passes: of whole batches, not of clips
        model, _ = load_model(tmp_path / name / "best")
        for batch in loader.epoch(2):
            with torch.inference_mode():
                theirs = model(batch.tokens_on(CPU), batch.mask)["verb"]
            mine = found.logits(batch.clip_index, batch.mask)["verb"]
            torch.testing.assert_close(mine.float(), theirs, atol=2e-3, rtol=2e-3)
            assert found.valid(batch.clip_index, batch.mask).all()
        with pytest.raises(CheckpointError, match="not computed for"):
            found.logits(torch.tensor([int(clips[1])]), torch.tensor([[True] + [False] * 7]))
    student = student_recipe(root, tmp_path / "drop", tmp_path / "student", epochs=2)
    distill(student)
    (table,) = (tmp_path / "student/teacher_table").glob("*/00000.safetensors.sealed")
    assert "masks" in load(bytes(read_checksummed(table)))


def test_each_teacher_has_its_own_folder_and_a_foreign_one_is_refused(
    store: Path, teachers: list[Path], tmp_path: Path
) -> None:
    for teacher in teachers:
        cache(store, teacher).load(tmp_path, CPU, Ranks(), StopFlag())
    folders = sorted(tmp_path.iterdir())
    assert len(folders) == 2
    for folder in folders:
        key = json.loads((folder / "table.json").read_text())
        (folder / "table.json").write_text(json.dumps({**key, "teacher_store": "other"}))
    with pytest.raises(
        CheckpointError, match=r"different teacher logits \(teacher_store was 'other', now '"
    ):
        cache(store, teachers[0]).load(tmp_path, CPU, Ranks(), StopFlag())


def test_runs_share_cached_logits(store: Path, teachers: list[Path], tmp_path: Path) -> None:
    shared = tmp_path / "table"
    for name in ("a", "b"):
        recipe = student_recipe(
            store, teachers[0], tmp_path / name, epochs=1, teacher_table=str(shared)
        )
        distill(recipe)
        times = [p.stat().st_mtime_ns for p in shared.glob("*/*.sealed")]
    assert len(times) == 1
    assert not (tmp_path / "a/teacher_table").exists()


def by_hand(
    logits: list[np.ndarray],
    valid: np.ndarray,
    weights: list[float],
    temperature: float,
    average: str,
) -> np.ndarray:
    rows = []
    for b in range(len(logits[0])):
        heard = [k for k in range(len(logits)) if valid[k, b]]
        share = np.array([weights[k] for k in heard]) / sum(weights[k] for k in heard)
        scaled = [logits[k][b] / temperature for k in heard]
        if average == "logits":
            z = sum(s * z for s, z in zip(share, scaled, strict=True))
            rows.append(np.exp(z) / np.exp(z).sum())
        else:
            p = [np.exp(z) / np.exp(z).sum() for z in scaled]
            rows.append(sum(s * q for s, q in zip(share, p, strict=True)))
    return np.array(rows)


@pytest.mark.parametrize("average", ["probabilities", "logits"])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_several_teachers_are_averaged_as_documented(average: str, temperature: float) -> None:
    rng = np.random.default_rng(0)
    logits = [rng.normal(size=(6, 5)) * 3 for _ in range(3)]
    valid = np.array([[1, 1, 1, 0, 1, 0], [1, 0, 1, 1, 0, 0], [1, 1, 0, 1, 0, 1]], bool)
    weights = [1.0, 2.0, 0.5]
    found = teacher_log_probabilities(
        [torch.from_numpy(z) for z in logits],
        torch.from_numpy(valid),
        weights,
        temperature,
        average,
    )
    wanted = by_hand(logits, valid, weights, temperature, average)
    assert found.exp().numpy() == pytest.approx(wanted, rel=1e-5)


def test_a_student_follows_two_teachers(store: Path, teachers: list[Path], tmp_path: Path) -> None:
    both = {"teacher": [str(t) for t in teachers], "teacher_store": [str(store)]}
    report = distill(student_recipe(store, teachers[0], tmp_path / "s", epochs=2, **both))
    assert report.best["epoch"] > 0
    alone = student_recipe(store, teachers[0], tmp_path / "one", epochs=2)
    distill(alone)
    pair = [(tmp_path / n / "last/model.safetensors").read_bytes() for n in ("s", "one")]
    assert pair[0] != pair[1]


def test_a_teacher_that_was_trained_on_several_stores_as_one_teaches(tmp_path: Path) -> None:
    shapes = {"rgb": (4, 6), "audio": (2, 5)}
    parts = [str(fill_store(tmp_path / m, modalities={m: s})) for m, s in shapes.items()]
    train_teacher(teacher_recipe(Path(), tmp_path / "t", epochs=1, store=parts))
    digests = [FeatureStore.open(Path(part)).digest for part in parts]
    assert list(read_card(tmp_path / "t/best").stores) == digests
    student = {"epochs": 1, "teacher_store": [parts[::-1]]}
    distill(student_recipe(Path(parts[0]), tmp_path / "t", tmp_path / "s", **student))
    with pytest.raises(StoreError, match="a nested list"):
        distill(student_recipe(Path(parts[0]), tmp_path / "t", tmp_path / "u"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher_store": ["a", "b"]}, "2 stores for 1 teachers"),
        ({"teacher_weights": [0.0]}, "not all 0"),
        ({"teacher_weights": [1.0, 1.0]}, "one non-negative weight per teacher"),
        ({"teacher": []}, "teacher"),
    ],
)
def test_teachers_that_do_not_fit_their_stores_are_refused(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        student_recipe(tmp_path, tmp_path, tmp_path / "r", **changes)


def test_logits_are_those_of_the_clip_under_its_mask() -> None:
    logits = torch.arange(2 * 8 * 3, dtype=torch.float16).view(2, 8, 3)
    valid = torch.arange(8).expand(2, 8) > 0
    cached = TeacherLogits(logits, valid, {"verb": 2, "noun": 1}, torch.tensor([-1, 1, 0]))
    clips, mask = torch.tensor([2, 1]), torch.tensor([[True, False, True], [False, False, False]])
    found = cached.logits(clips, mask)
    assert torch.equal(found["verb"], torch.stack([logits[0, 5, :2], logits[1, 0, :2]]))
    assert torch.equal(found["noun"], torch.stack([logits[0, 5, 2:], logits[1, 0, 2:]]))
    assert cached.valid(clips, mask).tolist() == [True, False]
