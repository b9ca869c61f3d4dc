"""Folders that older programs wrote are read, finished and used by this one.

tests/fixtures/README.md says what lies in an archive and how it was made.
"""

import json
import re
import socket
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from click.testing import CliRunner
from safetensors.numpy import load_file

from karmma_pipeline.cli import main
from karmma_pipeline.evaluation import results
from karmma_pipeline.extraction.inference import networks
from karmma_pipeline.store import FeatureStore

ARCHIVES = sorted((Path(__file__).parent / "fixtures").glob("*.tar.xz"))
NO_PROCESS = 999_999_999


@pytest.fixture(params=ARCHIVES, ids=lambda path: path.name.split(".")[0], autouse=True)
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unpack an archive and work in it, as its recipes name everything relative to it."""
    with tarfile.open(request.param) as archive:
        archive.extractall(tmp_path, filter="data")
    # The lock names a process of the machine that wrote it. A process of that number may live
    # here, and of another machine nobody knows whether its processes do: make it a dead one.
    lock = f"{socket.gethostname()} {NO_PROCESS} -"
    (tmp_path / "half/tokens/spool/000001/lock").write_text(lock)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path / "inputs"))
    monkeypatch.delitem(sys.modules, "nets", raising=False)
    pretend_versions(monkeypatch)


def pretend_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Report the libraries that made the store: rightly, others' versions would refuse to go on."""
    spec = json.loads(Path("features/tokens/spec.json").read_text())["spec"]
    audio = spec["modalities"]["audio"]["provenance"]
    decord, pyav = re.findall(r"[\d.]+", audio["decoder"])
    made_with = {"decord": decord, "av": pyav, "librosa": audio["audio"]["librosa"]}
    monkeypatch.setattr(networks, "version", made_with.__getitem__)
    monkeypatch.setattr(torchvision, "__version__", audio["torchvision"])


def karmma(*arguments: str) -> str:
    done = CliRunner().invoke(main, list(arguments), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def tokens_of(path: str) -> dict[str, np.ndarray]:
    store = FeatureStore.open(Path(path))
    everything = torch.arange(len(store))
    tokens = {m: store.gather(m, everything).numpy() for m in store.modalities}
    store.close()
    return tokens


def contents(path: str) -> dict[str, tuple[bytes, int, int]]:
    """Everything in a folder, and whether it was written again."""
    return {
        str(p): (p.read_bytes(), p.stat().st_ino, p.stat().st_mtime_ns)
        for p in sorted(Path(path).rglob("*"))
        if p.is_file()
    }


def model(run: str) -> dict[str, Any]:
    return dict(load_file(f"{run}/last/model.safetensors"))


def assert_close(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Other processors round otherwise."""
    assert one.keys() == other.keys()
    for name in one:
        left, right = (_without_key_bias(name, arrays[name]) for arrays in (one, other))
        np.testing.assert_allclose(left, right, rtol=1e-2, atol=1e-3, err_msg=name)


def _without_key_bias(name: str, array: Any) -> Any:
    """A softmax does not see the keys' bias: its gradient is rounding, which AdamW makes a step."""
    return np.split(array, 3)[::2] if name.endswith("qkv.bias") else array


def test_a_whole_store_is_read_and_verified() -> None:
    assert "OK" in karmma("store", "verify", "features/tokens")
    found = tokens_of("features/tokens")
    with np.load("expected.npz") as arrays:
        expected = dict(arrays)
    assert sorted(found) == sorted(expected)
    for modality, tokens in found.items():
        np.testing.assert_array_equal(tokens, expected[modality])
    store = FeatureStore.open(Path("features/tokens"))
    assert store.clip_ids.tolist() == [f"c{i}".encode() for i in range(8)]
    assert store.heads == {"noun": ("x", "y", "z"), "verb": ("a", "b")}
    store.close()


def test_a_whole_extraction_is_done() -> None:
    before = contents("features/tokens")
    karmma("extract", "recipes/extract.yaml")
    assert contents("features/tokens") == before


@pytest.mark.slow
def test_a_half_done_store_is_finished() -> None:
    (first,) = Path("half/tokens/commit").iterdir()
    shards = [contents(f"half/tokens/{m}/tokens/c/0") for m in ("rgb", "audio")]
    before = first.read_bytes(), shards
    karmma("extract", "recipes/half.yaml")
    shards = [contents(f"half/tokens/{m}/tokens/c/0") for m in ("rgb", "audio")]
    assert (first.read_bytes(), shards) == before
    assert "OK" in karmma("store", "verify", "half/tokens")
    assert not Path("half/tokens/spool").exists()
    with np.load("expected.npz") as arrays:
        assert_close(tokens_of("half/tokens"), dict(arrays))


def test_a_run_that_was_stopped_goes_on() -> None:
    logits, metrics = contents("runs/logits"), Path("runs/stopped/metrics.jsonl")
    first = metrics.read_text()
    assert first.count("\n") == 1
    karmma("distill", "recipes/stopped.yaml")
    assert metrics.read_text().startswith(first)  # with its times: not trained again
    assert metrics.read_text().count("\n") == 2
    assert contents("runs/logits") == logits
    assert_close(model("runs/stopped"), model("runs/student"))


@pytest.mark.parametrize(
    ("command", "name"), [("train-teacher", "teacher"), ("distill", "student")]
)
def test_a_run_that_is_done_stays_so(command: str, name: str) -> None:
    before = contents(f"runs/{name}/best"), contents(f"runs/{name}/last")
    karmma(command, f"recipes/{name}.yaml")
    assert (contents(f"runs/{name}/best"), contents(f"runs/{name}/last")) == before


def test_a_teachers_logits_are_not_computed_again() -> None:
    before = contents("runs/logits")
    karmma("distill", "recipes/student.yaml", "--set", "out=runs/new")
    assert contents("runs/logits") == before
    made_with = json.loads(Path("runs/student/environment.json").read_text())["packages"]["torch"]
    if torch.__version__.startswith(made_with):  # releases draw other weights from a seed
        assert_close(model("runs/new"), model("runs/student"))


def test_runs_are_evaluated_and_their_report_is_read() -> None:
    karmma("evaluate", "--recipe", "recipes/report.yaml", "--set", "out=again")
    for path in Path("report/logits").iterdir():
        assert_close(dict(load_file(path)), dict(load_file(f"again/logits/{path.name}")))
    old, new = (json.loads(Path(f"{f}/results.json").read_text()) for f in ("report", "again"))
    assert [run["subsets"] for run in new["runs"]] == [run["subsets"] for run in old["runs"]]
    read = results.read(Path("report/results.json"))
    assert [run.name for run in read.runs] == ["Teacher", "Student"]


def test_a_report_is_made_again_in_its_folder() -> None:
    karmma("evaluate", "--recipe", "recipes/report.yaml")
    assert Path("report/index.html").is_file()
