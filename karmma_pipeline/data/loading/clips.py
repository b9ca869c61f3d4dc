"""Which clips of a store are used, what a network answers for them, and what cannot be used.

B clips in a batch, M modalities, N tokens, D width, C classes of a head.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from karmma_pipeline.data.loading.loader import Batch, FeatureLoader
from karmma_pipeline.errors import CheckpointError, ConfigError, ManifestError, StoreError
from karmma_pipeline.store.source import TokenSource
from karmma_pipeline.store.spec import ClipNumbers

#: Clip id and modality.
ClipModality = tuple[str, str]

_MOST_NAMED = 20


def clips_of_split(store: TokenSource, split: str, exclude: Path | None = None) -> ClipNumbers:
    """Return the clips of a split, but those whose ids stand in a file; with views, their rows.

    Args:
        store: where clips lie.
        split: empty: every clip.
        exclude: text file with one clip id per line.

    Raises:
        ManifestError: no clip is left.
        ConfigError: the file cannot be read, or names a clip that the store does not have.
    """
    chosen = store.split == split if split else np.ones(len(store), bool)
    if not chosen.any():
        known = ", ".join(sorted(set(store.split.tolist()))) or "none"
        raise ManifestError(f"{store.path}: no clip is in split={split!r}; its splits: {known}.")
    if exclude is not None:
        chosen &= ~np.isin(store.names(), excluded_ids(store, exclude))
        if not chosen.any():
            raise ManifestError(
                f"{exclude}: excludes every clip of split={split!r} of {store.path}."
            )
    return np.flatnonzero(chosen)


def excluded_ids(store: TokenSource, path: Path) -> npt.NDArray[np.bytes_]:
    """Read the ids of the clips that are left out, sorted.

    Raises:
        ConfigError: the file cannot be read, or names a clip that the store does not have: a
            misspelt id would leave nothing out, silently.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"exclude={str(path)!r}: cannot be read ({error}).") from None
    ids = sorted({line.strip().encode() for line in lines if line.strip()})
    known = set(store.names().tolist())
    if unknown := [clip_id.decode() for clip_id in ids if clip_id not in known]:
        raise ConfigError(
            f"{path}: {store.path} has no clip {unknown[0]!r}; write one clip id per line."
        )
    return np.array(ids, store.clip_ids.dtype)


def non_finite(store: TokenSource, batch: Batch) -> list[ClipModality]:
    """Return the clips of a batch, and their modalities, whose tokens are NaN or infinite.

    This reads every token, so it is asked only when a loss or logits are not finite.
    """
    # Tokens in int8 are always finite: what may not be is the scale beside them.
    stored = [batch.scales.get(m, batch.tokens[m]) for m in store.modalities]
    finite = torch.stack([t.isfinite().flatten(1).all(dim=1).cpu() for t in stored], dim=1)
    return [
        (store.clip_ids[int(batch.clip_index[row])].decode(), store.modalities[column])
        for row, column in (~finite & batch.present).nonzero().tolist()
    ]


def non_finite_error(
    store: TokenSource, bad: Sequence[ClipModality], advice: str = ""
) -> StoreError:
    """Return the error that names clips whose tokens are NaN or infinite, and what to do."""
    folders = ", ".join(dict.fromkeys(str(_folder(store, modality)) for _, modality in bad))
    named = ", ".join(f"{clip} ({modality})" for clip, modality in bad[:_MOST_NAMED])
    more = ", ..." if len(bad) > _MOST_NAMED else ""
    return StoreError(
        f"{folders}: tokens of these clips are NaN or infinite: {named}{more}. `karmma store "
        "verify --repair` lists all such clips and removes their shards, which `karmma extract` "
        "then rebuilds; or exclude the clips with exclude: FILE in the recipe, a text file with "
        f"one clip id per line.{advice and ' '}{advice}"
    )


def _folder(store: TokenSource, modality: str) -> Path:
    """Return the folder that holds a modality: of several stores as one, the first that does."""
    source: Any = getattr(store, "source", store)  # tokens may lie on a device
    parts: Sequence[TokenSource] = getattr(source, "stores", [source])
    return next((part.path for part in parts if modality in part.modalities), store.path)


class MaskedModel(Protocol):
    """What is asked about clips: a `TokenModel` of `karmma_pipeline.models`."""

    def encode(self, tokens: Mapping[str, Tensor], mask: Tensor, /) -> Mapping[str, Tensor]:
        """Return what does not depend on a mask, of all that any of them lets through."""

    def answer(self, tokens: Mapping[str, Tensor], mask: Tensor, /) -> dict[str, Tensor]:
        """Return logits, head to [B, C]."""


#: A mask, bool [n, M], of the first n clips of a batch, and the logits under it, head to [n, C].
MaskLogits = tuple[Tensor, dict[str, Tensor]]


@torch.inference_mode()
def predict_masked(
    model: MaskedModel,
    loader: FeatureLoader,
    masks: Callable[[Batch], Iterable[Tensor]],
    device: torch.device,
    check: Callable[[], None] = lambda: None,
) -> Iterator[tuple[Batch, list[MaskLogits]]]:
    """Run a model over the clips of a loader, under one mask after the other.

    Args:
        model: takes tokens and a mask, on the device already.
        loader: of the clips, in order.
        masks: returns the masks of a batch, bool [n, M] each: of all its clips, or of the first n.
        device: where the model runs.
        check: called before each pass of a batch, may raise.

    Yields:
        Each batch with its masks and the float32 logits under them, on the CPU.

    Raises:
        StoreError: logits are not finite since tokens are not. Without this the class of such a
            clip would be read off as 0, silently.
        CheckpointError: logits are not finite and tokens are.
    """
    store = loader.store
    for batch in loader.epoch(0):
        asked = list(masks(batch))
        tokens = model.encode(batch.tokens_on(device), _any_of(asked, batch.present))
        answers: list[MaskLogits] = []
        for mask in asked:
            check()
            some = {m: of[: len(mask)] for m, of in tokens.items()}
            said = model.answer(some, mask)
            answers.append((mask, {h: of.float().cpu() for h, of in said.items()}))
        if not all(all_finite(logits) for _, logits in answers):
            if bad := non_finite(store, batch):
                raise non_finite_error(store, bad)
            raise CheckpointError(
                "the model's logits are NaN or infinite although the tokens are finite: its "
                "training diverged; train again with a lower optimiser.lr."
            )
        yield batch, answers


def _any_of(masks: Sequence[Tensor], present: Tensor) -> Tensor:
    """Return what some mask lets through, bool [B, M]."""
    seen = torch.zeros_like(present)
    for mask in masks:
        seen[: len(mask)] |= mask
    return seen


def subset_masks(
    store: TokenSource, subsets: Sequence[Sequence[str]]
) -> Callable[[Batch], Iterator[Tensor]]:
    """Return the masks for `predict_masked` under which some subsets of modalities are seen.

    A modality of a subset that the store does not have is absent.
    """
    columns = [torch.tensor([m in subset for m in store.modalities]) for subset in subsets]
    return lambda batch: (batch.present & column for column in columns)


def average_views(
    answers: Iterable[tuple[Batch, list[MaskLogits]]], store: TokenSource
) -> Iterator[list[MaskLogits]]:
    """Turn the answers for batches of rows, all views of each clip, into answers for the clips.

    A clip's logits are the mean over those of its views in which a model sees anything at all, or
    over all of them; its mask is what it sees in any view.
    """
    for _, of_rows in answers:
        if store.views is None:
            yield of_rows
            continue
        yield [averaged(mask, logits, store.view_count) for mask, logits in of_rows]


def averaged(mask: Tensor, logits: dict[str, Tensor], views: int) -> MaskLogits:
    """Turn a mask and logits of B * V rows, all views of B clips, into those of the clips."""
    seen = mask.any(dim=1).view(-1, views)
    seen = torch.where(seen.any(dim=1, keepdim=True), seen, True)[..., None]
    mean = {}
    for head, of in logits.items():
        of_views = torch.where(seen, of.view(-1, views, of.shape[-1]), 0)
        mean[head] = of_views.sum(dim=1) / seen.sum(dim=1)
    return mask.view(-1, views, mask.shape[-1]).any(dim=1), mean


def all_finite(logits: dict[str, Tensor]) -> bool:
    """Tell whether the logits of all heads are finite numbers."""
    return all(bool(of.isfinite().all()) for of in logits.values())
