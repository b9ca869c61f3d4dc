"""README's block "Your own videos", command by command, on generated clips and small networks."""

import json
import re
import shlex
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner

from karmma_pipeline import config
from karmma_pipeline.cli import main
from karmma_pipeline.data.sample import write_sample

README = Path(__file__).parents[1] / "README.md"
SIZE = {"dim": 32, "layers": 1, "attention_heads": 2, "ffn_width": 32, "head_width": 32}


def commands() -> list[list[str]]:
    """The commands of the block as lists of words."""
    section = README.read_text("utf-8").partition("\n## Your own videos\n")[2]
    block = re.search(r"^```sh\n(.*?)^```", section, re.DOTALL | re.MULTILINE)
    assert block
    return [
        list(words)
        for line in block[1].splitlines()
        for is_join, words in groupby(shlex.split(line, comments=True), "&&".__eq__)
        if not is_join
    ]


def small(network: dict[str, Any], seed: int) -> dict[str, Any]:
    """A network of random weights that takes the same kind of input."""
    if "image" in network:
        return {"name": "resnet18", "weights": f"random:{seed}", "image": [32, 32]}
    return {"name": "s3d", "weights": f"random:{seed}", "frames": 8, "size": 32}


def fill_in(path: Path, manifest: Path) -> set[tuple[str, str]]:
    """Do to a written recipe what README says, but with small networks; return those it named."""
    recipe = config.parse_yaml(path.read_text(), str(path))
    named = set()
    if "sets" in recipe:
        recipe["manifest"] = str(manifest)
        # Stated, because to find the way of computing takes longer than to compute it all.
        recipe |= {"batch_size": 4, "precision": "float32", "memory_format": "contiguous"}
        for seed, networks in enumerate(recipe["sets"].values()):
            named |= {(network["name"], network["weights"]) for network in networks.values()}
            networks |= {m: small(network, seed) for m, network in networks.items()}
    if "size" in recipe:
        recipe |= {"size": recipe["size"] | SIZE, "epochs": 2}
    path.write_text(yaml.safe_dump(recipe))
    return named


def no_download(url: str, path: str, *_: Any) -> None:
    """Stand in for torch.hub: the weights that README fetches are not used here."""
    Path(path).write_bytes(url.encode())


def test_the_block_of_ones_own_videos_works_word_for_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_download)
    manifest = write_sample(tmp_path / "clips", clips=12)
    fetched, named = set(), set()
    for program, *arguments in commands():
        assert program == "karmma"
        result = CliRunner().invoke(main, arguments, catch_exceptions=False)
        assert result.exit_code == 0, f"karmma {shlex.join(arguments)}\n{result.output}"
        if arguments[0] == "init":
            named |= fill_in(Path(arguments[arguments.index("--out") + 1]), manifest)
        elif arguments[:2] == ["backbones", "fetch"]:
            fetched.add((arguments[2], arguments[3]))
    assert fetched == named
    assert Path("report/index.html").stat().st_size > 10_000
    results = json.loads(Path("report/results.json").read_text())
    assert [(run["name"], run["kind"]) for run in results["runs"]] == [
        ("teacher", "teacher"),
        ("student", "student"),
    ]
