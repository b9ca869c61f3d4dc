"""A frozen teacher's logits under the masks that a student meets, computed before it trains.

Distillation then needs neither the teacher nor its tokens while it trains, and each clip's tokens
are read once for all its masks. With up to 6 modalities the logits of every mask of every clip are
computed, once per teacher and store; with more, those of the masks that the epochs of this training
will draw: at most one per clip and epoch. They are cached in a folder of checksummed chunks; one
that is missing or damaged is computed again, by whichever rank it belongs to, one that was
interrupted goes on. Raw logits are stored: temperature, weights and the average over teachers are
applied in training.

N clips, C classes of all heads together, M modalities of the student, R masks of all clips.
"""

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load, save
from torch import Tensor
from tqdm import tqdm

from karmma_pipeline import files
from karmma_pipeline.data.loading.clips import MaskedModel, predict_masked
from karmma_pipeline.data.loading.loader import Batch, FeatureLoader
from karmma_pipeline.errors import CheckpointError, StoppedError, StoreError
from karmma_pipeline.jobs import StopFlag
from karmma_pipeline.logs import progress_bar
from karmma_pipeline.modalities import ALL_SUBSETS_UP_TO, subsets
from karmma_pipeline.models.saved import load_model, read_card
from karmma_pipeline.store import FeatureStore, TokenSource, find_joined
from karmma_pipeline.store.source import check_views
from karmma_pipeline.training import state
from karmma_pipeline.training.ranks import Ranks

_logger = logging.getLogger(__name__)

#: Clips of a file.
CHUNK = 1024
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
        self._logits, self._valid = logits.view(-1, logits.shape[-1]), valid.view(-1)
        self.heads, self.row_of_clip = heads, row_of_clip
        self._bits = 1 << torch.arange(valid.shape[-1].bit_length() - 1)

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


class DrawnLogits(TeacherLogits):
    """A teacher's cached logits of each clip under the masks that a training draws for it.

    Args:
        logits: float16 [R, C], clip by clip.
        valid: bool [R], False where the teacher has nothing left to see.
        heads: head to number of classes, in the order of the last axis.
        row_of_clip: int64, place in the student's store to its place among the N, -1 if not cached.
        masks: bool [R, M], no two of a clip the same.
        counts: int64 [N], masks of each clip, at least one.
    """

    def __init__(
        self,
        logits: Tensor,
        valid: Tensor,
        heads: dict[str, int],
        row_of_clip: Tensor,
        masks: Tensor,
        counts: Tensor,
    ) -> None:
        super().__init__(logits, valid, heads, row_of_clip)
        self._masks, self._last = masks, counts.cumsum(0) - 1
        self._first = self._last - counts + 1
        self._steps = torch.arange(int(counts.max()))

    def _row(self, clip_index: Tensor, mask: Tensor) -> Tensor:
        clip = self.row_of_clip[clip_index]
        rows = torch.minimum(self._first[clip, None] + self._steps, self._last[clip, None])
        same = (self._masks[rows] == mask[:, None]).all(dim=2)
        if not bool(same.any(dim=1).all()):
            raise CheckpointError("teacher logits: not computed for this mask.")
        return rows.gather(1, same.byte().argmax(dim=1, keepdim=True))[:, 0]


@dataclass(frozen=True)
class ChunkMasks:
    """The masks under which a teacher answers for the n clips of a chunk.

    masks: bool [n, K, M], of each clip the first ``counts``. counts: int [n]. slots: int [n, K],
    where a clip's answer under each stands among the ``size`` answers of the chunk.
    """

    masks: npt.NDArray[np.bool_]
    counts: npt.NDArray[np.int64]
    slots: npt.NDArray[np.int64]
    size: int

    @classmethod
    def every(cls, modalities: Sequence[str], clips: int) -> "ChunkMasks":
        """Return every mask but the empty one; an answer's place follows from the mask's number."""
        chosen = subsets(modalities)
        masks = np.array([[m in subset for m in modalities] for subset in chosen])
        numbers = masks @ (1 << np.arange(len(modalities)))
        slots = np.arange(clips)[:, None] * 2 ** len(modalities) + numbers
        return cls(
            np.broadcast_to(masks, (clips, *masks.shape)),
            np.full(clips, len(chosen)),
            slots,
            clips * 2 ** len(modalities),
        )

    @classmethod
    def of_training(
        cls, packed: npt.NDArray[np.uint8], drawn: npt.NDArray[np.bool_], modalities: int
    ) -> "ChunkMasks":
        """Return the masks that a training draws, without repeats.

        Args:
            packed: uint8 [epochs, n, bytes], the masks of each epoch as `np.packbits` packs them.
            drawn: bool [epochs, n], whether an epoch has the clip at all.
            modalities: how many there are.
        """
        epoch, clip = np.nonzero(drawn)
        of_clip = np.concatenate(
            [clip.astype(">u4")[:, None].view(np.uint8), packed[epoch, clip]], axis=1
        )
        rows = np.unique(of_clip, axis=0)  # sorted: clip by clip
        clip = np.ascontiguousarray(rows[:, :4]).view(">u4")[:, 0].astype(np.int64)
        counts = np.bincount(clip, minlength=packed.shape[1])
        first = np.cumsum(counts) - counts
        slots = np.minimum(first[:, None] + np.arange(counts.max()), max(0, len(rows) - 1))
        masks = np.unpackbits(rows[:, 4:], axis=1, count=modalities).astype(bool)
        return cls(masks[slots], counts, slots, len(rows))

    @property
    def flat(self) -> npt.NDArray[np.bool_]:
        """The masks clip by clip, [R, M]."""
        return self.masks[np.arange(self.masks.shape[1]) < self.counts[:, None]]


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
        opened = [FeatureStore.open(path) for path in paths]
        store = find_joined(opened, self.card.store_digest, self.card.stores)
        if store is None:
            raise StoreError(
                f"{', '.join(map(str, paths))}: not the store that {teacher} was trained on; "
                "set teacher_store to that store or, for joined stores, to a nested list of "
                "them."
            )
        self.store = store
        if self.card.heads != student.heads:
            raise CheckpointError(
                f"{teacher}: has the heads and classes {_sizes(self.card.heads)}, but the "
                f"student's store {student.path} has {_sizes(student.heads)}."
            )
        check_views(student, store)
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
        if self.card.own:  # whose source says as much of the logits as the weights do
            self.key["teacher_code"] = self.card.code_now()
        text = json.dumps(self.key, sort_keys=True)
        self.digest = hashlib.sha256(text.encode()).hexdigest()

    def load(
        self,
        folder: Path,
        device: torch.device,
        ranks: Ranks,
        stop: StopFlag,
        training: tuple[FeatureLoader, int] | None = None,
    ) -> TeacherLogits:
        """Return the logits from ``folder``, after computing what is missing in it.

        Args:
            folder: of the cached logits of all teachers and trainings.
            device: where the teacher runs.
            ranks: which share the work.
            stop: looked at before each pass of a batch.
            training: loader of the ``clips`` and number of epochs, whose masks are wanted; without
                it, or with few modalities, all masks are.

        Raises:
            CheckpointError: the folder holds other logits; the difference is named.
            StoppedError: a stop was asked for; the chunks that are done are kept.
        """
        chunks, key = self._chunks(folder, training)
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        folder = folder / digest[:16]
        self._claim(folder, key, ranks)
        missing = [
            number
            for number in range(len(chunks))
            if number % ranks.size == ranks.rank and not _whole(_chunk(folder, number))
        ]
        # Ranks may also be runs that share the folder: a chunk that two compute is the same bytes,
        # and each replaces it as a whole.
        if missing:
            self._compute(
                folder, {number: chunks[number] for number in missing}, device, ranks, stop
            )
        if ranks.main:
            files.sweep([folder])
        # Also a barrier: chunks of other ranks are there once all have come here.
        stopping, _ = ranks.agree_to_stop(stop)
        if stopping:
            stop.check(f"the finished teacher logits in {folder} are kept")
        parts = [load(bytes(state.read_checksummed(_chunk(folder, c)))) for c in range(len(chunks))]
        row_of_clip = torch.full((len(self.student),), -1)
        row_of_clip[torch.from_numpy(self.clips)] = torch.arange(len(self.clips))
        joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        if "masks" not in joined:
            return TeacherLogits(joined["logits"], joined["valid"], self.heads, row_of_clip)
        masks = joined.pop("masks").bool()
        return DrawnLogits(heads=self.heads, row_of_clip=row_of_clip, masks=masks, **joined)

    def _chunks(
        self, folder: Path, training: tuple[FeatureLoader, int] | None
    ) -> tuple[list[ChunkMasks], dict[str, Any]]:
        """Return the masks of each chunk, and what the folder of their logits is known by."""
        sizes = [
            len(self.clips[start : start + CHUNK]) for start in range(0, len(self.clips), CHUNK)
        ]
        modalities = self.student.modalities
        # Earlier versions computed every mask of any number of modalities; theirs are used.
        every = (folder / self.digest[:16] / _KEY).is_file()
        if training is None or len(modalities) <= ALL_SUBSETS_UP_TO or every:
            return [ChunkMasks.every(modalities, size) for size in sizes], self.key
        loader, epochs = training
        shape = epochs, len(self.clips), -(-len(modalities) // 8)
        packed, drawn = np.zeros(shape, np.uint8), np.zeros(shape[:2], bool)
        for epoch in range(epochs):
            rows = np.searchsorted(self.clips, loader.rows(epoch))  # with views, one of each clip
            packed[epoch, rows] = np.packbits(loader.masks(epoch), axis=1)
            drawn[epoch, rows[loader.places(epoch)]] = True
        drawn[0, ~drawn.any(axis=0)] = True  # a clip that no epoch draws has an answer all the same
        ends = np.cumsum(sizes)[:-1]
        parts = zip(np.split(packed, ends, axis=1), np.split(drawn, ends, axis=1), strict=True)
        chunks = [ChunkMasks.of_training(*part, len(modalities)) for part in parts]
        sha = hashlib.sha256()
        for chunk in chunks:
            sha.update(
                chunk.counts.astype("<i8").tobytes() + np.packbits(chunk.flat, axis=1).tobytes()
            )
        return chunks, {**self.key, "version": 2, "masks": sha.hexdigest()}

    def _claim(self, folder: Path, key: dict[str, Any], ranks: Ranks) -> None:
        """Check that the folder's logits are these, or begin it."""
        path = folder / _KEY
        if not path.is_file():
            if ranks.main:
                files.write_json(path, key)
            return
        try:
            there = json.loads(path.read_text(encoding="utf-8"))
            differences = [
                f"{k} was {there.get(k)!r}, now {v!r}" for k, v in key.items() if there.get(k) != v
            ]
        except (OSError, ValueError, AttributeError) as error:
            differences = [str(error)]
        if differences:
            raise CheckpointError(
                f"{path}: the folder contains different teacher logits "
                f"({'; '.join(differences[:3])}); remove {folder} or set another teacher_table."
            )

    def _compute(
        self,
        folder: Path,
        chunks: dict[int, ChunkMasks],
        device: torch.device,
        ranks: Ranks,
        stop: StopFlag,
    ) -> None:
        model, card = load_model(self.teacher)
        if card.weights_sha256 != self.card.weights_sha256:
            raise CheckpointError(
                f"{self.teacher}: was replaced during the run; run the command again."
            )
        passes = sum(int(chunk.counts.sum()) for chunk in chunks.values())
        most = max(int(chunk.counts.max()) for chunk in chunks.values())
        shown = None if ranks.main else True
        with progress_bar(
            total=passes, desc="teacher logits", unit="clip", disable=shown, dynamic_ncols=True
        ) as bar:
            if ranks.main:
                _logger.info(
                    "teacher logits: up to %d passes for each clip, %d in all", most, passes
                )
            for number, masks in chunks.items():
                places = self.places[number * CHUNK : (number + 1) * CHUNK]
                answers = _Answers(self, places, masks)
                bar.update(answers.take_up(_part(folder, number)))
                if not answers.ask(model.to(device), device, stop, bar):
                    answers.keep(_part(folder, number))
                    return
                state.write_checksummed(_chunk(folder, number), save(answers.tensors()))
                _part(folder, number).unlink(missing_ok=True)


class _Answers:
    """What a teacher says of the clips of a chunk, and how many of them it was asked for."""

    def __init__(
        self, cache: TeacherLogitsCache, places: npt.NDArray[np.int64], masks: ChunkMasks
    ) -> None:
        self.cache, self.masks = cache, masks
        # Clips with the most masks first: those that are left under one more mask are the first of
        # a batch, which is a view of its tokens and no copy.
        self.order = np.argsort(-masks.counts, kind="stable")
        self.places = places[self.order]
        self.logits = torch.zeros(masks.size, sum(cache.heads.values()), dtype=torch.float16)
        self.valid = torch.zeros(masks.size, dtype=torch.bool)
        self.done = 0
        mine = {m: column for column, m in enumerate(cache.student.modalities)}
        self.columns = [mine.get(m, len(mine)) for m in cache.store.modalities]

    def ask(
        self, model: MaskedModel, device: torch.device, stop: StopFlag, bar: "tqdm[Any]"
    ) -> bool:
        """Ask for what is left, batch by batch; return False if a stop was asked for before."""

        def check() -> None:
            if stop.requested:
                raise StoppedError("teacher logits")

        loader = FeatureLoader(self.cache.store, self.places[self.done :], _BATCH)
        try:
            for batch, answers in predict_masked(model, loader, self._masks_of, device, check):
                clips = self.order[self.done : self.done + len(batch.clip_index)]
                for number, (mask, of) in enumerate(answers):
                    self._put(clips[: len(mask)], number, mask, of)
                    bar.update(len(mask))
                self.done += len(clips)
        except StoppedError:
            return False
        if not bool(self.logits.isfinite().all()):
            raise CheckpointError(
                "teacher logits: the teacher's logits are not finite in float16; train the "
                "teacher again with a lower optimiser.lr."
            )
        return True

    def _masks_of(self, batch: Batch) -> Iterator[Tensor]:
        """Yield the teacher's masks of a batch, [n, its modalities], of ever fewer clips."""
        clips = self.order[self.done : self.done + len(batch.clip_index)]
        counts = self.masks.counts[clips]
        for number in range(int(counts.max())):
            seen = self.masks.masks[clips[: int((counts > number).sum())], number]
            none = np.zeros((len(seen), 1), bool)  # what the student does not have
            theirs = np.concatenate([seen, none], axis=1)[:, self.columns]
            yield batch.present[: len(seen)] & torch.from_numpy(theirs)

    def _put(
        self, clips: npt.NDArray[np.int64], number: int, mask: Tensor, of: dict[str, Tensor]
    ) -> None:
        slots, here = torch.from_numpy(self.masks.slots[clips, number]), mask.any(dim=1)
        out = torch.cat([of[head] for head in self.cache.heads], dim=1)
        self.logits[slots] = torch.where(here[:, None], out, 0).half()
        self.valid[slots] = here

    def tensors(self) -> dict[str, Tensor]:
        """Return what the file of the chunk holds."""
        clips, M = len(self.order), len(self.cache.student.modalities)
        if self.masks.size == clips << M:
            return {
                "logits": self.logits.view(clips, 1 << M, -1),
                "valid": self.valid.view(clips, 1 << M),
            }
        return {
            "logits": self.logits,
            "valid": self.valid,
            "masks": torch.from_numpy(self.masks.flat.astype(np.uint8)),
            "counts": torch.from_numpy(self.masks.counts),
        }

    def keep(self, path: Path) -> None:
        """Write what is done of a chunk."""
        done = torch.tensor(self.done)
        tensors = {"logits": self.logits, "valid": self.valid, "done": done}
        state.write_checksummed(path, save(tensors))

    def take_up(self, path: Path) -> int:
        """Go on from what `keep` wrote, if it did; return how many answers there are already.

        They are of whole batches, so that the others are the same as without an interruption.
        """
        if _whole(path):
            kept = load(bytes(state.read_checksummed(path)))
            self.logits, self.valid, self.done = kept["logits"], kept["valid"], int(kept["done"])
        return int(self.masks.counts[self.order[: self.done]].sum())


def _chunk(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.safetensors.sealed"


def _part(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.part.sealed"


def _whole(path: Path) -> bool:
    try:
        state.read_checksummed(path)
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
