"""An engine that is named for a model computes its backbones, or it is said why it cannot."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from support.live import tiny_run
from support.media_files import write_video

from karmma_pipeline.cli import main
from karmma_pipeline.extraction.inference import openvino_engine
from karmma_pipeline.recognition.recognizer import Recognizer


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("engine")
    tiny_run(root / "run")
    write_video(root / "video.mp4", seconds=3)
    return root


def predict(root: Path, engine: str, code: int = 0) -> tuple[str, list[dict[str, Any]]]:
    """Return what the command says, and its answers."""
    out = root / engine
    options = ["--engine", engine, "--window", "1", "--out", str(out)]
    result = CliRunner().invoke(
        main, ["predict", str(root / "run"), str(root / "video.mp4"), *options]
    )
    assert result.exit_code == code, result.output
    if code:
        return result.output, []
    lines = (out / "predictions.jsonl").read_text().splitlines()
    return result.output, [json.loads(line)["top"] for line in lines]


@pytest.mark.extra
def test_answers_are_those_of_torch_whatever_the_engine(root: Path) -> None:
    pytest.importorskip("openvino")
    recognizer = Recognizer.load(root / "run", "cpu", engine="openvino")
    assert all(network.openvino is not None for network in recognizer.networks.all.values())
    (_, torch), (said, openvino) = predict(root, "torch"), predict(root, "openvino")
    assert "note: " in said  # the engine is another one than that of the training
    assert len(torch) == len(openvino) >= 3
    for one, other in zip(torch, openvino, strict=True):
        for head, guesses in one.items():
            assert [g["class"] for g in guesses] == [g["class"] for g in other[head]]
            np.testing.assert_allclose(
                [g["probability"] for g in guesses],
                [g["probability"] for g in other[head]],
                atol=1e-4,
            )


def test_an_engine_that_is_not_there_is_never_replaced(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openvino_engine, "is_installed", lambda: False)
    said, _ = predict(root, "openvino", code=2)
    assert "engine openvino is not installed; pip install 'karmma-pipeline[openvino]'" in said
