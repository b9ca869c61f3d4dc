"""RAFT, torchvision's optical flow network: how pairs of frames become a backbone's input.

It runs where the backbones run, and gives the same pictures of motion that DIS and a data set's
own flow frames give. B clips in a batch, T pairs, h and w the backbone's input size.
"""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torchvision.models import get_model, get_model_weights

from karmma_pipeline.errors import ConfigError
from karmma_pipeline.extraction.decode.flow import as_pictures
from karmma_pipeline.extraction.inference.recent import Recent, digest
from karmma_pipeline.extraction.recipe import Flow
from karmma_pipeline.extraction.types import Batch, InputSpec, Pictures
from karmma_pipeline.models.backbones import state_dicts
from karmma_pipeline.models.backbones.choice import parse_seed
from karmma_pipeline.models.backbones.state_dicts import seeded

# RAFT takes sides that are multiples of 8 and not below 128 px; smaller ones are padded.
_MULTIPLE, _LEAST = 8, 128


class Raft:
    """The network of a recipe's flow section, frozen, on one device.

    Raises:
        ConfigError: no such weights.
        CheckpointError: the weights are not there, or are not this network's.
    """

    def __init__(self, settings: Flow, device: torch.device) -> None:
        self.settings, self.device = settings, device
        net, self.digest = _load(settings)
        self.net = net.eval().requires_grad_(requires_grad=False).to(device)

    def inputs(self, batch: Batch, spec: InputSpec, recent: Recent | None = None) -> Tensor:
        """Return a batch's flow as pictures, uint8 [B, T, 3, h, w], from its pairs of frames.

        Clips go through the network one after another, ``pairs_at_once`` at a time, so that what
        a clip gets does not depend on the other clips of the batch. With ``recent`` there, pairs
        that it holds are not computed again, and others one by one.
        """
        frames = batch.inputs[spec]
        # A clip without a scale has its pictures already, or is lost and has zeros.
        shape, pinned = frames[:, 0].shape, frames.is_pinned()
        pictures = torch.empty(shape, dtype=frames.dtype, pin_memory=pinned).copy_(frames[:, 0])
        for place, clip in enumerate(batch.clips):
            if spec in clip.flow_scales:
                scale = clip.flow_scales[spec]
                pictures[place] = torch.from_numpy(self.pictures(frames[place], scale, recent))
        return pictures

    def pictures(
        self, frames: Tensor, scale: npt.NDArray[np.float32], recent: Recent | None = None
    ) -> Pictures:
        """Return the motion of pairs of frames, uint8 [T, 3, h, w], see `flow.as_pictures`.

        Args:
            frames: uint8 [2, T, 3, h, w].
            scale: what makes px per pair px per gap, [T].
            recent: what was computed of pairs lately.
        """

        def measured(places: list[int], size: int) -> list[Tensor]:
            parts = [frames[:, places[i : i + size]] for i in range(0, len(places), size)]
            return [self.flow(*part).cpu() for part in parts]

        # Scaled and rounded on the CPU as DIS is: bytes must not depend on the device's rounding.
        if recent is None:
            flows = measured([*range(len(scale))], self.settings.pairs_at_once)
        else:
            keys = [(id(self), digest(pair)) for pair in frames.transpose(0, 1).numpy()]
            flows = recent.of(keys, lambda places: measured(places, 1))
        motion = torch.cat(flows).numpy()
        return as_pictures(self.settings, motion * scale[:, None, None, None])

    @torch.inference_mode()
    def flow(self, first: Tensor, second: Tensor) -> Tensor:
        """Return the motion from ``first`` to ``second``, float32 [T, 2, h, w] in px.

        Args:
            first: uint8 [T, 3, h, w].
            second: the same.
        """
        h, w = first.shape[-2:]
        (top, bottom), (left, right) = _padding(h), _padding(w)

        def ready(frames: Tensor) -> Tensor:
            scaled = frames.to(self.device).float() / 127.5 - 1
            # By its edge, as zeros would be a border that does not move and draws the flow.
            return nn.functional.pad(scaled, (left, right, top, bottom), mode="replicate")

        # RAFT refines its flow step by step and returns each; the last one is the result.
        last = self.net(ready(first), ready(second), num_flow_updates=self.settings.updates)[-1]
        return last[..., top : top + h, left : left + w].float()


def _padding(side: int) -> tuple[int, int]:
    whole = max(_LEAST, -(-side // _MULTIPLE) * _MULTIPLE)
    return (whole - side) // 2, whole - side - (whole - side) // 2


def _load(settings: Flow) -> tuple[nn.Module, str]:
    name, weights = settings.source, settings.weights
    seed = parse_seed(weights)
    with seeded(seed or 0):
        net: nn.Module = get_model(name, weights=None)
    if seed is not None:
        return net, state_dicts.digest(net.state_dict())
    published = get_model_weights(name)
    member = published.__members__.get(weights.removeprefix(f"{published.__name__}."))
    if member is not None:
        where = str(state_dicts.cached_file(member))
        tensors = state_dicts.read_published(member, name)
    elif Path(weights).is_file() or len(Path(weights).parts) > 1:
        where, tensors = weights, state_dicts.read_file(Path(weights))
    else:
        known = ", ".join(published.__members__)
        raise ConfigError(f"flow.weights={weights!r}: write random:SEED, a path, or {known}.")
    return net, state_dicts.fill(net, tensors, where).digest
