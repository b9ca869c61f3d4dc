"""From raw video to answers: the decoding, backbones and fusion of extraction and evaluation.

B clips in a batch, M modalities, N tokens, D width, C classes of a head.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from karmma_pipeline.data.loading.masks import clip_keys, modality_mask
from karmma_pipeline.data.manifest import Clip
from karmma_pipeline.errors import ConfigError
from karmma_pipeline.extraction.decode.pool import default_workers, open_pool
from karmma_pipeline.extraction.decode.worker import decode_clips
from karmma_pipeline.extraction.inference.batching import Batch, Prefetcher, collate
from karmma_pipeline.extraction.inference.defaults import configure
from karmma_pipeline.extraction.inference.networks import Computed, Networks
from karmma_pipeline.extraction.inference.workers import ForwardWorkers, one_thread, worker_count
from karmma_pipeline.extraction.types import BatchPlan, DecodeSettings
from karmma_pipeline.jobs import StopFlag
from karmma_pipeline.metrics import softmax
from karmma_pipeline.modalities import Reason
from karmma_pipeline.models.fusion import FusionModel
from karmma_pipeline.models.saved import ModelCard, open_model
from karmma_pipeline.recognition.backbones import SET, check_networks, recipe_of, specs_of
from karmma_pipeline.recognition.clips import Spans, wanted_clips
from karmma_pipeline.store import ModalitySpec

_logger = logging.getLogger(__name__)

DROPPED = "dropped"
"""Why a modality is absent that was there and was left out on purpose."""


@dataclass(frozen=True)
class Prediction:
    """What a model says of a clip.

    Attributes:
        clip: with its id, ``start_s`` and ``stop_s`` (None: the end of the file).
        logits: head to float32 [C]; empty if no modality was left: there was nothing to see.
        mask: modality to whether the model saw it.
        reasons: absent modality to why: a reason of an extraction, or ``dropped``.
        heads: head to its C class names.
    """

    clip: Clip
    logits: Mapping[str, npt.NDArray[np.float32]]
    mask: Mapping[str, bool]
    reasons: Mapping[str, str]
    heads: Mapping[str, Sequence[str]]

    def top(self, head: str, count: int = 1) -> list[tuple[str, float]]:
        """Return the best classes of a head and their probabilities; none if nothing was seen."""
        if head not in self.heads:
            raise ConfigError(f"head={head!r}: the model has {', '.join(self.heads)}.")
        if head not in self.logits:
            return []
        of = self.probabilities[head]
        return [(self.heads[head][i], float(of[i])) for i in np.argsort(-of, kind="stable")[:count]]

    @property
    def probabilities(self) -> dict[str, npt.NDArray[np.float64]]:
        """Head to the softmax of its logits, float64 [C]."""
        return {head: softmax(of) for head, of in self.logits.items()}


@dataclass(frozen=True)
class Dropout:
    """Modalities that are left out on purpose.

    without: these, of every clip.
    rate, seed: the others as modality dropout would in training, each with this probability.
    """

    without: tuple[str, ...] = ()
    rate: float = 0.0
    seed: int = 0


class Recognizer:
    """A trained model together with the backbones that it was trained on, for raw video.

    In a script, keep the call of `predict` and `video` under ``if __name__ == "__main__":``, since
    decoding runs in processes of its own; or decode in this one, with ``workers=0``.

    Example:
        >>> recognizer = km.Recognizer.load("runs/student")
        >>> windows = recognizer.video("clips/videos/v0000.mp4", window_s=2, hop_s=1, workers=0)
        >>> first = next(windows)
        >>> first.clip.start_s, first.clip.stop_s, first.mask
        (0.0, 2.0, {'rgb': True, 'flow': True, 'audio': True})
        >>> (verb, probability), *others = first.top("verb", 3)
        >>> verb in recognizer.card.heads["verb"], len(others)
        (True, 2)

    Attributes:
        model: in evaluation mode, on the device.
        card: what it is.
        modalities: that it takes, in the order of a mask's columns.
        notes: what a user should know, such as libraries of other versions.
    """

    def __init__(self, model: FusionModel, card: ModelCard, networks: Networks) -> None:
        self.networks, self.card = networks, card
        self.model = model.to(networks.device)
        self.modalities = model.modalities
        self.notes = check_networks(networks, card)
        self._settings = replace(DecodeSettings.of(networks.recipe), index_folder=None)
        # Tokens are rounded as the store of the training did, so that the answers are those of
        # an evaluation. Cards of earlier versions do not say how: then nothing is rounded.
        self._specs = {
            m: ModalitySpec.model_validate(
                spec.model_dump() | {"dtype": card.dtypes.get(m, "float32")}
            )
            for m, spec in specs_of(networks).items()
        }

    @classmethod
    def load(
        cls, run: str | Path, device: str = "auto", weights: Mapping[str, str] | None = None
    ) -> Self:
        """Load a trained model and its backbones.

        Args:
            run: folder of a run, or of one of its checkpoints.
            device: ``auto``, ``cpu``, ``cuda``, ...
            weights: modality to a file of backbone weights that has moved since.

        Raises:
            CheckpointError: no model is there, it is damaged, or weights are missing.
            ConfigError: the backbones cannot be set up as they were.
        """
        opened = open_model(run)
        card = opened.card
        networks = Networks(recipe_of(card, weights or {}, device))
        with one_thread(networks.device):
            configure(networks, {}, _logger.info)
        return cls(opened.network, card, networks)

    def video(
        self,
        path: str | Path,
        *,
        start_s: float = 0.0,
        stop_s: float | None = None,
        window_s: float | None = None,
        hop_s: float | None = None,
        without: tuple[str, ...] = (),
        workers: int | None = None,
    ) -> Iterator[Prediction]:
        """Yield a prediction of a video, or of each window that slides over it.

        Args:
            path: the file.
            start_s: seconds, where to begin.
            stop_s: seconds, where to end; None: the file's end.
            window_s: length of a window; None: it is one clip.
            hop_s: from one window to the next; None: ``window_s``.
            without: modalities that are left out.
            workers: as of `predict`.

        Raises:
            MediaError: the file is missing, or holds neither pictures nor sound.
            ConfigError: times or modalities make no sense.
        """
        spans = Spans(start_s, stop_s, window_s, hop_s)
        clips = wanted_clips([Path(path)], spans).clips
        return self.predict(clips, Dropout(tuple(without)), workers=workers)

    def predict(
        self,
        clips: Iterable[Clip],
        dropout: Dropout | None = None,
        stop: StopFlag | None = None,
        workers: int | None = None,
    ) -> Iterator[Prediction]:
        """Yield a prediction per clip, in order; decoding runs ahead in processes of its own.

        Clips are taken as they are needed, so that there may be any number of them. Clips of one
        video that follow one another are decoded together, each frame once per sixteen of them.

        Args:
            clips: whose labels are not looked at.
            dropout: what is left out on purpose.
            stop: asks for an end between batches.
            workers: decode processes; None: as many as an extraction has. 0 decodes in this
                process: nothing has to be started, but a file that hangs or crashes its decoder
                ends the program.

        Raises:
            ConfigError: ``dropout`` names a modality that the model does not take.
            StoppedError: a stop was asked for.
        """
        dropout, stop = dropout or Dropout(), stop or StopFlag()
        if unknown := [m for m in dropout.without if m not in self.modalities]:
            raise ConfigError(
                f"without={unknown[0]!r}: the model takes {', '.join(self.modalities)}."
            )
        with ExitStack() as stack:
            stack.enter_context(one_thread(self.networks.device))
            batches = self._batches(stack, clips, workers, stop)
            for computed in self._computed(stack, batches, stop):
                yield from self._answers(computed, dropout)

    def _batches(
        self, stack: ExitStack, clips: Iterable[Clip], workers: int | None, stop: StopFlag
    ) -> Iterator[Batch]:
        size, pin = self.networks.batch_size, self.networks.device.type == "cuda"
        plans = _plans(clips, size)
        if workers == 0:
            decoded = ((plan, decode_clips([*plan.clips], self._settings)) for plan in plans)
            return (collate(plan, some, pin) for plan, some in decoded)
        count = workers or default_workers(beside_gpu=pin)
        decode = self.networks.recipe.decode
        pool = stack.enter_context(open_pool(self._settings, decode, count, size, stop))
        batches = (collate(plan, some, pin) for plan, some in pool.batches(plans))
        return iter(stack.enter_context(Prefetcher(batches)))

    def _computed(
        self, stack: ExitStack, batches: Iterator[Batch], stop: StopFlag
    ) -> Iterator[Computed]:
        workers = ForwardWorkers(self.networks, worker_count(self.networks))
        stack.enter_context(workers)
        try:
            for batch in batches:
                stop.check("what was recognised is written")
                workers.put(batch)
                if workers.full:
                    yield workers.take()
            while len(workers):
                yield workers.take()
        except BaseException:
            stop.request()  # or the thread that prefetches would wait for decoders
            raise

    def _answers(self, computed: Computed, dropout: Dropout) -> Iterator[Prediction]:
        computed.wait()
        clips = computed.batch.plan.clips
        tokens, reasons = self._tokens(computed)
        present = np.array([[m not in why for m in self.modalities] for why in reasons])
        mask = _left(present, [clip.clip_id for clip in clips], self.modalities, dropout)
        with torch.inference_mode():
            logits = self.model(tokens, torch.from_numpy(mask))
        for row, clip in enumerate(clips):
            seen = dict(zip(self.modalities, mask[row].tolist(), strict=True))
            why = {m: reasons[row].get(m, DROPPED) for m, there in seen.items() if not there}
            said = {h: of[row].float().cpu().numpy() for h, of in logits.items()}
            said = said if any(seen.values()) else {}
            yield Prediction(clip, said, seen, why, self.card.heads)

    def _tokens(self, computed: Computed) -> tuple[dict[str, Tensor], list[dict[str, str]]]:
        """Return tokens, modality to [B, N, D], zeros where absent, and why they are, per clip."""
        clips = computed.batch.clips
        tokens = {m: np.zeros((len(clips), *self.card.modalities[m]), np.float32)
                  for m in self.modalities}  # fmt: skip
        reasons: list[dict[str, str]] = [{} for _ in clips]
        of_modality = self.networks.jobs(SET)
        for row, clip in enumerate(clips):
            for m in self.modalities:
                job = of_modality.get(m)
                if job is None:  # imported features: no network is known for it
                    reasons[row][m] = Reason.NOT_IN_DATASET.label
                    continue
                values, spec = computed.of(job, row), self._specs[m]
                if values is None:
                    reasons[row][m] = clip.reasons[job.spec].label
                elif not spec.holds(values):
                    reasons[row][m] = Reason.BAD_VALUE.label
                else:
                    tokens[m][row] = spec.decode(spec.encode(values))
        on = self.networks.device
        return {m: torch.from_numpy(of).to(on) for m, of in tokens.items()}, reasons


def _plans(clips: Iterable[Clip], size: int) -> Iterator[BatchPlan]:
    source = iter(clips)
    while some := list(islice(source, size)):
        yield BatchPlan(0, some, (SET,), last=False)


def _left(
    present: npt.NDArray[np.bool_], ids: list[str], modalities: tuple[str, ...], dropout: Dropout
) -> npt.NDArray[np.bool_]:
    """Return the mask, bool [B, M]: what is present and not left out."""
    kept = present & np.array([m not in dropout.without for m in modalities])
    keys = clip_keys(np.array([i.encode() for i in ids], np.bytes_))
    return modality_mask(dropout.seed, 0, keys, kept, dropout.rate)
