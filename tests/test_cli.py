import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from support.tiny_store import write_store

from karmma_pipeline import config
from karmma_pipeline.cli import main
from karmma_pipeline.cli.init import STAGES
from karmma_pipeline.recipes import recipe_model


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def test_help_names_every_command() -> None:
    result = run("--help")
    assert result.exit_code == 0
    for command in ("demo", "sample", "extract", "train-teacher", "distill", "evaluate", "store"):
        assert f"\n  {command}" in result.output


@pytest.mark.parametrize("stage", STAGES)
def test_init_writes_a_recipe_that_parses(stage: str, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    assert run("init", stage, "--out", path).exit_code == 0
    config.load(recipe_model(stage), path)
    assert path.read_text() in run("init", stage).output + "\n"
    again = run("init", stage, "--out", path)
    assert again.exit_code == 2
    assert "the file exists" in again.output


def test_a_wrong_recipe_is_exit_code_2_and_one_sentence(tmp_path: Path) -> None:
    result = run("extract", tmp_path / "none.yaml")
    assert result.exit_code == 2
    assert "karmma init" in result.output
    (tmp_path / "r.yaml").write_text("stroe: x\nout: y\n")
    result = run("train-teacher", tmp_path / "r.yaml")
    assert result.exit_code == 2
    assert "stroe: unknown key, did you mean 'store'?" in result.output
    assert "Traceback" not in result.output


def test_check_prints_the_resolved_recipe_and_does_nothing(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(f"store: {tmp_path}/s\nout: {tmp_path}/run\n")
    switches = ["--set", "optimiser.lr=3e-4", "--stage", tmp_path / "it's: #1"]
    result = run("train-teacher", tmp_path / "r.yaml", "--check", *switches)
    assert result.exit_code == 0
    assert "lr: 0.0003" in result.output
    resolved = config.parse_yaml(result.output, "")
    assert resolved["loader"]["stage"] == str(tmp_path / "it's: #1")
    assert not (tmp_path / "run").exists()


def test_a_missing_store_is_exit_code_1(tmp_path: Path) -> None:
    result = run("store", "info", tmp_path)
    assert result.exit_code == 1
    assert "no feature store is there" in result.output


def test_store_commands_tell_whole_from_damaged(tmp_path: Path) -> None:
    root = write_store(tmp_path / "s", clips=8)
    assert "clips: 8" in run("store", "info", root).output
    assert "whole" in run("store", "verify", root).output
    assert run("store", "finalize", root).exit_code == 0
    shard = root / "rgb/tokens/c/0/0"
    data = bytearray(shard.read_bytes())
    data[16_384] ^= 1
    shard.write_bytes(data)
    result = run("store", "verify", root)
    assert result.exit_code == 1
    assert "shard 0 rgb: bytes have changed: c000" in result.output


def test_backbones_are_listed_and_described() -> None:
    assert "swin3d_b" in run("backbones", "list").output
    shown = run("backbones", "show", "swin3d_t", "--set", "frames=32", "--set", "tokens=[12,5,5]")
    assert "tokens: 300" in shown.output
    assert "gflops: 175.527" in shown.output


def test_the_program_answers_help_without_loading_networks() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "karmma_pipeline.cli", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert " torch" not in done.stderr
    assert " numpy" not in done.stderr
