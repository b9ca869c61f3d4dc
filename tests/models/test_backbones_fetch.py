"""`karmma backbones fetch hf:...` against a server of our own that speaks the hub's protocol."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.hub import Hub, serving

pytestmark = pytest.mark.extra


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    folder = tmp_path / "repository"
    folder.mkdir()
    save_file({"weight": torch.randn(6_000_000)}, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "dinov2"}')
    (folder / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n# Tiny\n")
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    with serving(folder) as server:
        yield server


def fetch(
    hub: Hub, home: Path, name: str = "hf:o/tiny", **changes: str
) -> subprocess.CompletedProcess[str]:
    environment = hub.environment(home, **changes)
    command = [sys.executable, "-m", "karmma_pipeline.cli", "backbones", "fetch", name]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_a_download_that_was_cut_off_goes_on_and_no_pickle_is_taken(
    hub: Hub, tmp_path: Path
) -> None:
    pytest.importorskip("huggingface_hub")
    made = fetch(hub, tmp_path / "home")
    assert made.returncode == 0, made.stderr
    where = Path(made.stdout.removeprefix("weights: ").strip())
    assert (where / "model.safetensors").read_bytes() == hub.files["model.safetensors"]
    assert sorted(path.name for path in where.iterdir()) == [
        "README.md", "config.json", "model.safetensors",
    ]  # fmt: skip
    assert hub.ranges  # the second half alone was asked for


def test_offline_nothing_is_asked_for(hub: Hub, tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    made = fetch(hub, tmp_path / "home", HF_HUB_OFFLINE="1")
    assert made.returncode == 1
    assert "o/tiny: the download failed" in made.stderr
    assert not hub.ranges


def test_a_repository_that_the_hub_lacks_gets_the_nearest_names(hub: Hub, tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    made = fetch(hub, tmp_path / "home", "hf:facebook/dinov2-bas")
    assert made.returncode == 1
    assert "no such repository" in made.stderr
    assert "(did you mean hf:facebook/dinov2-base" in made.stderr
