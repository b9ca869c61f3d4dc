"""What lies behind the cut of a backbone: the part that a training changes.

B clips in a batch, N rows of D numbers as a store holds them, N' tokens of width D'.
"""

import math
from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from karmma_pipeline.errors import CheckpointError
from karmma_pipeline.models.augment import RandomViews
from karmma_pipeline.models.backbones.backbone import Backbone, pooled, prepare, recorded
from karmma_pipeline.models.backbones.checkpointing import compute_again
from karmma_pipeline.models.backbones.choice import INPUT, BackboneChoice
from karmma_pipeline.models.backbones.layers import Stages
from karmma_pipeline.models.backbones.watched import Blocks
from karmma_pipeline.views import middle_frames

#: The third channel of a picture of flow, which says nothing and is not stored.
_NO_FLOW = 128


class Suffix(nn.Module):
    """The modules of a network behind its cut, fed with what a store holds of the part before it.

    Its weights are undefined until `load_state_dict`; see `weights_behind`. All of it is in
    evaluation mode until `adapt`, in training, too: dropout, stochastic depth and batch norms are
    as they are when the network is used.

    Args:
        choice: the network, with its cut.
    """

    def __init__(self, choice: BackboneChoice) -> None:
        super().__init__()
        assert choice.cut is not None  # noqa: S101  (there is no suffix without)
        self.choice, self.architecture, self.cut = choice, choice.architecture, choice.cut
        self.net = self.architecture.headless()
        if self.cut != INPUT:
            choice.stages.drop_before(self.net, self.cut)
        self._moves: tuple[bool, bool] = (False, False)
        self.train(mode=False)

    def adapt(self, *, freeze_norm: bool, stochastic: bool, save_memory: bool) -> None:
        """Say how it trains.

        Args:
            freeze_norm: batch norms keep their statistics, scale and shift.
            stochastic: dropout and stochastic depth act as in the network's own training.
            save_memory: the backward pass computes anew what lies inside of its stages or blocks.
        """
        self._moves = not freeze_norm, stochastic
        if save_memory:
            for path in self.stages():
                compute_again(self.net.get_submodule(path))
        for norm in self.norms():
            norm.requires_grad_(requires_grad=not freeze_norm)
        self.train(self.training)

    def stages(self) -> list[str]:
        """Return the paths of its stages or blocks; none if it is not made of such."""
        named = self.architecture.feature_map
        if self.cut != INPUT:
            return self.choice.stages.split(self.cut)[1]
        if isinstance(named, Stages):
            return [*chain(*named.modules.values())]
        return named.paths(self.net) if isinstance(named, Blocks) else []

    def norms(self) -> list[nn.Module]:
        """Return its batch norms, whose statistics depend on which clips share a pass."""
        kind = nn.modules.batchnorm._BatchNorm
        return [module for module in self.modules() if isinstance(module, kind)]

    def train(self, mode: bool = True) -> "Suffix":
        """Set the mode: what `adapt` has not named stays in that of evaluation."""
        norms, others = self._moves
        super().train(mode and others)
        for norm in self.norms():
            norm.train(mode and norms)
        self.training = mode
        return self

    def forward(self, stored: Tensor, views: RandomViews | None = None) -> Tensor:
        """Turn what is stored [B, N, D] into the tokens of the whole network, [B, N', D'].

        Args:
            stored: rows; of more frames than the network takes all, or a window of them.
            views: of clips whose pictures are stored; see `takes_views`.
        """
        if self.cut == INPUT:
            if stored.shape[1] == self.choice.stored_frames:
                stored = stored[:, middle_frames(stored.shape[1], self.choice.frame_count)]
            x = prepare(self.choice, self._input(stored))
            if views is not None:
                is_flow = stored.shape[2] == 2 * math.prod(self.choice.input_shape[-2:])
                x = views.apply(x, self.choice.transform, is_flow)
            return pooled(self.choice, self.architecture.parts(self.net, x))
        of_net = self.choice.stages
        x = of_net.of_tokens(stored.float(), self.choice.stored_grid)
        made = of_net.after(self.net, self.cut, x)
        return pooled(self.choice, self.architecture.kept(made))

    def takes_views(self, stored: Tensor) -> bool:
        """Tell whether pictures are stored, which may be seen in random views."""
        return self.cut == INPUT and stored.dtype == torch.uint8

    def _input(self, stored: Tensor) -> Tensor:
        """Turn rows into what the decoder gave."""
        if self.architecture.kind == "series":
            return torch.unflatten(stored, 2, self.choice.input_shape[1:])
        if self.architecture.kind == "image":
            return stored
        sides = self.choice.input_shape[-2:]
        clips = torch.unflatten(stored, 2, (-1, *sides))
        if clips.shape[2] == 1:  # spectrograms of frames
            return clips.squeeze(2)
        clips = clips.to(torch.uint8)  # a recogniser's arrays are all of float32
        if clips.shape[2] == 2:
            third = clips.new_full((), _NO_FLOW).expand(*clips.shape[:2], 1, *sides)
            return torch.cat([clips, third], dim=2)
        return clips


def weights_behind(facts: Mapping[str, Any], weights: str | None = None) -> dict[str, Tensor]:
    """Return the weights with which the part behind a cut begins: those of the whole network.

    Args:
        facts: provenance of a modality of a store.
        weights: where they lie now, if they have moved.

    Raises:
        CheckpointError: they are not there, or are not those whose prefix made the store.
    """
    tree = recorded(facts) | {"weights": weights or facts["weights"]}
    if keys := facts.get("weights_key_map"):
        tree["key_map"] = keys
    backbone = Backbone(BackboneChoice.model_validate(tree))
    if backbone.loaded.digest != facts["weights_sha256"]:
        raise CheckpointError(
            f"weights={tree['weights']!r}: their digest is {backbone.loaded.digest[:12]}, but "
            f"the store was made with {facts['weights_sha256'][:12]}; pass the file it was made "
            "with."
        )
    return backbone.net.state_dict()
