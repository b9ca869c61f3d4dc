"""`karmma extract --devices`: a part of the work on each device, in one command."""

import sys
from pathlib import Path

import pytest
import yaml
from batch.conftest import EXTRACT
from click.testing import CliRunner, Result
from support.media_files import write_video

from karmma_pipeline.batch.devices import parse_devices
from karmma_pipeline.cli import main
from karmma_pipeline.errors import ConfigError
from karmma_pipeline.store import FeatureStore, verify


def extract(*options: str) -> Result:
    sets = {"teacher": EXTRACT["sets"]["teacher"]}
    Path("extract.yaml").write_text(yaml.safe_dump({**EXTRACT, "sets": sets}))
    return CliRunner().invoke(main, ["extract", "extract.yaml", *options])


def test_a_device_sees_its_own_gpu_alone() -> None:
    gpus = ("2", "GPU-a")
    assert parse_devices("all", gpus) == [("cuda", ("2",)), ("cuda", ("GPU-a",))]
    assert parse_devices("cuda:1, cpu,cuda:1", gpus) == [
        ("cuda", ("GPU-a",)),
        ("cpu", ()),
        ("cuda", ("GPU-a",)),
    ]
    assert parse_devices("cpu,cpu", ()) == [("cpu", ())] * 2


@pytest.mark.parametrize(
    ("text", "gpus", "says"),
    [
        ("all", (), "this machine has no GPU"),
        (
            "cuda:0,cuda:2",
            ("0", "1"),
            "no device 'cuda:2' on this machine; available: cpu, cuda:0, cuda:1",
        ),
        ("cpu,", (), "no device '' on this machine; available: cpu"),
    ],
)
def test_a_device_that_is_not_there_is_named(text: str, gpus: tuple[str, ...], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse_devices(text, gpus)


def test_each_device_does_its_part_and_what_is_missing_is_named(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = here / "python"
    program.write_text(f'#!/bin/sh\necho "$CUDA_VISIBLE_DEVICES: $*" >> {here}/said\nexit 1\n')
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-a")
    result = extract("--devices", "all", "--set", "batch_size=2")
    assert result.exit_code == 1
    assert "part 1/2: features/part1.log (exit code 1) ends with" in result.output
    assert result.output.splitlines()[-1].startswith("Error: part ")  # no store was begun
    words = "-m karmma_pipeline.cli extract extract.yaml --set batch_size=2 --set device=cuda"
    assert sorted((here / "said").read_text().splitlines()) == [
        f"4: {words} --part 1/2",
        f"GPU-a: {words} --part 2/2",
    ]


@pytest.mark.parametrize("options", [("--part", "1/2"), ("--retry",)])
def test_devices_do_all_parts(here: Path, options: tuple[str, ...]) -> None:
    result = extract("--devices", "cpu,cpu", *options)
    assert result.exit_code == 2
    assert "omit --part and --retry" in result.output


def test_inside_an_array_devices_are_refused(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PBS_ARRAY_INDEX", "2")
    monkeypatch.setenv("KARMMA_PARTS", "4")
    result = extract("--devices", "cpu,cpu")
    assert "--devices: this process already extracts one part" in result.output


@pytest.mark.slow
def test_two_devices_make_the_store_of_one(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    write_video(here / "clips/a.mp4", seconds=2)
    rows = "".join(f"c{n},a.mp4,{n / 2},{n / 2 + 0.5},{'xy'[n % 2]}\n" for n in range(4))
    (here / "clips/m.csv").write_text(f"clip_id,video,start,stop,verb\n{rows}")
    stores = []
    for options in (("--devices", "cpu,cpu"), ("--set", "out=alone")):
        result = extract(*options)
        assert result.exit_code == 0, result.output
        out = Path("alone" if "out=alone" in options else "features")
        assert verify(out / "teacher") == []
        stores.append(FeatureStore.open(out / "teacher"))
    assert stores[0].digest == stores[1].digest
    said = [Path(f"features/part{part}.log").read_text() for part in (1, 2)]
    assert all(f"part {n}/2 (from --part {n}/2)" in text for n, text in enumerate(said, 1))
