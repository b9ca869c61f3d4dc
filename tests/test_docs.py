"""The pages of docs/: their commands run, and their links lead somewhere."""

import contextlib
import copy
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner
from pydantic import ValidationError

from karmma_pipeline import config
from karmma_pipeline.cli import main
from karmma_pipeline.config import Recipe
from karmma_pipeline.data.sample import write_sample
from karmma_pipeline.recipes import recipe_model

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
MADE = {"changelog.md", "contributing.md", "benchmarks.md", "recipe_reference.md"}
"""Pages that docs/hooks.py makes."""
MODELS = ("extract", "train-baseline", "distill", "evaluate", "sweep")


def blocks(text: str, kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda path: path.name)
def test_links_lead_somewhere_and_commands_parse(page: Path) -> None:
    text = page.read_text("utf-8")
    for link in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", text):
        if "://" not in link and link not in MADE:
            assert (DOCS / link).exists(), f"{page.name}: {link}"
    assert page.name == "index.md" or f": {page.name}" in (ROOT / "mkdocs.yml").read_text()
    for block in blocks(text, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["karmma"]:
                command: Any = main
                while hasattr(command, "commands"):
                    assert words[1] in command.commands, line
                    command, words = command.commands[words[1]], words[1:]
                with contextlib.suppress(click.BadParameter):  # a file that is not here
                    command.make_context(words[0], words[1:])


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda path: path.name)
def test_recipes_on_the_pages_have_keys_and_values_that_are_allowed(page: Path) -> None:
    for block in blocks(page.read_text("utf-8"), "yaml"):
        lines = block.splitlines()
        keys = {line.partition(": {")[0] for line in lines}
        # `key: {...}` once more and once more
        alternatives = len(keys) < len(lines) and all(": {" in line for line in lines)
        for text in lines if alternatives else [block]:
            tree = config.parse_yaml(text, page.name)
            if set(tree) <= {"rgb", "flow", "audio"}:
                tree = {"sets": {"one": tree}}
            faults = [faults_of(recipe_model(name), tree) for name in MODELS]
            assert [] in faults, f"{page.name}: {text}{min(faults, key=len)}"


def faults_of(model: type[Recipe], tree: dict[str, Any]) -> list[Any]:
    """What is wrong with a recipe, keys aside that a fragment leaves out."""
    try:
        model.model_validate(copy.deepcopy(tree))
    except ValidationError as error:
        return [fault for fault in error.errors() if fault["type"] != "missing"]
    return []


def test_the_pages_of_ones_own_videos_say_the_same() -> None:
    guide = (DOCS / "own_videos.md").read_text("utf-8")
    readme = (ROOT / "README.md").read_text("utf-8")
    assert blocks(guide, "csv") == blocks(readme, "csv")
    steps = blocks(guide, "sh")[0].splitlines()
    assert "\n".join(steps[:2]) in readme


def test_a_modality_of_ones_own_works_word_for_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    section = (DOCS / "extending.md").read_text("utf-8").partition("## A modality of your own")[2]
    (program,) = blocks(section, "python")
    Path("glove.py").write_text(program)
    for line in blocks(section, "sh")[0].replace("\\\n", " ").splitlines():
        words = shlex.split(line)
        if words[0] == "python":
            subprocess.run([sys.executable, *words[1:]], check=True)
        else:
            result = CliRunner().invoke(main, words[1:], catch_exceptions=False)
            assert result.exit_code == 0, f"{line}\n{result.output}"
    results = json.loads(Path("glove_report/results.json").read_text())
    assert results["data"]["present"] == {"imu": 12}  # of the 15 clips of val
    assert (tmp_path / "glove_report/index.html").stat().st_size > 10_000


@pytest.mark.slow
def test_the_modules_on_the_path_of_a_clip_are_those_of_the_page() -> None:
    traced = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "clip_path.py"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    # The last line is their number.
    assert (DOCS / "data_flow.md").read_text("utf-8").endswith(traced.rpartition("\n\n")[0] + "\n")


@pytest.mark.slow
def test_the_notebook_runs_and_is_that_of_its_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = json.loads((DOCS / "notebook.ipynb").read_text("utf-8"))["cells"]
    code = "".join("".join(cell["source"]) + "\n" for cell in cells if cell["cell_type"] == "code")
    (block,) = blocks((DOCS / "notebook.md").read_text("utf-8"), "python")
    assert [line for line in code.splitlines() if line] == [
        line for line in block.splitlines() if line
    ]
    monkeypatch.chdir(tmp_path)
    write_sample(Path("clips"), clips=12)
    arguments = ["init", "project", ".", "--manifest", "clips/manifest.csv", "--size", "tiny"]
    assert CliRunner().invoke(main, arguments, catch_exceptions=False).exit_code == 0
    names: dict[str, Any] = {}
    exec(code, names)  # noqa: S102
    assert len(names["preds"]) == 3
