"""The logits of a run for every subset of modalities, each computed once.

S subsets, N clips of the split, C classes of a head, M modalities.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import save
from tqdm import tqdm

from karmma_pipeline import files
from karmma_pipeline.data.loader import FeatureLoader
from karmma_pipeline.data.store import FeatureStore
from karmma_pipeline.errors import ConfigError, ManifestError, StoreError
from karmma_pipeline.evaluate.recipe import EvaluateRecipe
from karmma_pipeline.jobs import StopFlag
from karmma_pipeline.modalities import subsets
from karmma_pipeline.models.saved import ModelCard, load_model


@dataclass(frozen=True)
class Predictions:
    """What one run says of the clips of a split.

    logits: head to float32 [S, N, C], raw. labels: head to int64 [N], -1 unknown.
    present: bool [N, M]. clip_ids: bytes [N]. subsets: S tuples of modalities.
    """

    name: str
    card: ModelCard
    store: FeatureStore
    clips: npt.NDArray[np.int64]
    subsets: tuple[tuple[str, ...], ...]
    logits: dict[str, npt.NDArray[np.float32]]
    labels: dict[str, npt.NDArray[np.int64]]
    present: npt.NDArray[np.bool_]
    clip_ids: npt.NDArray[np.bytes_]

    def save(self, path: Path) -> None:
        """Write raw logits, labels and ids, from which every metric can be computed again."""
        tensors: dict[str, npt.NDArray[np.generic]] = {
            f"logits.{head}": np.ascontiguousarray(values) for head, values in self.logits.items()
        }
        tensors |= {f"labels.{head}": values for head, values in self.labels.items()}
        width = self.clip_ids.dtype.itemsize
        ids = np.ascontiguousarray(self.clip_ids).view(np.uint8).reshape(-1, width)
        tensors |= {"present": self.present.astype(np.uint8), "clip_ids": ids}
        names = {"subsets": " ".join("+".join(s) for s in self.subsets), "name": self.name}
        files.write_bytes(path, save(tensors, metadata=names))


def predict(run: Path, recipe: EvaluateRecipe, device: torch.device, stop: StopFlag) -> Predictions:
    """Run a saved model over the split, once per subset of its modalities.

    Raises:
        StoreError: none of the stores is the one that the run was trained on.
        ManifestError: the split is empty.
    """
    folder = run / recipe.checkpoint
    model, card = load_model(folder if folder.is_dir() else run)
    store = _matching(card, run, recipe.stores)
    clips = _clips(store, recipe.split)
    model = model.to(device)
    chosen = subsets(store.modalities)
    loader = FeatureLoader(store, clips, recipe.batch_size)
    outputs: dict[str, list[npt.NDArray[np.float32]]] = {head: [] for head in card.heads}
    name = recipe.names.get(str(run), card.name)
    for batch in tqdm(loader.epoch(0), f"evaluate {name}", total=len(loader), unit="batch"):
        stop.check("nothing of this evaluation is kept")
        tokens = batch.tokens_on(device)
        parts = []
        for subset in chosen:
            mask = batch.present & torch.tensor([m in subset for m in store.modalities])
            with torch.inference_mode():
                parts.append({h: v.float().cpu().numpy() for h, v in model(tokens, mask).items()})
        for head, rows in outputs.items():
            rows.append(np.stack([part[head] for part in parts]))
    return Predictions(
        name,
        card,
        store,
        clips,
        chosen,
        {head: np.concatenate(rows, axis=1) for head, rows in outputs.items()},
        {head: np.asarray(of[clips], np.int64) for head, of in store.labels.items()},
        store.present[clips],
        store.clip_ids[clips],
    )


def _matching(card: ModelCard, run: Path, stores: list[Path]) -> FeatureStore:
    opened = [FeatureStore.open(path) for path in stores]
    for store in opened:
        if store.digest == card.store_digest:
            return store
    for store in opened:  # other clips, such as a test set, of the same features
        same = store.provenance == card.provenance and store.heads == card.heads
        if same and {m: store.shape(m) for m in store.modalities} == card.modalities:
            return store
    given = ", ".join(map(str, stores))
    raise StoreError(
        f"{run}: was trained on other features than those in {given}; "
        "add the store that it was trained on with --store."
    )


def _clips(store: FeatureStore, split: str) -> npt.NDArray[np.int64]:
    chosen = store.split == split if split else np.ones(len(store), bool)
    if not chosen.any():
        known = ", ".join(sorted(set(store.split.tolist())))
        raise ManifestError(f"{store.path}: no clip is in split={split!r}; there are: {known}.")
    return np.flatnonzero(chosen)


def check_same_clips(runs: list[Predictions]) -> None:
    """Refuse to compare runs that answered different clips.

    Raises:
        ConfigError: the runs' stores hold other clips, labels or modalities.
    """
    first = runs[0]
    for other in runs[1:]:
        same = (
            first.subsets == other.subsets
            and first.card.heads == other.card.heads
            and np.array_equal(first.clip_ids, other.clip_ids)
        )
        if not same:
            raise ConfigError(
                f"runs {first.name!r} and {other.name!r} do not share their clips, classes and "
                "modalities; evaluate them in separate reports."
            )
