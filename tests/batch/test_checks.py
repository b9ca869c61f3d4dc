"""What a sweep or a chain is refused for before its first stage begins, hours before its last."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from batch.conftest import write_chain
from batch.test_sweep import METHODS, write_sweep
from click.testing import CliRunner
from support.tiny_store import write_store

from karmma_pipeline.batch.chain import load_chain
from karmma_pipeline.cli import main


@pytest.fixture(autouse=True)
def files(here: Path) -> Path:
    """The current folder, with two stores and lists that do not fit them."""
    for name in ("teacher", "student"):
        write_store(here / "features" / name, clips=24)
    Path("modality.csv").write_text("clip_id,missing\nc000,sound\n")
    Path("ids.txt").write_text("c000\nnobody\n")
    Path("broken.py").write_text("import nothing_of_that_name\n")
    return here


def refused(path: Path) -> str:
    result = CliRunner().invoke(main, ["sweep", str(path)])
    assert result.exit_code == 2, result.output
    assert not Path("sw").exists()
    assert result.output.count("\n") == 1
    return result.output


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"robustness": {"patterns": {"x": "no.csv"}}}, "report: no.csv does not exist."),
        (
            {"robustness": {"patterns": {"x": "modality.csv"}}},
            "report: modality.csv, line 2: missing='sound' is not a modality; the store has rgb, "
            "flow, audio; join several with +.",
        ),
        ({"submission": {}}, "report: submission: the store has the heads and classes {'noun': 3"),
        ({"split": "tset"}, "no clip is in split='tset'; its splits: train, val."),
        ({"exclude": "ids.txt"}, "has no clip 'nobody'; write one clip id per line."),
        ({"groups": {"tail": {"tool": "ids.txt"}}}, "groups.tail: head 'tool' is unknown"),
    ],
)
def test_of_the_report(settings: dict[str, Any], message: str) -> None:
    path = write_sweep()
    tree = yaml.safe_load(path.read_text())
    tree["evaluate"]["set"] |= settings
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    told = refused(path)
    assert told.startswith("Error: nothing was started: report: ")
    assert message in told


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"select_by": "top1"}, "select_by='top1': must be one of noun_top1, verb_top1, action"),
        ({"val_split": "tset"}, "no clip is in split='tset'"),
        ({"exclude": "ids.txt"}, "has no clip 'nobody'"),
        ({"modality_dropout": {"patterns": "modality.csv"}}, "missing='sound' is not a modality"),
        (
            {"modality_dropout": {"rate": {"sound": 0.5}}},
            "modality_dropout.rate: unknown modality 'sound'",
        ),
        ({"objective": "broken:loss"}, "objective='broken:loss': cannot be imported (Mod"),
        (
            {"init_from": "elsewhere"},
            "elsewhere does not exist, and no stage of the chain writes it",
        ),
    ],
)
def test_of_a_student_whose_teacher_would_be_trained_first(
    settings: dict[str, Any], message: str
) -> None:
    student = {**METHODS["student"], "grid": {}, "set": settings}
    told = refused(write_sweep(student=student))
    assert told.startswith("Error: nothing was started: student/seed0, student/seed1: ")
    assert message in told


def test_a_training_waits_for_the_run_that_it_begins_from_and_needs_it_no_more_afterwards(
    here: Path,
) -> None:
    write_chain(extract=None)
    student = {**yaml.safe_load(Path("student.yaml").read_text()), "init_from": "runs/first/best"}
    Path("student.yaml").write_text(yaml.safe_dump(student))
    first = {"store": "features/student", "out": "runs/first"}
    Path("first.yaml").write_text(yaml.safe_dump(first))
    stages = yaml.safe_load(Path("chain.yaml").read_text())["stages"]
    stages = {"first": {"command": "train-baseline", "recipe": "first.yaml"}, **stages}
    Path("chain.yaml").write_text(yaml.safe_dump({"stages": stages}, sort_keys=False))
    student_stage = load_chain(Path("chain.yaml"))[1][2]
    assert student_stage.waits == ("first", "teacher")
    Path("runs/student/state").mkdir(parents=True)
    assert load_chain(Path("chain.yaml"))[1][2].waits == ("teacher",)
