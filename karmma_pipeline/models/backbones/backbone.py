"""A frozen backbone: preprocessed clips in, pooled tokens out, with its provenance."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from karmma_pipeline.models.backbones import registry, state_dicts
from karmma_pipeline.models.backbones.choice import INPUT, BackboneChoice, parse_seed
from karmma_pipeline.models.backbones.layers import Parts


class Backbone(nn.Module):
    """A frozen network with pooled tokens; always in evaluation mode.

    B clips in a batch, T frames, N tokens, D width.

    Raises:
        ConfigError: the choice does not fit its network.
        CheckpointError: the weights are not there, or are not this network's.
    """

    def __init__(self, choice: BackboneChoice) -> None:
        super().__init__()
        self.choice = choice
        self.architecture = choice.architecture
        _ = choice.output_shape, choice.stored_shape()  # refuse what does not fit before weights
        self.net, self.loaded = _load(choice)
        if self._ends_before is not None:
            choice.stages.end_before(self.net, self._ends_before)
        self.eval()
        self.requires_grad_(requires_grad=False)

    def train(self, mode: bool = True) -> "Backbone":
        """Stay in evaluation mode: the backbone is frozen."""
        super().train(mode=False)
        return self

    def prepare(self, clips: Tensor) -> Tensor:
        """Turn what the decoder gives into the network's float input, see `prepare`."""
        return prepare(self.choice, clips)

    def forward(self, x: Tensor) -> Tensor:
        """Turn inputs (see `BackboneChoice.input_shape`, with B before) into tokens [B, N, D].

        Of a network that is cut before a stage: what goes into that stage, a row per place.
        """
        return self.tokens([self.parts(x)])

    def parts(self, x: Tensor) -> Parts:
        """Return what the network makes of inputs before it is pooled; see `tokens`."""
        if self._ends_before is None:
            return self.architecture.parts(self.net, x)
        stages = self.choice.stages
        rows = stages.as_tokens(stages.before(self.net, self._ends_before, x))
        return Parts(rows.transpose(1, 2)[..., None, None])

    def tokens(self, parts: Sequence[Parts]) -> Tensor:
        """Turn what was made of inputs that follow one another in time into tokens [B, N, D]."""
        maps, extra = zip(*parts, strict=True)
        whole = parts[0]
        if len(parts) > 1:
            beside = None if extra[0] is None else torch.cat(extra, dim=1)
            whole = Parts(torch.cat(maps, dim=2), beside)
        if self._ends_before is None:
            return pooled(self.choice, whole)
        return whole.map.flatten(2).transpose(1, 2)

    @property
    def _ends_before(self) -> str | None:
        cut = self.choice.cut
        return None if cut == INPUT else cut

    def provenance(self) -> dict[str, Any]:
        """Return what a store must know of its tokens, JSON-plain."""
        choice = self.choice
        kind = self.architecture.kind
        image = choice.input_shape[1:] if kind == "image" else ()
        ends = {"layer": choice.layer, "class_tokens": choice.class_tokens}
        return {
            "backbone": choice.name,
            "weights": choice.weights,
            "weights_sha256": self.loaded.digest,
            "weights_key_map": [list(pair) for pair in choice.key_map],
            "weights_missing": [*self.loaded.missing, *self.loaded.wrong_shape],
            "input": list(choice.input_shape),
            "transform": choice.transform.facts() if kind == "video" else {"image": list(image)},
            "raw_grid": list(choice.raw_grid),
            "token_grid": list(choice.tokens) if choice.tokens else None,
            "width": choice.output_shape[1],
            "torchvision": torchvision.__version__,
            **self.architecture.facts,
            **{key: value for key, value in ends.items() if value not in {None, "drop"}},
            **self._cut(),
        }

    def _cut(self) -> dict[str, Any]:
        """Return where the network is cut, if it is: the facts above are those of all of it."""
        choice = self.choice
        if choice.cut is None:
            return {}
        return {"cut": {"before": choice.cut, "grid": list(choice.stored_grid)}}


def recorded(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of the choice that a `Backbone.provenance` records, all but its weights.

    Raises:
        ConfigError: the network that it names is not there.
    """
    shape = facts["input"]
    of_input = {
        "boxes": {"frames": shape[1]},
        "series": {"series": tuple(shape)},
        "image": {"image": tuple(shape[1:])},
        "video": {"frames": shape[1], "size": shape[-1]},
    }
    kept = {key: facts[key] for key in ("layer", "class_tokens") if key in facts}
    kind = registry.find(facts["backbone"]).kind
    if "cut" in facts:
        kept["cut"] = facts["cut"]["before"]
        stored = facts["cut"]["grid"][0]
        if kept["cut"] == INPUT and kind == "video" and stored != shape[1]:
            kept["stored_frames"] = stored
    return {"name": facts["backbone"], "tokens": facts["token_grid"], **kept, **of_input[kind]}


def prepare(choice: BackboneChoice, clips: Tensor) -> Tensor:
    """Turn what the decoder gives into a network's float input, on the clips' device.

    Args:
        choice: the network.
        clips: uint8 frames [B, T, 3, h, w], or float spectrogram frames [B, T, h, w], or
            float log-mel images [B, h, w] (both already standardised), boxes [B, T, 14, 7], or
            windows of a sensor [B, N, W, C].
    """
    kind = choice.architecture.kind
    if kind == "boxes":
        return registry.prepare_boxes(clips)
    if kind == "series":
        return clips.float()
    if clips.dtype == torch.uint8:
        return choice.transform.normalise(clips)
    return clips.float().unsqueeze(1).expand(-1, 3, *(-1,) * (clips.dim() - 1))


def pooled(choice: BackboneChoice, parts: Parts) -> Tensor:
    """Return the tokens [B, N, D] of a network's map and of what stands beside it."""
    features, extra = parts  # [B, D, t, h, w], [B, E, D]
    if choice.tokens is not None:
        features = nn.functional.adaptive_avg_pool3d(features, choice.tokens)
    tokens = features.flatten(2).transpose(1, 2)
    return tokens if extra is None else torch.cat([extra, tokens], dim=1)


def _load(choice: BackboneChoice) -> tuple[nn.Module, state_dicts.Loaded]:
    architecture, source = choice.architecture, choice.source
    if source == "none":
        return architecture.build(weights=None), state_dicts.Loaded("none")
    if source == "random":
        seed = parse_seed(choice.weights) or 0
        net = state_dicts.random_net(architecture, seed, choice.input_shape)
        # The digest is that of the drawn parameters: running statistics differ in the last
        # bits between processors.
        calibration = torch.tensor(state_dicts.CALIBRATION)
        drawn = {**dict(net.named_parameters()), "calibration": calibration}
        return net, state_dicts.Loaded(state_dicts.digest(drawn))
    if source == "library":
        assert architecture.pretrained is not None  # noqa: S101  (or the source is another)
        net = architecture.cut(architecture.pretrained())
        return net, state_dicts.Loaded(state_dicts.digest(net.state_dict()))
    where, tensors = read_weights(choice)
    with state_dicts.seeded(0):  # what a file leaves out must be the same in every job
        net = architecture.headless()
    return net, state_dicts.fill(net, tensors, where)


def read_weights(choice: BackboneChoice) -> tuple[str, dict[str, Tensor]]:
    """Return where a choice's file of weights lies, and its tensors under the network's names.

    Raises:
        CheckpointError: it is not there, or damaged.
    """
    if choice.source == "file":
        where, tensors = choice.weights, state_dicts.read_file(Path(choice.weights))
    else:
        member = state_dicts.enum_member(choice.architecture, choice.weights)
        where = str(state_dicts.cached_file(member))
        tensors = state_dicts.read_published(member, choice.name)
    return where, state_dicts.renamed(tensors, choice.key_map, where)
