"""Clips of one video that are decoded in one go through its file."""

from typing import Any

import numpy as np
import pytest
from support.media_files import Maker

from karmma_pipeline.data.manifest import Clip
from karmma_pipeline.data.sources import FileSource
from karmma_pipeline.extraction.decode.worker import decode_clips
from karmma_pipeline.extraction.media.interface import MediaFaultError
from karmma_pipeline.extraction.media.pyav_video import PyavVideo
from karmma_pipeline.extraction.recipe import Audio, Flow, Sampling
from karmma_pipeline.extraction.types import DecodeSettings, input_spec
from karmma_pipeline.modalities import Reason
from karmma_pipeline.models.backbones import BackboneChoice


def test_clips_decoded_together_are_what_they_are_alone_and_share_their_frames(
    make_video: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = FileSource(make_video("v.mp4"))
    spans = ((0.0, 1.0), (0.5, 1.5), (0.0, 1.0), (1.2, 2.0))
    clips = [Clip(f"c{i}", {"rgb": source}, a, b, {}) for i, (a, b) in enumerate(spans)]
    rgb = input_spec("rgb", BackboneChoice(name="s3d", weights="random:0", frames=16, size=32))
    settings = DecodeSettings(Sampling(), Flow(), Audio(), (rgb,))
    alone = [decode_clips([clip], settings)[0] for clip in clips]
    read: list[int] = []
    original = PyavVideo.decode

    def spy(self: PyavVideo, numbers: Any) -> Any:
        read.extend(numbers.tolist())
        return original(self, numbers)

    monkeypatch.setattr(PyavVideo, "decode", spy)
    together = decode_clips(clips, settings)
    assert read == sorted(set(read))
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one.arrays[rgb], other.arrays[rgb])
        np.testing.assert_array_equal(one.times[rgb], other.times[rgb])


def test_a_fault_in_one_of_several_clips_is_that_clips_alone(
    make_video: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = FileSource(make_video("v.mp4"))
    clips = [Clip(f"c{i}", {"rgb": source}, i / 2, i / 2 + 0.5, {}) for i in range(4)]
    rgb = input_spec("rgb", BackboneChoice(name="s3d", weights="random:0", frames=8, size=32))
    settings = DecodeSettings(Sampling(), Flow(), Audio(), (rgb,))
    wanted = decode_clips(clips, settings)

    def broken(original: Any) -> Any:
        def decode(self: Any, numbers: Any) -> Any:
            for number, picture in original(self, numbers):
                if 25 <= number < 37:  # the third clip's
                    raise MediaFaultError(Reason.DECODE_ERROR, "damaged here")
                yield number, picture

        return decode

    monkeypatch.setattr(PyavVideo, "decode", broken(PyavVideo.decode))
    found = decode_clips(clips, settings)
    assert [clip.reasons.get(rgb) for clip in found] == [None, None, Reason.DECODE_ERROR, None]
    for place in (0, 1, 3):
        np.testing.assert_array_equal(found[place].arrays[rgb], wanted[place].arrays[rgb])
