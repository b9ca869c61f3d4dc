"""Sensors from a CSV's column to a prediction, by the same path as media."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.here_pool import HerePool
from support.training import baseline_recipe, says

from karmma_pipeline import config
from karmma_pipeline.data.manifest import read_manifest
from karmma_pipeline.data.sources import SensorSource
from karmma_pipeline.errors import ConfigError, ManifestError
from karmma_pipeline.extraction.decode import pool
from karmma_pipeline.extraction.estimate import survey
from karmma_pipeline.extraction.pipeline import extract
from karmma_pipeline.extraction.recipe import ExtractRecipe, read_clips
from karmma_pipeline.modalities import Reason
from karmma_pipeline.recognition.backbones import sensors_of
from karmma_pipeline.recognition.clips import Spans, wanted_clips
from karmma_pipeline.recognition.recognizer import Recognizer
from karmma_pipeline.store import FeatureStore
from karmma_pipeline.training.stages import train_baseline

SENSORS: dict[str, Any] = {
    "imu": {"channels": ["a", "b"], "time": "t", "rate_hz": 50, "windows": 4, "window": 5},
    "gaze": {"channels": 2, "source_hz": 30, "offset_s": 0.5, "rate_hz": 10, "window": 2,
             "windows": 3, "max_gap_s": 0.2},
}  # fmt: skip
SETS = {"one": {"imu": {"name": "windows"}, "gaze": {"name": "windows"}}}
HEADER = ["clip_id", "start", "stop", "verb", "split", "imu", "gaze"]
ROWS = [
    ["c0", "1", "2", "x", "train", "imu.csv", "gaze.npy"],
    ["c1", "2", "3.5", "y", "train", "imu.csv", "gaze.npy"],
    ["c2", "5.5", "7.5", "x", "train", "imu.csv", "gaze.npy"],  # no IMU from 6 to 7 s
    ["c3", "8", "9", "y", "val", "imu.csv", ""],
    ["c4", "8", "9", "x", "val", "gone.csv", "gaze.npy"],
    ["c5", "9.5", "12", "y", "val", "imu.csv", "gaze.npy"],  # both end at 10 s
]
T = np.arange(1000) / 100


def write_rows(folder: Path, *more: list[str]) -> None:
    with (folder / "m.csv").open("w", newline="") as file:
        csv.writer(file).writerows([HEADER, *ROWS, *more])


def write_imu(folder: Path, hole: bool) -> None:
    table = np.column_stack([T, 10 * T, -T])[(T < 6) | (T > 7) | (not hole)]
    np.savetxt(folder / "imu.csv", table, "%.4f", ",", header="t,a,b", comments="")


def recipe(folder: Path, **changes: Any) -> ExtractRecipe:
    tree: dict[str, Any] = {
        "manifest": str(folder / "m.csv"),
        "out": str(folder / "out"),
        "sensors": SENSORS,
        "sets": SETS,
        "store": {"dtype": "float32", "clips_per_shard": 4},
        "max_failures": 1.0,
        **changes,
    }
    return config.build(ExtractRecipe, tree, "r.yaml")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(pool, "DecodePool", HerePool)
    write_rows(tmp_path)
    write_imu(tmp_path, hole=True)
    own = np.arange(285) / 30  # the recorder started at 0.5 s
    np.save(tmp_path / "gaze.npy", np.column_stack([own + 0.5, np.ones(285)]))
    return tmp_path


def test_sensors_are_extracted_and_planned_as_media_are(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = recipe(folder)
    extract(made)
    store = FeatureStore.open(folder / "out/one")
    assert store.modalities == ("gaze", "imu")
    assert (store.shape("imu"), store.shape("gaze")) == ((4, 10), (3, 4))

    imu = store.tokens("imu", b"c1").reshape(4, 5, 2)  # 0.1 s each, from 2 s to 3.5 s
    starts = 2 + np.arange(4) * 1.4 / 3
    moments = starts[:, None] + np.arange(5) / 50
    np.testing.assert_allclose(imu, np.stack([10 * moments, -moments], -1), atol=2e-3)
    gaze = store.tokens("gaze", b"c1").reshape(3, 2, 2)
    moments = (2 + np.arange(3) * 1.3 / 2)[:, None] + np.arange(2) / 10
    np.testing.assert_allclose(gaze[..., 0], moments, atol=2e-3)

    present = Reason.PRESENT
    assert store.reasons.tolist() == [
        [present, present],
        [present, present],
        [present, Reason.GAP],
        [Reason.NOT_IN_DATASET, present],
        [present, Reason.FILE_MISSING],
        [Reason.OUT_OF_RANGE, Reason.OUT_OF_RANGE],
    ]
    with (folder / "out/failures.csv").open(newline="") as file:
        lines = {(row["clip_id"], row["modality"]): row for row in csv.DictReader(file)}
    assert lines["c2", "imu"]["detail"] == (f"{folder}/imu.csv: no samples from 5.990 s to 7.010 s")
    assert "max_gap_s" in lines["c2", "imu"]["hint"]
    facts = store.provenance["imu"]["sensor"]
    assert (facts["channels"], facts["rate_hz"], facts["max_gap_s"]) == (["a", "b"], 50, 0.25)

    monkeypatch.setattr(
        survey, "check_sources", lambda some, check, probe: {k: check(s) for k, s in some.items()}
    )
    monkeypatch.setattr(survey, "open_pool", lambda settings, *_: HerePool(settings))
    monkeypatch.setattr(survey, "TRIED", 1)  # which is not for sensors
    seen = survey.Survey(made, read_clips(made))
    planned = [[seen.outcomes[clip.clip_id, m][0] for m in store.modalities] for clip in seen.clips]
    assert planned == store.reasons.tolist()
    found = seen.facts()
    assert found["files"]["count"] == 3
    assert "no samples from 5.990 s" in found["lost"]["gap"]["c2"]


def test_a_mended_file_and_a_longer_list_are_extracted_by_the_same_command(folder: Path) -> None:
    extract(recipe(folder))
    write_imu(folder, hole=False)
    write_rows(folder, ["c6", "3", "4", "x", "val", "imu.csv", "gaze.npy"])
    extract(recipe(folder))
    store = FeatureStore.open(folder / "out/one")
    assert store.reasons[2].tolist() == [Reason.PRESENT] * 2
    moments = (5.5 + np.arange(4) * 1.9 / 3)[:, None] + np.arange(5) / 50
    np.testing.assert_allclose(store.tokens("imu", b"c2")[:, 1::2], -moments, atol=2e-3)
    assert store.clip_ids.tolist() == [f"c{n}".encode() for n in range(7)]
    assert store.present[6].all()
    with pytest.raises(Exception, match="window"):  # other tokens do not go into this store
        extract(recipe(folder, sensors={**SENSORS, "imu": {**SENSORS["imu"], "window": 6}}))


def test_a_model_of_sensors_reads_rows_as_it_was_trained(folder: Path) -> None:
    extract(recipe(folder))
    run = folder / "run"
    train_baseline(baseline_recipe(folder / "out/one", run, epochs=2, batch_size=4))
    assert sensors_of(run).keys() == {"gaze", "imu"}
    (folder / "rows.csv").write_text(
        "clip_id,start,stop,imu,gaze\n"
        f"c0,1,2,{folder}/imu.csv,{folder}/gaze.npy\nc3,8,9,{folder}/imu.csv,\n"
    )
    clips = wanted_clips([folder / "rows.csv"], Spans(), sensors_of(run)).clips
    answers = list(Recognizer.load(run / "last", "cpu").predict(clips, workers=0))
    assert answers[1].reasons == {"gaze": "not_in_dataset"}
    evaluated = says(run, folder / "out/one")[[0, 3]]
    got = torch.stack([torch.from_numpy(answer.logits["verb"]) for answer in answers])
    torch.testing.assert_close(got, evaluated, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sets": {"one": {"imuu": {"name": "windows"}}}}, "did you mean 'imu'"),
        ({"sensors": {}}, "add it under sensors.imu"),
        ({"sensors": {"rgb": SENSORS["imu"]}}, "'rgb': this name is reserved"),
        ({"sensors": {"imu": {"channels": 3}}}, "sensors.imu.rate_hz: required key is missing"),
        ({"sets": {"one": {"imu": {"name": "swin3d_t"}}}}, "does not take sensor series"),
        ({"sets": {"one": {"imu": {"name": "windows", "frames": 3}}}}, "frames, size and image"),
        ({"sets": {"one": {"imu": {"name": "windows", "weights": "random:0"}}}}, "no weights"),
        ({"sets": {"one": {"imu": {"name": "windows", "series": [1, 2, 3]}}}}, r"has \[4, 5, 2\]"),
    ],
)
def test_recipes_that_say_nothing_of_a_sensor_are_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        recipe(tmp_path, **changes)


@pytest.fixture
def listed(tmp_path: Path) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        (tmp_path / "m.csv").write_text(text)
        return read_manifest(tmp_path / "m.csv", sensors=("imu",))

    return read


def test_lists_name_a_file_of_each_sensor(listed: Callable[[str], Any], tmp_path: Path) -> None:
    both = listed("clip_id,video,imu,verb\na,v.mp4,s/a.csv,x\nb,v.mp4,,y\n")
    assert both.clips[0].media["imu"] == SensorSource(tmp_path / "s/a.csv")
    assert [*both.clips[1].media] == ["rgb", "flow", "audio"]
    assert [*both.heads] == ["verb"]
    (alone,) = listed("clip_id,imu,verb\na,a.MAT,x\n").clips
    assert [*alone.media] == ["imu"]
    with pytest.raises(
        ManifestError, match=r"line 2: imu='a.xlsx': unknown file extension; known:"
    ):
        listed("clip_id,imu,verb\na,a.xlsx,x\n")
    with pytest.raises(ManifestError, match="line 2: imu is empty"):
        listed("clip_id,imu,verb\na,,x\n")
