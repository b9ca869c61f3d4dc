"""The frozen teacher's logits for every mask of every clip, computed once per teacher and store.

With M modalities a clip has 2^M - 1 masks, so distillation needs neither the teacher nor its
tokens while it trains. N clips, C classes of all heads together.
"""

import hashlib
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from tqdm import tqdm

from karmma_pipeline import files
from karmma_pipeline.data.loader import FeatureLoader
from karmma_pipeline.data.store import FeatureStore, TokenSource
from karmma_pipeline.errors import CheckpointError, StoreError
from karmma_pipeline.jobs import StopFlag
from karmma_pipeline.modalities import subsets
from karmma_pipeline.models.saved import WEIGHTS, load_model

_BATCH = 64


class TeacherTable:
    """Looks up what the teacher says of a clip under a mask of the student's modalities.

    Args:
        logits: float16 [N, 2^M, C], second axis by mask number (bit m is modality m).
        valid: bool [N, 2^M], False where the teacher has nothing left to see.
        heads: head to number of classes, in the order of the last axis.
        row_of_clip: int64, place in the student's store to row, -1 if not tabled.
    """

    def __init__(
        self, logits: Tensor, valid: Tensor, heads: dict[str, int], row_of_clip: Tensor
    ) -> None:
        self.logits, self.valid = logits, valid
        self.heads, self.row_of_clip = heads, row_of_clip

    def look_up(self, clip_index: Tensor, mask: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Return the teacher's logits, head to [B, C], and which clips have any, bool [B].

        Args:
            clip_index: int64 [B], places in the student's store.
            mask: bool [B, M], the student's mask.
        """
        rows = self.row_of_clip[clip_index]
        number = (mask.long() << torch.arange(mask.shape[1])).sum(dim=1)
        parts = torch.split(self.logits[rows, number], list(self.heads.values()), dim=1)
        return dict(zip(self.heads, parts, strict=True)), self.valid[rows, number]


def teacher_table(
    folder: Path,
    teacher: Path,
    teacher_store: Path,
    student_store: TokenSource,
    clips: npt.NDArray[np.int64],
    device: torch.device,
    stop: StopFlag,
) -> TeacherTable:
    """Return the table for some clips of the student's store, from ``folder`` if it is there.

    Raises:
        StoreError: the stores share no clips, or the teacher was trained on another store.
        CheckpointError: the teacher does not know the student's label space.
    """
    store = FeatureStore.open(teacher_store)
    model, card = load_model(teacher)
    if card.store_digest != store.digest:
        raise StoreError(
            f"{teacher_store}: is not the store that {teacher} was trained on; "
            "set teacher_store to that one."
        )
    if card.heads != student_store.heads:
        raise CheckpointError(
            f"{teacher}: knows the heads and classes {_sizes(card.heads)}, the student's store "
            f"{student_store.path} has {_sizes(student_store.heads)}."
        )
    places = _join(student_store, store, clips)
    key = _key(teacher, store, student_store, clips)
    path = folder / f"{key[:16]}.safetensors"
    heads = {head: len(names) for head, names in card.heads.items()}
    row_of_clip = torch.full((len(student_store),), -1)
    row_of_clip[torch.from_numpy(clips)] = torch.arange(len(clips))
    if path.is_file():
        try:
            tensors = load_file(path)
        except SafetensorError as error:
            raise CheckpointError(
                f"{path}: the teacher table is damaged ({error}); remove it."
            ) from None
    else:
        model = model.to(device)
        tensors = _compute(
            model, store, places, student_store.modalities, sum(heads.values()), stop
        )
        files.write_bytes(path, save(tensors))
    return TeacherTable(tensors["logits"], tensors["valid"], heads, row_of_clip)


def _compute(
    model: torch.nn.Module,
    store: FeatureStore,
    places: npt.NDArray[np.int64],
    modalities: tuple[str, ...],
    classes: int,
    stop: StopFlag,
) -> dict[str, Tensor]:
    device = next(model.parameters()).device
    logits = torch.zeros(len(places), 2 ** len(modalities), classes, dtype=torch.float16)
    valid = torch.zeros(len(places), 2 ** len(modalities), dtype=torch.bool)
    loader = FeatureLoader(store, places, _BATCH)
    done = 0
    for batch in tqdm(loader.epoch(0), "teacher table", total=len(loader), unit="batch"):
        stop.check("nothing of the teacher table is kept")
        tokens = batch.tokens_on(device)
        rows = slice(done, done + len(batch.clip_index))
        for subset in subsets(modalities):
            number = sum(1 << i for i, m in enumerate(modalities) if m in subset)
            kept = torch.tensor([m in subset for m in store.modalities])
            mask = batch.present & kept
            with torch.inference_mode():
                out = model(tokens, mask)
            logits[rows, number] = torch.cat(list(out.values()), dim=1).half().cpu()
            valid[rows, number] = mask.any(dim=1)
        done = rows.stop
    return {"logits": logits, "valid": valid}


def _join(
    student: TokenSource, teacher: FeatureStore, clips: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """Return the places of the student's clips in the teacher's store, met by clip id."""
    place = {clip_id: i for i, clip_id in enumerate(teacher.clip_ids.tolist())}
    ids = student.clip_ids[clips].tolist()
    missing = [clip_id.decode() for clip_id in ids if clip_id not in place]
    if missing:
        raise StoreError(
            f"{teacher.path}: lacks {len(missing)} of {len(ids)} training clips of "
            f"{student.path}, such as {', '.join(missing[:3])}."
        )
    return np.array([place[clip_id] for clip_id in ids], np.int64)


def _key(
    teacher: Path, store: FeatureStore, student: TokenSource, clips: npt.NDArray[np.int64]
) -> str:
    sha = hashlib.sha256((teacher / WEIGHTS).read_bytes())
    sha.update(store.digest.encode() + " ".join(student.modalities).encode())
    sha.update(student.clip_ids[clips].tobytes())
    return sha.hexdigest()


def _sizes(heads: dict[str, tuple[str, ...]]) -> dict[str, int]:
    return {head: len(names) for head, names in heads.items()}
