"""README's blocks, word for word, on generated clips and small networks."""

import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner

from karmma_pipeline import config
from karmma_pipeline.cli import main
from karmma_pipeline.data.sample import write_sample

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
SIZE = {"dim": 32, "layers": 1, "attention_heads": 2, "ffn_width": 32, "head_width": 32}


def blocks(kind: str) -> list[str]:
    """The blocks of a language in README."""
    return re.findall(rf"^```{kind}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def commands() -> Iterator[list[str]]:
    """The commands of "Your own videos" as lists of words."""
    (block,) = (block for block in blocks("sh") if block.startswith("karmma init project"))
    for line in block.splitlines():
        if words := shlex.split(line, comments=True):
            yield words


def small(network: dict[str, Any], seed: int) -> dict[str, Any]:
    """A network of random weights that takes the same kind of input."""
    if "image" in network:
        return {"name": "resnet18", "weights": f"random:{seed}", "image": [32, 32]}
    return {"name": "s3d", "weights": f"random:{seed}", "frames": 8, "size": 32}


def shrink(path: Path) -> set[tuple[str, str]]:
    """Give a recipe small networks; return those that it named."""
    recipe = config.parse_yaml(path.read_text(), str(path))
    named = set()
    for seed, networks in enumerate(recipe.get("sets", {}).values()):
        named |= {(network["name"], network["weights"]) for network in networks.values()}
        networks |= {m: small(network, seed) for m, network in networks.items()}
    if "size" in recipe:
        recipe |= {"size": recipe["size"] | SIZE, "epochs": 2}
    path.write_text(yaml.safe_dump(recipe))
    return named


def no_download(url: str, path: str, *_: Any) -> None:
    """Stand in for torch.hub: the weights that README fetches are not used here."""
    Path(path).write_bytes(url.encode())


@pytest.mark.slow
def test_the_block_of_ones_own_videos_works_word_for_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_download)
    manifest = write_sample(tmp_path, clips=12)
    shutil.move(manifest, "videos.csv")
    fetched, named = set(), set()
    for program, *arguments in commands():
        if program == "cd":
            monkeypatch.chdir(arguments[0])
            continue
        assert program == "karmma"
        result = CliRunner().invoke(main, arguments, catch_exceptions=False)
        assert result.exit_code == 0, f"karmma {shlex.join(arguments)}\n{result.output}"
        if arguments[0] == "init":
            for path in Path(arguments[2]).glob("*.yaml"):
                named |= shrink(path)
        elif arguments[:2] == ["backbones", "fetch"]:
            fetched.add((arguments[2], arguments[3]))
    assert fetched == named
    assert Path("report/index.html").stat().st_size > 10_000
    results = json.loads(Path("report/results.json").read_text())
    assert [(run["name"], run["kind"]) for run in results["runs"]] == [
        ("Teacher", "teacher"),
        ("Student (distilled)", "student"),
    ]


@pytest.mark.slow
def test_the_notebooks_block_works_word_for_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_sample(Path("clips"), clips=12)
    arguments = ["init", "project", ".", "--manifest", "clips/manifest.csv", "--size", "tiny"]
    assert CliRunner().invoke(main, arguments, catch_exceptions=False).exit_code == 0
    (block,) = blocks("python")
    names: dict[str, Any] = {}
    exec(block, names)  # noqa: S102
    assert len(names["preds"]) == 3
    assert names["tokens"].shape == names["store"].shape("rgb")
    assert names["model"].card.training["epochs"] == 20


def test_the_list_of_clips_in_readme_is_read(tmp_path: Path) -> None:
    from karmma_pipeline.data.manifest import read_manifest

    (block,) = blocks("csv")
    (tmp_path / "videos.csv").write_text(block)
    manifest = read_manifest(tmp_path / "videos.csv")
    assert [clip.clip_id for clip in manifest.clips] == ["a_0", "a_1"]
    assert [clip.stop_s for clip in manifest.clips] == [3.25, 6.17]
