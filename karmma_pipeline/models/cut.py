"""Suffixes and the model of their tokens as one: what trains where backbones are cut.

B clips in a batch, M modalities, N rows of D numbers as a store holds them, N' tokens of width D'.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from karmma_pipeline.models.fusion import TokenModel

if TYPE_CHECKING:  # they import torchvision, which a model of cached tokens does without
    from karmma_pipeline.models.augment import Augmentation, RandomViews
    from karmma_pipeline.models.backbones.suffix import Suffix

# Clips that pass through a suffix at once where a caller gives any number.
_AT_ONCE = 8


class CutModel(TokenModel):
    """The trained part of backbones, and behind it a model of tokens.

    A suffix runs for the clips whose modality the mask lets through, and for no other.

    Args:
        fusion: the model of tokens.
        suffixes: by modality; others' tokens go to ``fusion`` as they are.
        stored: modality to N and D of what a store holds.

    Attributes:
        augmentation: in training, of modalities whose pictures are stored; None: none.
    """

    def __init__(
        self,
        fusion: TokenModel,
        suffixes: Mapping[str, Suffix],
        stored: Mapping[str, tuple[int, int]],
    ) -> None:
        nn.Module.__init__(self)  # standardization is that of the tokens, which `fusion` has
        self.modalities, self.heads = fusion.modalities, fusion.heads
        self.tokens = {m: stored[m][0] for m in self.modalities}
        self.needs_means = fusion.needs_means
        self.fusion = fusion
        self.suffixes: Mapping[str, Suffix] = nn.ModuleDict(suffixes)  # type: ignore[assignment]
        self.augmentation: Augmentation | None = None

    def standardise(self, modality: str, mean: Tensor, std: Tensor) -> None:
        """Set what is subtracted from the tokens and divides them, [D'] each."""
        self.fusion.standardise(modality, mean, std)

    def set_mean(self, modality: str, mean: Tensor) -> None:
        """Set the mean of the training clips' tokens, [N', D']."""
        self.fusion.set_mean(modality, mean)

    def features(self, modality: str, stored: Tensor) -> Tensor:
        """Return the tokens [B, N', D'] of what a store holds of a modality, a few at a time."""
        if modality not in self.suffixes:
            return stored
        suffix = self.suffixes[modality]
        device = next(suffix.parameters()).device
        return torch.cat([suffix(some.to(device)) for some in torch.split(stored, _AT_ONCE)])

    def encode(self, tokens: Mapping[str, Tensor], mask: Tensor) -> dict[str, Tensor]:
        """Return the tokens of all modalities, zeros where the mask lets nothing through."""
        made, views = dict(tokens), None
        if self.training and self.augmentation is not None:
            from karmma_pipeline.models.augment import RandomViews  # torchvision, too

            views = RandomViews.draw(len(mask), self.augmentation)
        for column, m in enumerate(self.modalities):
            if m in self.suffixes:
                made[m] = self._tokens(self.suffixes[m], tokens[m], mask[:, column], views)
        return made

    def _tokens(
        self, suffix: Suffix, stored: Tensor, here: Tensor, views: RandomViews | None
    ) -> Tensor:
        rows = here.nonzero().flatten().to(stored.device)
        seen = views.rows(rows) if views is not None and suffix.takes_views(stored) else None
        if len(rows) == len(here):
            return suffix(stored, seen)
        if not len(rows):
            return torch.zeros(len(here), *suffix.choice.output_shape, device=stored.device)
        made: Tensor = suffix(stored[rows], seen)
        return made.new_zeros(len(here), *made.shape[1:]).index_copy(0, rows, made)

    def answer(self, tokens: Mapping[str, Tensor], mask: Tensor) -> dict[str, Tensor]:
        """Classify what `encode` gave; see `FusionModel.forward`."""
        return self.fusion(tokens, mask)

    def forward(self, tokens: Mapping[str, Tensor], mask: Tensor) -> dict[str, Tensor]:
        """Classify a batch as it is stored, [B, N, D]; see `FusionModel.forward`."""
        return self.answer(self.encode(tokens, mask), mask)


def model_of_tokens(model: TokenModel) -> TokenModel:
    """Return the part of a model that takes tokens: itself, unless backbones are cut."""
    return model.fusion if isinstance(model, CutModel) else model


def suffixes_of(model: nn.Module) -> dict[str, Suffix]:
    """Return the suffixes of a model by modality; none where no backbone is cut."""
    return dict(model.suffixes.items()) if isinstance(model, CutModel) else {}
