"""Clips whose cached features are NaN or infinite: found when they do harm, then taken as absent.

Nothing is looked at while losses are finite, so a clean store costs nothing. Once a modality of
a clip is known to be bad, the run goes on exactly as if the store had called it absent.

B clips in a batch, M modalities, N tokens, D width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from karmma_pipeline.data.loading.loader import Batch
from karmma_pipeline.data.loading.masks import clip_keys, modality_mask
from karmma_pipeline.store import TokenSource
from karmma_pipeline.training.objective import UNKNOWN

Found = dict[tuple[str, str], int]
"""Clip id and modality of what is bad, and the clip's place in the store."""


def finite(tokens: Mapping[str, Tensor]) -> Tensor:
    """Tell of which clips' modalities all features are finite numbers, bool [B, M]."""
    columns = [t.isfinite().flatten(1).all(dim=1).cpu() for t in tokens.values()]
    return torch.stack(columns, dim=1)


class Screen:
    """What is known to be bad in a store, and the batches without it.

    Args:
        store: the store that batches come from.
        seed: of the masks.
        p: modality dropout of the masks.
        known: clip ids and modalities that a resumed run had found.
    """

    def __init__(
        self, store: TokenSource, seed: int, p: float, known: Sequence[Sequence[str]] = ()
    ) -> None:
        self.store, self.seed, self.p = store, seed, p
        self.bad = torch.zeros(len(store), len(store.modalities), dtype=torch.bool)
        self.marks: list[tuple[str, str]] = []
        if known:
            place = {clip_id.decode(): i for i, clip_id in enumerate(store.clip_ids.tolist())}
            self.add({(clip, modality): place[clip] for clip, modality in known})

    def add(self, found: Found) -> None:
        """Take these as absent from now on."""
        for (clip, modality), place in found.items():
            column = self.store.modalities.index(modality)
            if not self.bad[place, column]:
                self.bad[place, column] = True
                self.marks.append((clip, modality))

    def find(self, batch: Batch) -> Found:
        """Return what is bad in a batch and not yet known."""
        stored = {m: batch.scales.get(m, batch.tokens[m]) for m in self.store.modalities}
        bad = ~finite(stored) & batch.present
        bad &= ~self.bad[batch.clip_index]
        found: Found = {}
        for row, column in bad.nonzero().tolist():
            place = int(batch.clip_index[row])
            found[self.store.clip_ids[place].decode(), self.store.modalities[column]] = place
        return found

    def apply(self, batch: Batch, epoch: int, training: bool = True) -> Batch:
        """Return the batch as if the store had called what is bad absent.

        A clip with nothing left has no label here: it counts for nothing.
        """
        bad = self.bad[batch.clip_index]
        if not bad.any():
            return batch
        present = batch.present & ~bad
        keys = clip_keys(self.store.clip_ids[batch.clip_index.numpy()])
        p = self.p if training else 0.0
        mask = torch.from_numpy(modality_mask(self.seed, epoch, keys, present.numpy(), p))
        empty = ~present.any(dim=1)
        labels = {h: of.masked_fill(empty, UNKNOWN) for h, of in batch.labels.items()}
        return replace(batch, present=present, mask=mask, labels=labels)
