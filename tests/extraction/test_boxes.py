"""Object boxes from their annotation to the loss, against numbers worked out by hand."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.media_files import write_video

from karmma_pipeline import config
from karmma_pipeline.data.loading.loader import FeatureLoader
from karmma_pipeline.data.manifest import Clip
from karmma_pipeline.data.sources import BoxSource, FileSource, FrameSource
from karmma_pipeline.extraction.decode.boxes import read_boxes
from karmma_pipeline.extraction.media.interface import MediaFaultError
from karmma_pipeline.extraction.pipeline import extract
from karmma_pipeline.extraction.recipe import ExtractRecipe, Sampling
from karmma_pipeline.modalities import Reason
from karmma_pipeline.models.fusion import FusionModel, FusionSize
from karmma_pipeline.store import FeatureStore


def label(track: str, *corners: float) -> dict[str, Any]:
    names = dict(zip(("x1", "y1", "x2", "y2"), corners, strict=True))
    return {"box2d": names, "category": "thing", "standard_category": track}


def frame(number: int, *labels: dict[str, Any]) -> dict[str, Any]:
    return {"name": f"7/{number:04d}.jpg", "labels": list(labels), "nr_instances": len(labels)}


def clip_of(folder: Path, frames: Any, video: Path | None = None) -> Clip:
    """A clip whose picture is twice as wide as high: 480 px at the published 240."""
    text = json.dumps({"7": frames})
    (folder / "boxes.json").write_text(text)
    source = BoxSource(folder / "boxes.json", "7", (text.index(":") + 1, len(text)))
    rgb = FileSource(video or write_video(folder / "v.mp4"))
    return Clip("7", {"rgb": rgb, "boxes": source}, 0.0, None, {})


def boxes_of(clip: Clip, count: int = 2) -> np.ndarray:
    source = clip.media["boxes"]
    assert isinstance(source, BoxSource)
    return read_boxes(clip, source, Sampling(), count)[0]


def test_boxes_are_scaled_by_the_published_size_and_keep_their_slots(tmp_path: Path) -> None:
    hands = label("hand", 240, 0, 480, 240), label("hand", 0, 0, 48, 24)
    frames = [
        frame(1, label("0001", 0, 120, 480, 240), *hands),
        frame(2, label("0000", 120, 60, 240, 180), label("0001", 0, 120, 480, 240)),
    ]
    first, second = boxes_of(clip_of(tmp_path, frames))
    assert first.shape == (14, 7)
    # the object 0001 is the second track of the clip, although the first frame has no other
    np.testing.assert_allclose(first[1], [0.5, 0.75, 1, 0.5, 0, 1, 1])
    np.testing.assert_allclose(first[13], [0.05, 0.05, 0.1, 0.1, 1, 0, 1])  # the left hand
    np.testing.assert_allclose(first[12], [0.75, 0.5, 0.5, 1, 1, 0, 1])
    assert not first[[0, *range(2, 12)]].any()
    np.testing.assert_allclose(second[0], [0.375, 0.5, 0.25, 0.5, 0, 1, 1])
    np.testing.assert_allclose(second[1], first[1])


def test_a_moment_has_the_boxes_of_its_frame_at_12_hz(tmp_path: Path) -> None:
    frames = [frame(n, label("0000", 0, 0, 4.8 * n, 240)) for n in range(1, 25)]
    clip = clip_of(tmp_path, frames)
    source = clip.media["boxes"]
    assert isinstance(source, BoxSource)
    boxes, times = read_boxes(clip, source, Sampling(), 4)  # 2 s: at 0.25, 0.75, 1.25, 1.75 s
    np.testing.assert_allclose(boxes[:, 0, 2], [0.04, 0.10, 0.16, 0.22], rtol=1e-6)
    np.testing.assert_allclose(times, [[0.25, 0.75, 1.25, 1.75]] * 2)


def test_more_boxes_than_slots_and_boxes_off_the_picture(tmp_path: Path) -> None:
    many = [label(f"{i:04d}", i, 0, i + 24, 24) for i in range(20)]
    (boxes,) = boxes_of(clip_of(tmp_path, [frame(1, *many)]), 1)
    assert boxes[:, 6].all()
    wide = [label("0000", -50, -50, 960, 480), label("0001", 10, 10, 10, 20)]
    (boxes,) = boxes_of(clip_of(tmp_path, [frame(1, *wide)]), 1)
    np.testing.assert_allclose(boxes[0], [0.5, 0.5, 1, 1, 0, 1, 1])
    assert not boxes[1:].any()  # a box without area is none


@pytest.mark.parametrize(
    ("frames", "reason"),
    [
        ([], Reason.TOO_SHORT),
        ([{"name": "7/0001.jpg"}], Reason.DECODE_ERROR),
        ([frame(1, {"category": "x"})], Reason.DECODE_ERROR),
        ([frame(1, label("0000", 0, 0, float("nan"), 1))], Reason.DECODE_ERROR),
        ({"a": 1}, Reason.DECODE_ERROR),
    ],
)
def test_faulty_annotations_have_a_reason(tmp_path: Path, frames: Any, reason: Reason) -> None:
    with pytest.raises(MediaFaultError) as caught:
        boxes_of(clip_of(tmp_path, frames))
    assert caught.value.reason == reason


def test_without_a_picture_its_shape_is_missing(tmp_path: Path) -> None:
    clip = clip_of(tmp_path, [frame(1)], video=tmp_path / "gone.mp4")
    with pytest.raises(MediaFaultError) as caught:
        boxes_of(clip)
    assert caught.value.reason == Reason.FILE_MISSING
    folder = FrameSource(tmp_path, ("img_{:05d}.jpg",), 12)
    with pytest.raises(MediaFaultError):
        boxes_of(Clip("7", {**clip.media, "rgb": folder}, 0, None, {}))


@pytest.mark.slow
def test_boxes_go_the_whole_way_to_a_loss(tmp_path: Path) -> None:
    labels = {"Holding something": "0", "Closing something": "1"}
    rows = [{"id": "7", "template": "Holding [something]"}]
    rows.append({"id": "8", "template": "Closing [something]"})
    for name, table in (("labels", labels), ("train", rows)):
        (tmp_path / f"{name}.json").write_text(json.dumps(table))
    write_video(tmp_path / "7.mp4", sound=False)
    write_video(tmp_path / "8.mp4", sound=False)
    hand = frame(1, label("hand", 0, 0, 48, 24))
    (tmp_path / "boxes.json").write_text(json.dumps({"7": [hand]}))
    tree = {
        "dataset": {
            "kind": "something_something_v2",
            "root": str(tmp_path),
            "annotations": str(tmp_path),
            "splits": ["train"],
            "boxes": [str(tmp_path / "boxes.json")],
        },
        "out": str(tmp_path / "out"),
        "sets": {"one": {"boxes": {"name": "boxes", "frames": 4}}},
        "store": {"dtype": "float32"},
        "decode": {"workers": 1},
        "batch_size": 2,
    }
    extract(config.build(ExtractRecipe, tree, "test"))
    store = FeatureStore.open(tmp_path / "out/one")
    assert store.modalities == ("boxes",)
    assert store.reasons.tolist() == [[Reason.PRESENT], [Reason.NOT_IN_DATASET]]
    (batch,) = FeatureLoader(store, [0, 1], 2, threads=0).epoch(0)
    tokens = batch.tokens["boxes"]
    assert tokens.shape == (2, 4, 98)
    slots = tokens[0].reshape(4, 14, 7)
    torch.testing.assert_close(slots[0, 13], torch.tensor([0.05, 0.05, 0.1, 0.1, 1, 0, 1]))
    size = FusionSize(dim=8, attention_heads=2, ffn_width=8, head_width=8)
    model = FusionModel(size, {"boxes": (4, 98)}, {"action": 2})
    logits = model(batch.tokens, batch.mask)["action"]
    loss = torch.nn.functional.cross_entropy(logits, batch.labels["action"])
    torch.autograd.backward(loss)
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
