"""Each reason that limits or numbers give, by a real file through the command line, and its remedy.

The reasons of missing, damaged and foreign files are in test_again.py. No file is known that makes
a decoder die (crashed): test_pipeline.py lets one die by itself.
"""

import csv
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import yaml
from click.testing import CliRunner
from safetensors.torch import save_file
from support.media_files import write_video

from karmma_pipeline.cli import main
from karmma_pipeline.models.backbones import BackboneChoice
from karmma_pipeline.models.backbones.registry import find
from karmma_pipeline.models.backbones.state_dicts import random_net

RGB = {"name": "s3d", "weights": "random:0", "frames": 8, "size": 32}
RECIPE: dict[str, Any] = {
    "manifest": "m.csv",
    "out": "out",
    "sets": {"one": {"rgb": RGB}},
    "batch_size": 1,
    "precision": "float32",
    "memory_format": "contiguous",
    "max_failures": 1.0,
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a video that anything can read."""
    monkeypatch.chdir(tmp_path)
    write_video(tmp_path / "fine.mkv", seconds=4)
    return tmp_path


def list_clips(*rows: str) -> None:
    lines = [f"c{number},{row},x,train" for number, row in enumerate(rows)]
    Path("m.csv").write_text("\n".join(["clip_id,video,start,stop,verb,split", *lines]) + "\n")


def karmma(*arguments: str, **changes: Any) -> dict[str, str]:
    """Extract, and return the reasons of the absent modalities, as failures.csv has them."""
    recipe = {**RECIPE, **changes}
    Path("r.yaml").write_text(yaml.safe_dump(recipe))
    result = CliRunner().invoke(main, ["extract", "r.yaml", *arguments])
    assert result.exit_code == 0, result.output
    with Path(recipe["out"], "failures.csv").open(newline="") as file:
        return {f"{r['clip_id']} {r['modality']}": r["reason"] for r in csv.DictReader(file)}


def write_noise(path: Path, width: int, height: int, frames: int) -> None:
    """Write lossless noise, 8 frames a second: each costs most of a second to decode."""
    rng = np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("ffv1", rate=8)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for _ in range(frames):
            picture = rng.integers(0, 256, (height * 3 // 2, width), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="yuv420p")))
        container.mux(stream.encode())


@pytest.mark.slow
def test_a_clip_that_takes_too_long_gets_more_time(folder: Path) -> None:
    write_noise(folder / "noise.mkv", 3840, 2160, frames=8)
    list_clips("fine.mkv,0,1", "noise.mkv,0,1")
    assert karmma(decode={"workers": 1, "timeout_s": 1}) == {"c1 rgb": "timeout"}
    assert karmma("--retry", "timeout", decode={"workers": 1, "timeout_s": 300}) == {}


@pytest.mark.slow
def test_a_picture_that_is_too_large_gets_more_memory(folder: Path) -> None:
    write_video(folder / "huge.avi", times=[0], sound=False, codec="utvideo", size=(16000, 8000))
    list_clips("fine.mkv,0,1", "huge.avi,0,0.04")
    # Less than a decode process takes by itself: it is killed before it has a clip.
    too_little = {"c0 rgb": "out_of_memory", "c1 rgb": "out_of_memory"}
    assert karmma(decode={"workers": 1, "memory_gb": 0.05}) == too_little
    # Its compressed picture fits; its pixels, which stay most of a second, do not.
    for limit_gb, lost in ((0.3, {"c1 rgb": "out_of_memory"}), (8, {})):
        decode = {"workers": 1, "memory_gb": limit_gb}
        assert karmma("--retry", "out_of_memory", decode=decode) == lost


@pytest.mark.slow
def test_a_hole_in_a_video_is_found_or_bridged_and_a_still_has_no_motion(folder: Path) -> None:
    write_video(folder / "hole.mkv", times=[*np.arange(0, 1, 0.04), *np.arange(5, 6, 0.04)])
    write_video(folder / "still.mkv", times=[0.0], seconds=0.04)
    list_clips("hole.mkv,2.5,3.5", "still.mkv,0,0.04")
    sets = {"one": {"rgb": RGB, "flow": {**RGB, "weights": "random:1"}}}
    assert karmma(sets=sets) == {
        "c0 rgb": "timestamp_mismatch",
        "c0 flow": "timestamp_mismatch",
        "c1 flow": "too_short",
    }
    list_clips("hole.mkv,2.5,3.5", "fine.mkv,0,2")
    assert karmma(sets=sets, out="other", sampling={"tolerance_s": 3}) == {}


@pytest.mark.slow
def test_tokens_that_a_store_cannot_hold_fit_into_another_type(folder: Path) -> None:
    choice = BackboneChoice(**RGB)
    net = random_net(find("s3d"), 0, choice.input_shape)
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    last = [name for name in state if name.endswith("weight") and state[name].dim() == 1][-1]
    state[last] *= 1e7
    save_file(state, "big.safetensors")
    list_clips("fine.mkv,0,1")
    sets = {"one": {"rgb": {**RGB, "weights": "./big.safetensors"}}}
    bad = karmma(sets=sets, store={"dtype": "float16"})
    assert bad == {"c0 rgb": "bad_value"}
    assert karmma(sets=sets, out="other", store={"dtype": "bfloat16"}) == {}
