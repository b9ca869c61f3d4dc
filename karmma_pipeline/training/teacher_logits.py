"""A frozen teacher's logits for every mask of every clip, computed once per teacher and store.

With M modalities a clip has 2^M - 1 masks, so distillation needs neither the teacher nor its
tokens while it trains. They are cached in a folder of checksummed chunks; a chunk that is missing
or damaged is computed again, by whichever rank it belongs to. Raw logits are stored: temperature,
weights and the average over teachers are applied in training.

N clips, C classes of all heads together, M modalities of the student.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load, save
from torch import Tensor

from karmma_pipeline import files
from karmma_pipeline.data.loading.clips import predict_subsets
from karmma_pipeline.data.loading.loader import FeatureLoader
from karmma_pipeline.errors import CheckpointError, StoreError
from karmma_pipeline.jobs import StopFlag
from karmma_pipeline.logs import progress_bar
from karmma_pipeline.modalities import subsets
from karmma_pipeline.models.saved import load_model, read_card
from karmma_pipeline.store import FeatureStore, TokenSource, find_joined
from karmma_pipeline.training import state
from karmma_pipeline.training.ranks import Ranks

CHUNK = 1024
"""Clips of a file."""
_BATCH = 64
_KEY = "table.json"


class TeacherLogits:
    """A teacher's cached logits of each clip under each mask of the student's modalities.

    Args:
        logits: float16 [N, 2^M, C], second axis by mask number (bit m is modality m).
        valid: bool [N, 2^M], False where the teacher has nothing left to see.
        heads: head to number of classes, in the order of the last axis.
        row_of_clip: int64, place in the student's store to row, -1 if not cached.
    """

    def __init__(
        self, logits: Tensor, valid: Tensor, heads: dict[str, int], row_of_clip: Tensor
    ) -> None:
        masks, classes = logits.shape[1:]
        self._logits, self._valid = logits.view(-1, classes), valid.view(-1)
        self.heads, self.row_of_clip = heads, row_of_clip
        self._bits = 1 << torch.arange(masks.bit_length() - 1)

    def logits(self, clip_index: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Return the teacher's logits, head to [B, C]; 0 where it saw nothing.

        Args:
            clip_index: int64 [B], places in the student's store.
            mask: bool [B, M], the student's mask.
        """
        rows = self._logits.index_select(0, self._row(clip_index, mask))
        return dict(
            zip(self.heads, torch.split(rows, list(self.heads.values()), dim=1), strict=True)
        )

    def valid(self, clip_index: Tensor, mask: Tensor) -> Tensor:
        """Return the clips of which the teacher saw anything under the mask, bool [B]."""
        return self._valid[self._row(clip_index, mask)]

    def _row(self, clip_index: Tensor, mask: Tensor) -> Tensor:
        number = (mask * self._bits).sum(dim=1)
        return self.row_of_clip[clip_index] * (1 << len(self._bits)) + number


class TeacherLogitsCache:
    """Computes one teacher's logits for the student's clips, and keeps them in a folder.

    Args:
        teacher: folder of the saved teacher.
        teacher_store: the store that it was trained on, or several that it saw as one.
        student: the student's store.
        clips: int64 [N], places in the student's store.

    Raises:
        StoreError: the stores share no clips, or the teacher was trained on another store.
        CheckpointError: there is no teacher, or it does not know the student's label space.
    """

    def __init__(
        self,
        teacher: Path,
        teacher_store: Path | Sequence[Path],
        student: TokenSource,
        clips: npt.NDArray[np.int64],
    ) -> None:
        self.teacher, self.student, self.clips = teacher, student, clips
        self.card = read_card(teacher)
        paths = [teacher_store] if isinstance(teacher_store, Path) else list(teacher_store)
        store = find_joined([FeatureStore.open(path) for path in paths], self.card.store_digest)
        if store is None:
            raise StoreError(
                f"{', '.join(map(str, paths))}: is not the store that {teacher} was trained on; "
                "set teacher_store to that one, or to a list in a list of those that it was "
                "trained on as one."
            )
        self.store = store
        if self.card.heads != student.heads:
            raise CheckpointError(
                f"{teacher}: knows the heads and classes {_sizes(self.card.heads)}, the "
                f"student's store {student.path} has {_sizes(student.heads)}."
            )
        self.places = _join(student, self.store, clips)
        self.heads = _sizes(self.card.heads)
        ids = hashlib.sha256(student.clip_ids[clips].tobytes()).hexdigest()
        labels = hashlib.sha256(json.dumps(self.card.heads, sort_keys=True).encode()).hexdigest()
        self.key = {
            "version": 1,
            "teacher_weights": self.card.weights_sha256,
            "teacher_store": self.store.digest,
            "label_space": labels,
            "modalities": list(student.modalities),
            "clips": len(clips),
            "clip_ids": ids,
            "chunk": CHUNK,
        }
        text = json.dumps(self.key, sort_keys=True)
        self.digest = hashlib.sha256(text.encode()).hexdigest()

    def load(
        self, folder: Path, device: torch.device, ranks: Ranks, stop: StopFlag
    ) -> TeacherLogits:
        """Return the logits from ``folder``, after computing what is missing in it.

        Raises:
            CheckpointError: the folder holds other logits; the difference is named.
            StoppedError: a stop was asked for; the chunks that are done are kept.
        """
        folder = folder / self.digest[:16]
        self._claim(folder, ranks)
        chunks = range(-(-len(self.clips) // CHUNK))
        missing = [c for c in chunks if c % ranks.size == ranks.rank and not _whole(folder, c)]
        # Ranks may also be runs that share the folder: a chunk that two compute is the same bytes,
        # and each replaces it as a whole.
        if missing:
            self._compute(folder, missing, device, ranks, stop)
        if ranks.main:
            files.sweep([folder])
        # Also a barrier: chunks of other ranks are there once all have come here.
        stopping, _ = ranks.agree_to_stop(stop)
        if stopping:
            stop.check(f"the chunks of {folder} that are done are kept")
        parts = [load(bytes(state.read_checksummed(_chunk(folder, c)))) for c in chunks]
        row_of_clip = torch.full((len(self.student),), -1)
        row_of_clip[torch.from_numpy(self.clips)] = torch.arange(len(self.clips))
        return TeacherLogits(
            torch.cat([p["logits"] for p in parts]),
            torch.cat([p["valid"] for p in parts]),
            self.heads,
            row_of_clip,
        )

    def _claim(self, folder: Path, ranks: Ranks) -> None:
        """Check that the folder's logits are these, or begin it."""
        path = folder / _KEY
        if not path.is_file():
            if ranks.main:
                files.write_json(path, self.key)
            return
        try:
            there = json.loads(path.read_text())
            differences = [
                f"{k}={there.get(k)!r} there, {v!r} here"
                for k, v in self.key.items()
                if there.get(k) != v
            ]
        except (OSError, ValueError, AttributeError) as error:
            differences = [str(error)]
        if differences:
            raise CheckpointError(
                f"{path}: the folder holds other teacher logits ({'; '.join(differences[:3])}); "
                f"remove {folder} or set another teacher_table."
            )

    def _compute(
        self, folder: Path, chunks: list[int], device: torch.device, ranks: Ranks, stop: StopFlag
    ) -> None:
        model, card = load_model(self.teacher)
        if card.weights_sha256 != self.card.weights_sha256:
            raise CheckpointError(f"{self.teacher}: has just been replaced; run again.")
        model = model.to(device)
        shown = None if ranks.main else True
        for chunk in progress_bar(
            chunks, "teacher logits", unit="chunk", disable=shown, dynamic_ncols=True
        ):
            if stop.requested:
                return
            places = self.places[chunk * CHUNK : (chunk + 1) * CHUNK]
            tensors = _ask(model, self.store, places, self.student.modalities, self.heads)
            state.write_checksummed(_chunk(folder, chunk), save(tensors))


def _ask(
    model: torch.nn.Module,
    store: TokenSource,
    places: npt.NDArray[np.int64],
    modalities: tuple[str, ...],
    heads: dict[str, int],
) -> dict[str, Tensor]:
    """Return logits [clips, 2^M, C] and valid [clips, 2^M] for every mask of the modalities."""
    masks = 2 ** len(modalities)
    logits = torch.zeros(len(places), masks, sum(heads.values()), dtype=torch.float16)
    valid = torch.zeros(len(places), masks, dtype=torch.bool)
    chosen = subsets(modalities)
    numbers = [sum(1 << i for i, m in enumerate(modalities) if m in subset) for subset in chosen]
    device = next(model.parameters()).device
    done = 0
    for batch, answers in predict_subsets(
        model, FeatureLoader(store, places, _BATCH), chosen, device
    ):
        rows = slice(done, done + len(batch.clip_index))
        for number, (mask, of) in zip(numbers, answers, strict=True):
            here = mask.any(dim=1)
            out = torch.cat([of[head] for head in heads], dim=1)
            logits[rows, number] = torch.where(here[:, None], out, 0).half()
            valid[rows, number] = here
        done = rows.stop
    if not bool(logits.isfinite().all()):
        raise CheckpointError(
            "teacher logits: the teacher's logits are not finite in float16; train it again with a "
            "lower optimiser.lr."
        )
    return {"logits": logits, "valid": valid}


def _chunk(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.safetensors.sealed"


def _whole(folder: Path, number: int) -> bool:
    try:
        state.read_checksummed(_chunk(folder, number))
    except CheckpointError:
        return False
    return True


def _join(
    student: TokenSource, teacher: TokenSource, clips: npt.NDArray[np.int64]
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


def _sizes(heads: dict[str, tuple[str, ...]]) -> dict[str, int]:
    return {head: len(names) for head, names in heads.items()}
