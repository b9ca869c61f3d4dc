"""One clip through one network, to look at before hours are spent."""

import time
from pathlib import Path
from typing import Any

import torch

from karmma_pipeline.data.manifest import Clip
from karmma_pipeline.data.sources import FileSource
from karmma_pipeline.errors import ConfigError, MediaError
from karmma_pipeline.extraction.decode.worker import decode_clips
from karmma_pipeline.extraction.recipe import Audio, Flow, Sampling
from karmma_pipeline.extraction.types import DecodeSettings, input_spec
from karmma_pipeline.models.backbones import Backbone, BackboneChoice
from karmma_pipeline.models.backbones.describe import describe, top_classes


def show_clip(choice: BackboneChoice, path: Path) -> dict[str, Any]:
    """Run a file, as one clip, through a network on the CPU in float32.

    Networks for video see its frames, networks for images hear its sound.

    Returns:
        What `describe` returns, the shape and range of the tokens, what matched in a weights
        file, and the likeliest classes where there is a head.

    Raises:
        ConfigError: it is a network for boxes or sensors.
        MediaError: the file has no such stream, or it cannot be decoded.
    """
    if choice.architecture.kind not in {"video", "image"}:
        raise ConfigError(
            f"--clip: {choice.name} takes neither frames nor audio; use `karmma plan` to check "
            "its files."
        )
    modality = "rgb" if choice.architecture.kind == "video" else "audio"
    spec = input_spec(modality, choice)
    clip = Clip("clip", {modality: FileSource(path)}, 0.0, None, {})
    (decoded,) = decode_clips([clip], DecodeSettings(Sampling(), Flow(), Audio(), (spec,)))
    if spec in decoded.reasons:
        reason = decoded.reasons[spec]
        hint = reason.hint_for(decoded.details[spec])
        raise MediaError(f"{path}: {modality}: {reason.label}: {hint}")
    backbone = Backbone(choice)
    started = time.perf_counter()
    with torch.inference_mode():
        x = backbone.prepare(torch.from_numpy(decoded.arrays[spec])[None])
        tokens = backbone(x)
    facts = describe(choice) | {
        "modality": modality,
        "clip": [round(float(decoded.times[spec][1][i]), 3) for i in (0, -1)],
        "seconds": round(time.perf_counter() - started, 3),
        "tokens_shape": list(tokens.shape[1:]),
        "tokens_mean": round(tokens.mean().item(), 4),
        "tokens_std": round(tokens.std().item(), 4),
    }
    if choice.source == "file":
        facts["weights"] = backbone.loaded.report()
    if classes := top_classes(choice, x):
        facts["top_5"] = {name: round(probability, 4) for name, probability in classes}
    return facts
