"""The logits of a run for subsets of its modalities, each computed once.

Up to 6 modalities those are all subsets. With more they are a few and, of other sizes, subsets that
are drawn for each clip, at most 60 passes together.

S subsets, D draws for each clip, N clips of the split, C classes of a head, M modalities.
"""

import csv
import io
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import save

from karmma_pipeline import files
from karmma_pipeline.data.loading.clips import (
    average_views,
    clips_of_split,
    predict_masked,
    subset_masks,
)
from karmma_pipeline.data.loading.loader import Batch, FeatureLoader
from karmma_pipeline.data.loading.masks import clip_keys, sized_masks
from karmma_pipeline.evaluation.recipe import EvaluateRecipe
from karmma_pipeline.jobs import StopFlag
from karmma_pipeline.logs import progress_bar
from karmma_pipeline.metrics import softmax
from karmma_pipeline.modalities import (
    ALL_SUBSETS_UP_TO,
    MOST_PASSES,
    NOTHING,
    evaluated_subsets,
)
from karmma_pipeline.models.saved import ModelCard, load_model
from karmma_pipeline.runs import saved_folder
from karmma_pipeline.store import TokenSource

_logger = logging.getLogger(__name__)

NOTHING_KEPT = "no results of this evaluation were saved"


@dataclass(frozen=True)
class SubsetLogits:
    """What one run says of the clips of a split.

    logits: head to float32 [S + D, N, C], raw. labels: head to int64 [N], -1 unknown.
    clips: a row of the store for each [N], that of the middle view where it has views.
    present: bool [N, M]. clip_ids: bytes [N]. subsets: S tuples of modalities. drawn: bool
    [D, N, M], the masks of the last D. checkpoint: which model of the run, `best` or `last`.
    """

    name: str
    card: ModelCard
    store: TokenSource
    clips: npt.NDArray[np.int64]
    subsets: tuple[tuple[str, ...], ...]
    logits: dict[str, npt.NDArray[np.float32]]
    labels: dict[str, npt.NDArray[np.int64]]
    present: npt.NDArray[np.bool_]
    clip_ids: npt.NDArray[np.bytes_]
    drawn: npt.NDArray[np.bool_]
    checkpoint: str

    def to_csv(self) -> str:
        """Return what the run says of each clip with every modality that it has, as a table.

        A clip that has none gets no class: what a network answers then is what is frequent, not
        what is there.
        """
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        heads = [name for head in self.logits for name in (head, f"{head}_score", f"{head}_label")]
        writer.writerow(["clip_id", "seen", *heads])
        modalities = np.array(self.store.modalities)
        for row, clip_id in enumerate(self.clip_ids):
            seen = "+".join(modalities[self.present[row]]) or NOTHING
            cells = [cell for head in self.logits for cell in self._cells(head, row, seen)]
            writer.writerow([clip_id.decode(), seen, *cells])
        return buffer.getvalue()

    def _cells(self, head: str, row: int, seen: str) -> list[str]:
        names, true = self.card.heads[head], int(self.labels[head][row])
        truth = names[true] if true >= 0 else ""
        if seen == NOTHING:
            return [NOTHING, "", truth]
        shares = softmax(self.logits[head][0, row])  # the largest subset comes first
        best = int(np.argmax(self.logits[head][0, row]))
        return [names[best], f"{shares[best]:.4f}", truth]

    def save(self, path: Path) -> None:
        """Write raw logits, labels and ids, from which every metric can be computed again.

        The file's ``karmma`` metadata is JSON: the run's name and the subsets in order.
        """
        tensors: dict[str, npt.NDArray[np.generic]] = {
            f"logits.{head}": np.ascontiguousarray(values) for head, values in self.logits.items()
        }
        tensors |= {f"labels.{head}": values for head, values in self.labels.items()}
        width = self.clip_ids.dtype.itemsize
        ids = np.ascontiguousarray(self.clip_ids).view(np.uint8).reshape(-1, width)
        tensors |= {"present": self.present.astype(np.uint8), "clip_ids": ids}
        if len(self.drawn):
            tensors["drawn"] = self.drawn.astype(np.uint8)
        # One entry only: safetensors writes several in an order that chance decides.
        about = json.dumps({"name": self.name, "subsets": self.subsets})
        files.write_bytes(path, save(tensors, metadata={"karmma": about}))


def predict(
    run: Path, store: TokenSource, recipe: EvaluateRecipe, device: torch.device, stop: StopFlag
) -> SubsetLogits:
    """Run a saved model over the split, once per subset of its modalities; says how often.

    Of a store with views, logits are the mean over a clip's views.

    Args:
        run: folder of the run.
        store: what it is run on, see `features_for`.
        recipe: which clips, in what batches, with how many draws.
        device: where the model runs.
        stop: asks for a stop.

    Raises:
        StoreError: a clip has tokens that are NaN or infinite.
        ManifestError: the split is empty.
    """
    folder = saved_folder(run, recipe.checkpoint)
    model, card = load_model(folder)
    rows = clips_of_split(store, recipe.split, recipe.exclude)
    clips, V = store.view_rows(rows), store.view_count
    present = np.asarray(store.present[rows].reshape(len(clips), V, -1).any(axis=1))
    model = model.to(device)
    chosen = evaluated_subsets(store.modalities)
    drawn = _draw(store.names(clips), present, chosen, recipe)
    loader = FeatureLoader(store, rows, max(1, recipe.batch_size // V) * V)
    outputs: dict[str, list[npt.NDArray[np.float32]]] = {head: [] for head in card.heads}
    name = recipe.names.get(str(run), card.name)
    passes = len(chosen) + len(drawn)
    also = f" and {len(drawn)} sampled masks" if len(drawn) else ""
    _logger.info(
        "evaluating %s: %d passes for each of %d clips, %d subsets%s",
        *(name, passes, len(clips), len(chosen), also),
    )
    with progress_bar(
        total=passes * len(loader), desc=f"evaluate {name}", unit="pass", dynamic_ncols=True
    ) as bar:

        def check() -> None:
            stop.check(NOTHING_KEPT)
            bar.update()

        masks = _masks(store, rows, chosen, np.repeat(drawn, V, axis=1))
        answers = predict_masked(model, loader, masks, device, check)
        for of_batch in average_views(answers, store):
            for head, parts in outputs.items():
                parts.append(np.stack([logits[head].numpy() for _, logits in of_batch]))
    return SubsetLogits(
        name,
        card,
        store,
        clips,
        chosen,
        {head: np.concatenate(parts, axis=1) for head, parts in outputs.items()},
        {head: np.asarray(of[clips], np.int64) for head, of in store.labels.items()},
        present,
        store.names(clips),
        drawn,
        folder.name,
    )


def _draw(
    clip_ids: npt.NDArray[np.bytes_],
    present: npt.NDArray[np.bool_],
    chosen: tuple[tuple[str, ...], ...],
    recipe: EvaluateRecipe,
) -> npt.NDArray[np.bool_]:
    """Return the masks that are drawn for each clip, bool [D, N, M]; none where no size is open."""
    low, high = drawn_sizes(present, chosen)
    count = min(recipe.draws, MOST_PASSES - len(chosen)) if (low <= high).any() else 0
    keys = clip_keys(clip_ids)
    return sized_masks(recipe.seed, count, keys, present, low, high)


def drawn_sizes(
    present: npt.NDArray[np.bool_], chosen: Sequence[Sequence[str]]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the smallest and the largest size [N] of which not all of a clip's subsets are chosen.

    Where all subsets of all sizes are, the largest is below the smallest.
    """
    count, most = present.sum(axis=1), present.shape[1]
    if most <= ALL_SUBSETS_UP_TO:
        return np.ones_like(count), np.zeros_like(count)
    low = 2 if any(len(subset) == 1 for subset in chosen) else 1
    lack = 2 if any(len(subset) == most - 1 for subset in chosen) else 1
    return np.full_like(count, low), count - lack


def _masks(
    store: TokenSource,
    rows: npt.NDArray[np.int64],
    chosen: tuple[tuple[str, ...], ...],
    drawn: npt.NDArray[np.bool_],
) -> Callable[[Batch], Iterator[torch.Tensor]]:
    """Return the masks of a batch for `predict_masked`."""
    of_subsets = subset_masks(store, chosen)

    def masks(batch: Batch) -> Iterator[torch.Tensor]:
        yield from of_subsets(batch)
        of_batch = torch.from_numpy(drawn[:, np.searchsorted(rows, batch.clip_index.numpy())])
        yield from of_batch & batch.present

    return masks


def align(runs: list[SubsetLogits]) -> list[SubsetLogits]:
    """Return the runs, which share their clips, with these in the order of the first."""
    first = runs[0]
    return [first, *(_in_order(run, first.clip_ids) for run in runs[1:])]


def _in_order(run: SubsetLogits, clip_ids: npt.NDArray[np.bytes_]) -> SubsetLogits:
    if np.array_equal(run.clip_ids, clip_ids):
        return run
    rows = np.empty(len(clip_ids), np.int64)
    rows[np.argsort(clip_ids)] = np.argsort(run.clip_ids)
    return replace(
        run,
        clips=run.clips[rows],
        logits={head: of[:, rows] for head, of in run.logits.items()},
        labels={head: of[rows] for head, of in run.labels.items()},
        present=run.present[rows],
        clip_ids=run.clip_ids[rows],
        drawn=run.drawn[:, rows],
    )
