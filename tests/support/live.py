"""A tiny model with a network per modality, and its answers to whole signals."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from karmma_pipeline import config
from karmma_pipeline.data.manifest import Clip
from karmma_pipeline.data.sensors import Sensor
from karmma_pipeline.data.sources import FileSource, SensorSource, Source
from karmma_pipeline.extraction.decode.frame_selection import DecodedFrames
from karmma_pipeline.extraction.decode.worker import decode_clip
from karmma_pipeline.extraction.inference.networks import Networks
from karmma_pipeline.extraction.media.audio_track import cut
from karmma_pipeline.extraction.media.interface import MediaReader
from karmma_pipeline.extraction.media.sensor_series import SensorSeries
from karmma_pipeline.extraction.recipe import ExtractRecipe
from karmma_pipeline.extraction.types import ROUNDING_S, covering
from karmma_pipeline.modalities import Reason
from karmma_pipeline.models.backbones import Architecture, FrameTransform, frame_by_frame
from karmma_pipeline.models.fusion import FusionSize
from karmma_pipeline.models.saved import ModelCard, save_model
from karmma_pipeline.recognition.backbones import SET, specs_of
from karmma_pipeline.recognition.prediction import Prediction
from karmma_pipeline.recognition.recognizer import Recognizer


class _Video(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv3d(3, 8, kernel_size=(2, 8, 8), stride=(2, 8, 8))


class _Image(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 8, 8, stride=8)


def video_net() -> Architecture:
    third = (0.5, 0.5, 0.5)
    transform = FrameTransform(resize=(18,), crop=(16, 16), mean=third, std=third)
    return Architecture(
        "video", lambda weights: _Video(), None, lambda net, x: net.body(x), (), 4,
        transform=transform,
    )  # fmt: skip


def image_net() -> Architecture:
    return Architecture(
        "image", lambda weights: _Image(), None, lambda net, x: net.body(x)[:, :, None], ()
    )


def frame_net() -> Architecture:
    third = (0.5, 0.5, 0.5)
    transform = FrameTransform(resize=(18,), crop=(16, 16), mean=third, std=third)
    seen = frame_by_frame(lambda net, x: net.body(x))
    return Architecture("video", lambda weights: _Image(), None, seen, (), 4, transform=transform)


def tiny_recognizer(**changes: Any) -> Recognizer:
    """Return a recogniser of rgb, flow, audio and stated sensors with random weights."""
    video = {"name": "support.live:video_net", "weights": "random:1"}
    image = {"name": "support.live:image_net", "weights": "random:2", "image": [16, 16]}
    windows = {name: {"name": "windows"} for name in changes.get("sensors", ())}
    tree = {
        "manifest": "-",
        "out": "-",
        "device": "cpu",
        "batch_size": 1,
        "sets": {SET: {"rgb": video, "flow": video, "audio": image, **windows}},
        "audio": {"front_end": "vggish"},
        **changes,
    }
    networks = Networks(config.build(ExtractRecipe, tree, "test"))
    specs = specs_of(networks)
    card = ModelCard(
        kind="student",
        name="tiny",
        size=FusionSize(dim=8, layers=1, attention_heads=2, ffn_width=8, head_width=8),
        modalities={m: (spec.tokens, spec.width) for m, spec in specs.items()},
        heads={"verb": ("take", "put", "wash"), "noun": ("cup", "pan")},
        provenance={m: spec.model_dump(mode="json")["provenance"] for m, spec in specs.items()},
        store_digest="0",
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = card.build().eval()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
    return Recognizer(model, card, networks)


class Signals(MediaReader):
    """Pictures, sound and sensors (name to times and values) that are there as a whole."""

    video_decoder = audio_decoder = "test"

    def __init__(
        self,
        times: Any,
        pictures: Any,
        sound: Any,
        rate: int,
        zero_s: float,
        sensors: Mapping[str, tuple[Any, Any]] | None = None,
    ) -> None:
        self._sensors = sensors or {}
        self.path, self._times, self._pictures = Path("signals"), np.asarray(times), pictures
        self._sound, self._rate, self._zero_s = sound, rate, zero_s

    @property
    def frame_starts(self) -> Any:
        return self._times

    @property
    def stop_s(self) -> float:
        return 1e9

    def numbers(self, times: Any) -> Any:
        return covering(self._times, times + ROUNDING_S)

    def decode(self, numbers: Any) -> Any:
        return ((n, self._pictures[n]) for n in np.unique(numbers).tolist())

    @property
    def audio_rate(self) -> int:
        return self._rate

    def sound_span(self, rate: int) -> tuple[float, float]:
        return self._zero_s, self._zero_s + len(self._sound) / self._rate

    def sound(self, start_s: float, stop_s: float, rate: int) -> Any:
        assert rate == self._rate
        return cut(self._sound, start_s - self._zero_s, stop_s - start_s, rate)

    def of(self, source: Source) -> MediaReader:
        return self

    def series(self, source: SensorSource, sensor: Sensor) -> SensorSeries:
        return SensorSeries(source.path, sensor, *self._sensors[source.path.name])


def offline(
    recognizer: Recognizer, signals: Signals, start_s: float, stop_s: float, seen: Iterable[str]
) -> Prediction:
    """Return what is said of a window of signals that are there as a whole."""
    seen = set(seen)
    media: dict[str, Source] = dict.fromkeys(seen, FileSource(signals.path))
    media |= {m: SensorSource(Path(m)) for m in seen & {*recognizer.decode_settings.sensors}}
    clip = Clip("offline", media, start_s, stop_s, {})
    inputs = recognizer.decode_settings.inputs
    here = tuple(spec for spec in inputs if spec.modality in seen)
    settings = replace(recognizer.decode_settings, inputs=here)
    decoded = decode_clip(clip, settings, signals, DecodedFrames)
    assert not decoded.reasons
    decoded.reasons |= {spec: Reason.GAP for spec in inputs if spec not in here}
    return recognizer.answer(clip, decoded)


def tiny_run(folder: Path) -> Path:
    """Save the model of `tiny_recognizer` and return its folder."""
    recognizer = tiny_recognizer()
    folder.mkdir(parents=True, exist_ok=True)
    save_model(folder, recognizer.model, recognizer.card)
    return folder
