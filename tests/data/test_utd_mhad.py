"""UTD-MHAD as downloaded, with made-up signals in files of its form."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import io
from support.here_pool import HerePool

from karmma_pipeline import config
from karmma_pipeline.data.datasets import read_dataset
from karmma_pipeline.data.datasets.utd_mhad import UtdMhad
from karmma_pipeline.errors import ConfigError, ManifestError
from karmma_pipeline.extraction.decode import pool
from karmma_pipeline.extraction.pipeline import extract
from karmma_pipeline.extraction.recipe import ExtractRecipe
from karmma_pipeline.store import FeatureStore

RECIPE = Path(__file__).parents[2] / "extract/utd_mhad.yaml"


def write_sequence(
    root: Path, name: str, parts: tuple[str, ...] = ("inertial", "skeleton")
) -> None:
    """Write 4 s: acceleration 1, 2, 3 g, rotation 10, 20, 30; joint j at (j, 2j, 3j) + a step."""
    for folder in ("Inertial", "Skeleton", "RGB"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    if "inertial" in parts:
        rows = np.tile([1.0, 2, 3, 10, 20, 30], (200, 1))
        io.savemat(root / f"Inertial/{name}_inertial.mat", {"d_iner": rows})
    if "skeleton" in parts:
        joints = np.arange(20)[:, None, None] * np.array([1.0, 2, 3])[None, :, None]
        walk = np.linspace(0, 5, 120)  # all joints move alike
        io.savemat(root / f"Skeleton/{name}_skeleton.mat", {"d_skel": joints + walk})
    if "color" in parts:
        (root / f"RGB/{name}_color.avi").touch()


def build(**values: Any) -> UtdMhad:
    return config.build(UtdMhad, {"kind": "utd_mhad", **values}, "r.yaml")


def test_sequences_have_the_published_classes_subjects_and_split(tmp_path: Path) -> None:
    for action, subject in ((1, 1), (27, 2), (9, 7)):
        write_sequence(tmp_path, f"a{action}_s{subject}_t1")
    write_sequence(tmp_path, "a2_s3_t4", ("skeleton", "color"))
    manifest = read_dataset(build(root=str(tmp_path)))
    assert [c.clip_id for c in manifest.clips] == ["a1_s1_t1", "a2_s3_t4", "a9_s7_t1", "a27_s2_t1"]
    names = manifest.heads["activity"]
    assert len(names) == 27
    assert [names[c.labels["activity"]] for c in manifest.clips] == [
        "swipe left", "swipe right", "draw circle clockwise", "squat"
    ]  # fmt: skip
    assert [c.split for c in manifest.clips] == ["train", "train", "train", "test"]
    assert [c.group for c in manifest.clips] == ["s1", "s3", "s7", "s2"]
    assert [*manifest.clips[1].media] == ["skeleton", "rgb", "flow"]
    assert "4 of the 861 sequences" in manifest.notes
    held_out = read_dataset(build(root=str(tmp_path), val_subjects=[7], test_subjects=[1]))
    assert Counter(c.split for c in held_out.clips) == {"train": 2, "val": 1, "test": 1}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"val_subjects": [2]}, "2 is also in test_subjects"),
        ({"val_subjects": [9]}, "val_subjects"),
        ({"val_subjects": [1, 3, 5, 7]}, "leave no subject for training"),
    ],
)
def test_splits_that_make_no_sense_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(root="r", **values)


def test_a_folder_without_sequences_is_told(tmp_path: Path) -> None:
    with pytest.raises(
        ManifestError, match="no sequence found; expected files such as Inertial/a1_s1_t1"
    ):
        read_dataset(build(root=str(tmp_path)))
    write_sequence(tmp_path, "a28_s1_t1")
    with pytest.raises(ManifestError, match="a28_s1_t1: actions are 1 to 27"):
        read_dataset(build(root=str(tmp_path)))


def test_the_shipped_recipe_makes_one_store_of_all_sensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "DecodePool", HerePool)
    for name in ("a1_s1_t1", "a2_s7_t1"):
        write_sequence(tmp_path, name)
    places = [f"dataset.root={tmp_path}", f"out={tmp_path}/out"]
    extract(config.load(ExtractRecipe, RECIPE, places))
    store = FeatureStore.open(tmp_path / "out/sensors")
    assert store.modalities == ("accelerometer", "gyroscope", "skeleton")
    assert [store.shape(m) for m in store.modalities] == [(16, 18), (16, 18), (16, 120)]
    assert store.present.all()
    assert store.split.tolist() == ["train", "val"]
    accelerometer, gyroscope, skeleton = (store.tokens(m, b"a1_s1_t1") for m in store.modalities)
    np.testing.assert_allclose(accelerometer.reshape(-1, 3), [[1, 2, 3]] * 96, rtol=1e-5)
    np.testing.assert_allclose(gyroscope.reshape(-1, 3), [[10, 20, 30]] * 96, rtol=1e-5)
    # Around the hips, joint 3, all that is left of a walk is where joints lie to one another.
    joints = (np.arange(20)[:, None] - 3) * np.array([1, 2, 3])
    np.testing.assert_allclose(skeleton.reshape(32, 20, 3), [joints] * 32, atol=1e-4)
