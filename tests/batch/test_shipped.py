"""docs/hpc.md, step by step on a login node: the shipped chain for EPIC-KITCHENS-100."""

import os
import re
import shutil
from pathlib import Path

import pytest
from batch.conftest import FakeSlurm
from click.testing import CliRunner, Result
from support.epic import touch, write_annotations

from karmma_pipeline import config
from karmma_pipeline.cli import main
from karmma_pipeline.extraction.recipe import ExtractRecipe
from karmma_pipeline.models.backbones.state_dicts import cached_file, enum_member

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs/hpc.md").read_text()
CHAIN = "batch/epic_kitchens_100.yaml"


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A clone with the data set where the guide puts it; its videos are empty files."""
    monkeypatch.chdir(tmp_path)
    for stage in ("batch", "extract", "train", "evaluate"):
        shutil.copytree(ROOT / stage, tmp_path / stage)
    write_annotations(tmp_path / "data/epic-kitchens-100-annotations")
    names = ("P01/videos/P01_01.MP4", "P02/videos/P02_103.MP4", "P03/videos/P03_02.MP4")
    touch(tmp_path / "data/EPIC-KITCHENS", *names)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


def fetched() -> list[tuple[str, str]]:
    return re.findall(r"^karmma backbones fetch (\S+) (\S+)$", GUIDE, re.MULTILINE)


def test_the_guide_fetches_what_the_shipped_recipe_needs() -> None:
    sets = config.load(ExtractRecipe, ROOT / "extract/epic_kitchens_100.yaml").sets
    needed = {(c.name, c.weights) for choices in sets.values() for c in choices.values()}
    assert set(fetched()) == needed


def test_a_node_without_weights_or_network_says_so_before_anything_is_queued(
    clone: Path, slurm: FakeSlurm
) -> None:
    result = run("submit", CHAIN)
    assert result.exit_code == 2
    assert slurm.jobs() == []
    assert result.output.startswith("Error: nothing was started: extract: ")
    named = re.findall(r"`karmma backbones fetch (\S+) (\S+)` with TORCH_HOME", result.output)
    assert named == fetched()


def test_the_shipped_chain_is_sent_off_from_videos_to_the_report(
    clone: Path, slurm: FakeSlurm
) -> None:
    sets = config.load(ExtractRecipe, Path("extract/epic_kitchens_100.yaml")).sets
    for choice in (c for choices in sets.values() for c in choices.values()):
        path = cached_file(enum_member(choice.architecture, choice.weights))
        touch(path.parent, path.name)
    site = Path("site.yaml")
    site.write_text(f"account: proj\nenv: {{TORCH_HOME: {os.environ['TORCH_HOME']}}}\n")
    dry = run("submit", CHAIN, "--site", "site.yaml", "--dry-run")
    assert dry.output.count("#!/usr/bin/env bash") == 7
    assert slurm.jobs() == []
    result = run("submit", CHAIN, "--site", "site.yaml")
    assert result.exit_code == 0, result.output
    assert result.output.count("submitted as job") == 7
    assert "report: submitted as job 107, afterok:102:103:104:105:106" in result.output
    assert "extract         2 pending  not started" in run("status", CHAIN).output
