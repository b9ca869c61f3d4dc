import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import InterpolationMode, functional

from karmma_pipeline.models.backbones import ARCHITECTURES, BackboneChoice, FrameTransform

VIDEO = sorted(name for name, a in ARCHITECTURES.items() if a.kind == "video")


@pytest.mark.parametrize("name", VIDEO)
@settings(max_examples=5, deadline=None)
@given(
    frames=st.integers(1, 3),
    height=st.integers(20, 300),
    width=st.integers(20, 300),
    seed=st.integers(0, 9),
)
def test_preprocessing_equals_torchvisions_but_for_ties(
    name: str, frames: int, height: int, width: int, seed: int
) -> None:
    video = np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), np.uint8)
    for member in ARCHITECTURES[name].weights:
        transform = BackboneChoice(name=name, weights=str(member)).transform
        ours = transform.normalise(torch.from_numpy(transform.apply(video))[None])[0]
        official = member.transforms()
        theirs = official(torch.from_numpy(video).permute(0, 3, 1, 2).contiguous())
        levels = torch.tensor(transform.std)[:, None, None, None] * 255 * (ours - theirs)
        assert levels.abs().max() < 1.01
        assert (levels.abs() > 0.01).float().mean() < 0.005


SHAPES = {
    "shape": st.tuples(st.integers(1, 40), st.integers(1, 40)),
    "resize": st.lists(st.integers(1, 40), min_size=1, max_size=2).map(tuple),
    "crop": st.tuples(st.integers(1, 40), st.integers(1, 40)),
}


@settings(max_examples=60, deadline=None)
@given(
    **SHAPES,
    interpolation=st.sampled_from(["nearest", "nearest-exact", "bilinear", "bicubic"]),
    dtype=st.sampled_from([np.uint8, np.float32]),
)
def test_resize_and_crop_equal_torchvisions(
    shape: tuple[int, int], resize: tuple[int, ...], crop: tuple[int, int], interpolation: Any,
    dtype: type[np.uint8] | type[np.float32],
) -> None:  # fmt: skip
    pictures: Any = np.random.default_rng(0).integers(0, 256, (2, 3, *shape)).astype(dtype)
    transform = FrameTransform(
        resize=resize, crop=crop, mean=(0,), std=(1,), interpolation=interpolation
    )
    theirs = functional.resize(
        torch.from_numpy(pictures), list(resize), InterpolationMode(interpolation), antialias=False
    )
    ours = transform.resized(pictures)
    assert np.array_equal(ours, theirs.numpy())
    assert np.array_equal(transform.cropped(ours), functional.center_crop(theirs, list(crop)))


@settings(max_examples=60, deadline=None)
@given(
    **SHAPES,
    interpolation=st.sampled_from(
        ["nearest", "nearest-exact", "bilinear", "bicubic", "lanczos", "box", "hamming"]
    ),
)
def test_smooth_resizing_and_crop_equal_torchvisions_of_pillow_pictures(
    shape: tuple[int, int], resize: tuple[int, ...], crop: tuple[int, int], interpolation: Any
) -> None:
    """Which are what timm's own transform and the processors of transformers before 5 take."""
    frames = np.random.default_rng(0).integers(0, 256, (2, *shape, 3), np.uint8)
    transform = FrameTransform(
        resize=resize, crop=crop, mean=(0,), std=(1,), interpolation=interpolation, antialias=True
    )
    ours = transform.apply(frames)
    mode = InterpolationMode(interpolation.removesuffix("-exact"))  # Pillow's nearest is exact
    for mine, frame in zip(ours, frames, strict=True):
        whole = functional.resize(Image.fromarray(frame), list(resize), mode)
        theirs = functional.center_crop(whole, list(crop))
        assert np.array_equal(mine.transpose(1, 2, 0), np.asarray(theirs))


def test_smooth_resizing_needs_no_torch() -> None:
    """Whose import costs a decode process seconds."""
    program = """
import sys
import numpy as np
from karmma_pipeline.models.backbones.frame_transform import FrameTransform
view = FrameTransform(resize=(9,), crop=(8, 8), mean=(0,), std=(1,), antialias=True)
view.apply(np.zeros((1, 20, 30, 3), np.uint8))
sys.exit("torch" in sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_store_says_what_smoothed_its_pictures() -> None:
    """Those that lack it were made otherwise, and are no source for the same models."""
    plain = BackboneChoice(name="swin3d_t", weights="random:0").transform
    smooth = plain.model_copy(update={"antialias": True})
    assert smooth.facts() == {**plain.facts(), "antialias": True, "smoothed_by": "Pillow"}


@pytest.mark.parametrize(
    ("name", "size", "resize"),
    [("swin3d_t", 64, (73,)), ("r2plus1d_18", 56, (64, 86)), ("s3d", 112, (128, 128))],
)
def test_another_size_shows_the_same_part_of_the_picture(
    name: str, size: int, resize: tuple[int, ...]
) -> None:
    """Resize to crop: 256 to 224 in Swin and S3D, (128, 171) to 112 in R(2+1)D."""
    transform = BackboneChoice(name=name, weights="random:0", size=size).transform
    assert (transform.resize, transform.crop) == (resize, (size, size))
    frames = np.zeros((2, 40, 50, 3), np.uint8)
    assert transform.apply(frames).shape == (2, 3, size, size)


def test_a_batch_is_normalised_clip_by_clip() -> None:
    transform = BackboneChoice(name="swin3d_t", weights="random:0", size=16).transform
    clips = torch.randint(0, 256, (3, 4, 3, 16, 16), dtype=torch.uint8)
    batch = transform.normalise(clips)
    assert batch.shape == (3, 3, 4, 16, 16)
    assert torch.equal(batch[1], transform.normalise(clips[1:2])[0])
