"""What a model is run on: stores are met by the features in them, classes by their names.

A model may be asked about clips that it was not trained on: without labels, with fewer or other
classes, without some of its modalities. What must be the same is where tokens come from.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from torch import Tensor

from karmma_pipeline import config
from karmma_pipeline.errors import StoreError, counted
from karmma_pipeline.modalities import Reason, canonical
from karmma_pipeline.models.saved import PLACES, VERSIONS, ModelCard
from karmma_pipeline.store import FeatureStore, TokenSource, find_joined
from karmma_pipeline.store.joined import open_joined
from karmma_pipeline.store.spec import ModalitySpec


class ModelView(TokenSource):
    """A store as a model knows the world: its modalities, its heads and its classes.

    A modality that the store lacks is absent of every clip; labels are in the model's classes, -1
    where a clip has none of them. What else the store has is left out.

    Args:
        source: the store, or several as one.
        card: of the model.

    Attributes:
        notes: what a reader must know of the labels, one sentence each.
    """

    def __init__(self, source: TokenSource, card: ModelCard) -> None:
        self.source, self.path, self.digest = source, source.path, source.digest
        self.clip_ids, self.split, self.group = source.clip_ids, source.split, source.group
        self.views = source.views
        self.modalities, self.heads = canonical(card.modalities), dict(card.heads)
        self.specs = {m: source.specs.get(m) or _spec(card, m) for m in self.modalities}
        self.reasons = np.full((len(self), len(self.modalities)), Reason.NOT_IN_DATASET, np.uint8)
        for column, m in enumerate(self.modalities):
            if m in source.modalities:
                theirs = source.modalities.index(m)
                self.reasons[:, column] = np.asarray(source.reasons)[:, theirs]
        self.present = self.reasons == Reason.PRESENT
        self.notes: list[str] = []
        self.labels = {head: self._labels(head) for head in self.heads}

    def _labels(self, head: str) -> npt.NDArray[np.int32]:
        if head not in self.source.heads:
            return np.full(len(self), -1, np.int32)
        number = {name: i for i, name in enumerate(self.heads[head])}
        names = self.source.heads[head]
        to = np.array([number.get(name, -1) for name in names] + [-1], np.int32)
        theirs = np.asarray(self.source.labels[head])
        labels = to[theirs]
        if other := sorted({names[i] for i in np.unique(theirs[(theirs >= 0) & (labels < 0)])}):
            count = int(((theirs >= 0) & (labels < 0)).sum())
            self.notes.append(
                f"{counted(count, 'clip')} with a {head} that the model was not trained on "
                f"({', '.join(other[:5])}{', ...' if len(other) > 5 else ''}): treated as "
                f"having no {head}."
            )
        return labels

    @property
    def clip_digests(self) -> npt.NDArray[np.bytes_]:
        """Digest of each clip in the source."""
        return self.source.clip_digests

    def gather_parts(self, modality: str, index: Tensor, out: Sequence[Tensor]) -> None:
        """Fill one tensor [B, *shape] per part (see `parts`), as stored; absent clips are zeros."""
        if modality in self.source.modalities:
            self.source.gather_parts(modality, index, out)
        else:
            for tensor in out:
                tensor.zero_()


def _spec(card: ModelCard, modality: str) -> ModalitySpec:
    tokens, width = card.modalities[modality]
    return ModalitySpec(tokens=tokens, width=width, provenance=card.provenance[modality])


def features_for(card: ModelCard, run: Path, stores: Sequence[Path]) -> TokenSource:
    """Return what the run was trained on, or else other clips of the same features.

    Both may be one store or several as one.

    Raises:
        StoreError: no store holds features of the kind that the run was trained on; what is other
            is named.
    """
    opened = [FeatureStore.open(path) for path in stores]
    if (found := find_joined(opened, card.store_digest, card.stores)) is not None:
        return found
    faults = {store.path: next(_differences(card, store), "") for store in opened}
    fitting = [store for store in opened if not faults[store.path]]
    if not fitting:
        reasons = "; ".join(f"{path}: {fault}" for path, fault in faults.items())
        raise StoreError(
            f"{run}: was trained on different features ({reasons}); pass the stores that it was "
            "trained on, or stores made with the same recipe, with --store."
        )
    whole = [store for store in fitting if {*card.modalities} <= {*store.modalities}]
    chosen = whole[:1] or fitting
    view = ModelView(open_joined([store.path for store in chosen], "join"), card)
    for store in chosen:
        view.notes += [
            f"{line}; results may differ in the last bits." for line in _versions(card, store)
        ]
    return view


def view_of(card: ModelCard, store: TokenSource, run: str) -> TokenSource:
    """Return a store as a model knows the world: itself if it has just that, else a view.

    Raises:
        StoreError: its tokens come from another network or other settings.
    """
    if fault := next(_differences(card, store), ""):
        raise StoreError(
            f"{store.path}: {fault}: its tokens come from a different backbone or different "
            f"settings than those that {run} was trained on. Extract these clips with the "
            "recipe of the training store."
        )
    if store.heads == card.heads and {*store.modalities} == {*card.modalities}:
        return store
    return ModelView(store, card)


def _differences(card: ModelCard, store: TokenSource) -> Iterator[str]:
    """Yield how a store's features are other than those that a model was trained on."""
    common = [m for m in store.modalities if m in card.modalities]
    if not common:
        yield f"has none of {', '.join(canonical(card.modalities))}"
    for m in common:
        if store.shape(m) != card.modalities[m]:
            yield (
                f"{m}: token shape {store.shape(m)} in the store and {card.modalities[m]} in "
                "the model"
            )
        digest = store.provenance[m].get("weights_sha256")
        same = VERSIONS | (PLACES if digest else frozenset())
        for one in config.differences(store.provenance[m], card.provenance.get(m), m):
            if one.path.removeprefix(f"{m}.") not in same:
                yield one.said("in the store", "in the model")


def _versions(card: ModelCard, store: TokenSource) -> Iterator[str]:
    """Yield which libraries made a store's features that are others than the model's."""
    for m in store.modalities:
        for one in config.differences(store.provenance[m], card.provenance.get(m), m):
            if m in card.modalities and one.path.removeprefix(f"{m}.") in VERSIONS:
                yield one.said("in the store", "in the model")
