"""A frozen backbone: pre-processed clips in, pooled tokens out, with a record of what it is."""

from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import torch
import torchvision
from pydantic import Field
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from karmma_pipeline.config import Recipe
from karmma_pipeline.errors import ConfigError
from karmma_pipeline.models.backbones import registry, weights
from karmma_pipeline.models.backbones.registry import ARCHITECTURES, Architecture
from karmma_pipeline.models.backbones.transform import FrameTransform, of_weights

ENTRY_POINTS = "karmma.backbones"


class BackboneChoice(Recipe):
    """Which frozen network turns a modality into tokens, and how."""

    name: str = Field(
        description="A name of `karmma backbones list`, or your own as package.module:factory.",
        examples=["swin3d_t"],
    )
    weights: str = Field(
        "DEFAULT",
        description="A torchvision weight (DEFAULT, KINETICS400_V1, ...), the path of a\n"
        "state dict, or random:SEED.",
    )
    frames: int | None = Field(
        None, gt=0, description="Frames T per clip; null: the network's own."
    )
    size: int | None = Field(
        None, gt=0, description="Crop in px; null: that of the weights' own transform."
    )
    image: tuple[int, int] | None = Field(
        None, description="Height and width of the log-mel image (audio networks for images)."
    )
    tokens: tuple[int, int, int] | None = Field(
        None,
        description="Pool the output to this grid (time, height, width), such as\n"
        "[12, 5, 5] = 300; null keeps the network's own grid.",
    )

    @property
    def architecture(self) -> Architecture:
        """The network behind the name.

        Raises:
            ConfigError: the name is unknown, or the factory cannot be imported.
        """
        if self.name in ARCHITECTURES:
            return ARCHITECTURES[self.name]
        for entry in entry_points(group=ENTRY_POINTS, name=self.name):
            return _check_own(entry.load(), self.name)
        if ":" in self.name:
            module, _, factory = self.name.partition(":")
            try:
                return _check_own(getattr(import_module(module), factory), self.name)
            except (ImportError, AttributeError) as error:
                raise ConfigError(
                    f"name={self.name!r}: cannot be imported ({error}); "
                    "is its package installed in this environment?"
                ) from None
        raise ConfigError(
            f"name={self.name!r}: unknown backbone; known: {', '.join(ARCHITECTURES)}, "
            "or your own as package.module:factory."
        )

    @property
    def frame_count(self) -> int:
        """Frames T of one input (1 for networks on images)."""
        return self.frames or self.architecture.frames

    @property
    def transform(self) -> FrameTransform:
        """Resize, crop and normalisation of video frames; that of the weights, at ``size``."""
        members = self.architecture.weights
        if weights.parse_seed(self.weights) is None and not Path(self.weights).is_file():
            member = weights.enum_member(self.architecture, self.weights)
        else:
            member = members.DEFAULT
        own = of_weights(member.transforms())
        return own if self.size is None else own.scaled(self.size)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one network input: [3, T, h, w] for video, [3, h, w] for an image."""
        if self.architecture.kind == "image":
            if self.image is None:
                raise ConfigError(f"name={self.name!r}: needs image: [height, width].")
            return (3, *self.image)
        return (3, self.frame_count, *self.transform.crop)

    @property
    def output_shape(self) -> tuple[int, int]:
        """Tokens N and width D of one clip, worked out without building any weights."""
        _, D, *grid = registry.meta_map(self.architecture, self.input_shape)
        t, h, w = self.tokens or grid
        return t * h * w, D


def _check_own(found: Any, name: str) -> Architecture:
    made = found() if callable(found) and not isinstance(found, Architecture) else found
    if not isinstance(made, Architecture):
        raise ConfigError(f"name={name!r}: must give a karmma Architecture, gave {type(made)}.")
    return made


class Backbone(nn.Module):
    """A frozen network with pooled tokens; always in evaluation mode.

    B clips in a batch, T frames, N tokens, D width.
    """

    def __init__(self, choice: BackboneChoice) -> None:
        super().__init__()
        self.choice = choice
        self.net, self.loaded = _load(choice)
        self.eval()
        self.requires_grad_(requires_grad=False)

    def train(self, mode: bool = True) -> "Backbone":
        """Stay in evaluation mode: the backbone is frozen."""
        super().train(mode=False)
        return self

    def prepare(self, clips: Tensor) -> Tensor:
        """Turn what the decoder gives into the network's float input, on the clips' device.

        Args:
            clips: uint8 frames [B, T, 3, h, w], or float spectrogram frames [B, T, h, w], or
                float log-mel images [B, h, w] (both already standardised).
        """
        if clips.dtype == torch.uint8:
            return self.choice.transform.normalise(clips)
        return clips.float().unsqueeze(1).expand(-1, 3, *(-1,) * (clips.dim() - 1))

    def forward(self, x: Tensor) -> Tensor:
        """Turn inputs [B, 3, T, h, w] or [B, 3, h, w] into tokens [B, N, D]."""
        features = self.choice.architecture.feature_map(self.net, x)  # [B, D, t, h, w]
        if self.choice.tokens is not None:
            features = nn.functional.adaptive_avg_pool3d(features, self.choice.tokens)
        return features.flatten(2).transpose(1, 2)

    def provenance(self) -> dict[str, Any]:
        """Return what a store must know of its tokens, JSON-plain."""
        choice = self.choice
        video = choice.architecture.kind == "video"
        return {
            "backbone": choice.name,
            "weights": choice.weights,
            "weights_sha256": self.loaded.digest,
            "weights_missing": list(self.loaded.missing),
            "input": list(choice.input_shape),
            "transform": choice.transform.facts() if video else {"image": list(choice.image or ())},
            "token_grid": list(choice.tokens) if choice.tokens else None,
            "torchvision": torchvision.__version__,
        }


def _load(choice: BackboneChoice) -> tuple[nn.Module, weights.Loaded]:
    architecture = choice.architecture
    seed = weights.parse_seed(choice.weights)
    if seed is not None:
        net = weights.random_net(architecture, seed, choice.input_shape)
        # The digest is that of the drawn parameters: running statistics differ in the last
        # bits between processors.
        return net, weights.Loaded(weights.digest(dict(net.named_parameters())))
    net = architecture.headless()
    path = Path(choice.weights)
    if path.is_file() or path.suffix in {".pt", ".pth", ".safetensors"}:
        return net, weights.fill(net, weights.read_file(path), choice.weights)
    member = weights.enum_member(architecture, choice.weights)
    published = weights.read_published(member, choice.name)
    return net, weights.fill(net, published, str(weights.cached_file(member)))


def list_backbones() -> list[dict[str, Any]]:
    """Return a row per shipped network: name, kind, own input, parameters."""
    rows = []
    for name, architecture in ARCHITECTURES.items():
        with torch.device("meta"):
            net = architecture.headless()
        rows.append(
            {
                "name": name,
                "input": architecture.kind,
                "frames": architecture.frames,
                "parameters": sum(p.numel() for p in net.parameters()),
                "weights": [member.name for member in architecture.weights],
            }
        )
    return rows


def describe(choice: BackboneChoice) -> dict[str, Any]:
    """Return shapes and cost of a choice, computed without weights.

    GFLOPs count 2 per multiply-add, for one clip, as the paper's figures do.
    """
    with torch.device("meta"), torch.inference_mode():
        net = choice.architecture.headless().eval()
        with FlopCounterMode(display=False) as counter:
            choice.architecture.feature_map(net, torch.empty(1, *choice.input_shape))
    N, D = choice.output_shape
    return {
        "backbone": choice.name,
        "input": list(choice.input_shape),
        "tokens": N,
        "width": D,
        "gflops": counter.get_total_flops() / 1e9,
        "parameters": sum(p.numel() for p in net.parameters()),
    }
