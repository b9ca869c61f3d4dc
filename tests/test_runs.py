import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import Field

from karmma_pipeline import runs
from karmma_pipeline.config import Recipe
from karmma_pipeline.errors import CheckpointError, ConfigError
from karmma_pipeline.runs import RunFolder


class Example(Recipe):
    """A recipe."""

    size: int = 1
    part: dict[str, int] = Field({"a": 1})


def begin(folder: Path, recipe: Recipe) -> None:
    with RunFolder(folder, recipe) as run:
        run.claim(recipe)


def test_a_run_folder_explains_itself_and_can_be_opened_again(tmp_path: Path) -> None:
    for _ in range(2):
        with RunFolder(tmp_path / "r", Example()) as run:
            run.claim(Example())
            run.log("hello")
            run.write_metrics([{"epoch": 1, "loss": 0.5}])
    assert (tmp_path / "r/recipe.yaml").read_text().startswith("version: 2\nsize: 1\n")
    environment = json.loads((tmp_path / "r/environment.json").read_text())
    assert environment["packages"]["torch"]
    lines = (tmp_path / "r/log.txt").read_text().splitlines()
    assert [line.split(" ", 1)[1] for line in lines] == ["hello", "hello"]
    assert (tmp_path / "r/metrics.jsonl").read_text() == '{"epoch": 1, "loss": 0.5}\n'


def test_another_recipe_is_refused_with_the_difference(tmp_path: Path) -> None:
    begin(tmp_path / "r", Example())
    (tmp_path / "r/best").mkdir()
    with pytest.raises(ConfigError, match=r"part\.a was 1, now 2"):
        RunFolder(tmp_path / "r", Example(part={"a": 2}))


def test_a_folder_with_other_files_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ConfigError, match=r"contains other files, such as thesis\.tex, but no run"):
        RunFolder(tmp_path, Example())
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(ConfigError, match="is a file"):
        RunFolder(tmp_path / "thesis.tex", Example())


def test_what_a_killed_start_left_is_taken_over_and_swept(tmp_path: Path) -> None:
    (tmp_path / "environment.json").write_text("{}")
    (tmp_path / ".recipe.yaml.abc.tmp").write_text("half")
    (tmp_path / "state").mkdir()
    (tmp_path / "state").rmdir()
    begin(tmp_path, Example())
    assert not list(tmp_path.glob("*.tmp"))
    assert not list(tmp_path.glob(".*.tmp"))
    assert (tmp_path / "recipe.yaml").is_file()


def test_two_processes_never_train_into_one_folder(tmp_path: Path) -> None:
    folder = tmp_path / "r"
    another = (
        "import pathlib, sys\n"
        "from karmma_pipeline.config import Recipe\n"
        "from karmma_pipeline.runs import RunFolder\n"
        "RunFolder(pathlib.Path(sys.argv[1]), Recipe()).close()\n"
    )

    def ask() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", another, folder], capture_output=True, text=True, check=False
        )

    with RunFolder(folder, Recipe()):
        refused = ask()
        assert refused.returncode != 0
        assert " is training in this folder; choose another" in refused.stderr
    assert ask().returncode == 0


def test_a_rank_that_does_not_write_leaves_no_trace(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "r", Example(), writes=False) as run:
        run.note("x")
        run.write_metrics([{"a": 1.0}])
    assert not (tmp_path / "r").exists()


def test_the_commit_is_found_without_a_lock_that_a_kill_would_leave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*arguments: str) -> str:
        who = ["user.name=x", "user.email=x@example.org", "commit.gpgsign=false"]
        options = [word for one in who for word in ("-c", one)]
        command = ["git", "-C", str(tmp_path), *options, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    code = tmp_path / "runs.py"
    code.write_text("")
    monkeypatch.setattr(runs, "__file__", str(code))
    git("init")
    git("add", "runs.py")
    git("commit", "-m", "first")
    os.utime(code, (1, 1))  # git would note the new time in its index, and lock it for that
    before = (tmp_path / ".git/index").read_bytes()
    assert runs.commit() == git("rev-parse", "HEAD").strip()
    assert (tmp_path / ".git/index").read_bytes() == before
    code.write_text("changed")
    assert runs.commit().endswith("+")


def test_a_folder_of_seeds_names_its_runs(tmp_path: Path) -> None:
    for seed in (1, 0):
        (tmp_path / f"student/seed{seed}/best").mkdir(parents=True)
        (tmp_path / f"student/seed{seed}/best/model.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"the runs seed0, seed1; give one .*student/seed0"):
        runs.saved_folder(tmp_path / "student")
