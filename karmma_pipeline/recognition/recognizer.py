"""From raw video to predictions, with the decoding of extraction and the model of evaluation.

B clips in a batch, M modalities, N tokens, D width, C classes of a head.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from karmma_pipeline.data.loading.masks import clip_keys, modality_mask
from karmma_pipeline.data.manifest import Clip
from karmma_pipeline.extraction.decode.pool import default_workers, open_pool
from karmma_pipeline.extraction.decode.worker import decode_clips
from karmma_pipeline.extraction.inference.batching import (
    ForwardWorkers,
    Prefetcher,
    collate,
    fastest_threads,
    one_thread,
    threads_of_pass,
    worker_count,
)
from karmma_pipeline.extraction.inference.networks import Computed, Networks, configure
from karmma_pipeline.extraction.inference.recent import Recent
from karmma_pipeline.extraction.types import Batch, BatchPlan, DecodedClip, DecodeSettings
from karmma_pipeline.jobs import StopFlag
from karmma_pipeline.modalities import Reason
from karmma_pipeline.models.backbones.choice import Engine
from karmma_pipeline.models.exported import open_model
from karmma_pipeline.models.fusion import TokenModel
from karmma_pipeline.models.saved import ModelCard, TrainedModel
from karmma_pipeline.recognition.backbones import SET, check_networks, recipe_of, specs_of
from karmma_pipeline.recognition.clips import Spans, wanted_clips
from karmma_pipeline.recognition.prediction import DROPPED, Dropout, Prediction
from karmma_pipeline.recognition.stream import Stream, StreamSettings
from karmma_pipeline.store import ModalitySpec

# Windows go forward: memory is that of so much sound, however long the file.
_SOUND_KEPT_S = 600.0

_logger = logging.getLogger(__name__)


class Recognizer:
    """A trained model with its backbones, for prediction on raw video.

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
        card: the model card.
        modalities: its modalities, in the order of the columns of a mask.
        decode_settings: sampling and preprocessing of clips.
        notes: messages for the user, such as different library versions.
    """

    def __init__(self, model: TokenModel, card: ModelCard, networks: Networks) -> None:
        self.networks, self.card = networks, card
        self.model = model.to(networks.device)
        self.modalities = model.modalities
        self.notes = check_networks(networks, card)
        self.decode_settings = replace(
            DecodeSettings.of(networks.recipe), index_folder=None, sound_kept_s=_SOUND_KEPT_S
        )
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
        cls,
        run: str | Path,
        device: str = "auto",
        weights: Mapping[str, str] | None = None,
        engine: Engine | None = None,
    ) -> Self:
        """Load a trained model and its backbones.

        Args:
            run: folder of a run, of one of its checkpoints or of an exported model, or
                ``hf:USER/NAME``.
            device: ``auto``, ``cpu``, ``cuda``, ...; exported models run on the CPU.
            weights: modality to the file of its backbone weights, if it has moved.
            engine: ``torch`` or ``openvino``, for all backbones; None: as in training.

        Raises:
            CheckpointError: there is no model, it is damaged, or weights are missing.
            ConfigError: the backbones cannot be rebuilt, or the engine does not support
                them.
        """
        return cls.of(open_model(run), device, weights, engine)

    @classmethod
    def of(
        cls,
        model: TrainedModel,
        device: str = "auto",
        weights: Mapping[str, str] | None = None,
        engine: Engine | None = None,
    ) -> Self:
        """Set up the backbones of a loaded model; see `load`."""
        networks = Networks(recipe_of(model, weights or {}, device, engine))
        with one_thread(networks.device):
            configure(networks, {}, _logger.info)
        return cls(model.network, model.card, networks)

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
        """Yield a prediction for a video, or for each sliding window.

        Args:
            path: the file.
            start_s: start within the video, seconds.
            stop_s: stop within the video, seconds; None: its end.
            window_s: length of a window in seconds; None: the video is one clip.
            hop_s: seconds between windows; None: ``window_s``.
            without: modalities to exclude.
            workers: see `predict`.

        Raises:
            MediaError: the file is missing, or has neither video nor audio.
            ConfigError: invalid times or modalities.
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
        """Yield a prediction per clip, in order; other processes decode ahead.

        Clips are consumed lazily. Up to sixteen consecutive clips of a video are decoded
        together, each frame once.

        Args:
            clips: clips to classify; their labels are ignored.
            dropout: modalities to exclude.
            stop: flag that ends the iteration between batches.
            workers: number of decode processes; None: as in an extraction; 0: decode in this
                process, where a file that hangs or crashes its decoder affects the program.

        Raises:
            ConfigError: ``dropout`` contains an unknown modality.
            StoppedError: ``stop`` was set.
        """
        dropout, stop = dropout or Dropout(), stop or StopFlag(resumes=False)
        dropout.check(self.modalities)
        with ExitStack() as stack:
            stack.enter_context(one_thread(self.networks.device))
            batches = self._batches(stack, clips, workers, stop)
            for computed in self._computed(stack, batches, stop):
                yield from self._answers(computed, dropout)

    def stream(
        self,
        window_s: float = 2.0,
        hop_s: float = 0.5,
        deadline_s: float | Mapping[str, float] = 0.5,
        *,
        tolerance_s: float = 0.1,
        share: float = 0.8,
        frozen_s: float | None = None,
        audio_hz: int | None = None,
        limits: Mapping[str, tuple[float, float]] | None = None,
    ) -> Stream:
        """Return a stream that takes samples of live sensors and predicts the newest window.

        Args:
            window_s: length of a window in seconds.
            hop_s: seconds between windows.
            deadline_s: maximum age of a sensor's newest sample in seconds, for all sensors or by
                name; beyond, its modalities are absent (``stale``).
            tolerance_s: maximum delay of samples in seconds; windows end this long before now.
            share: minimum share of a window that a sensor must cover; else it is absent (``gap``).
            frozen_s: seconds of identical frames after which the camera is absent (``frozen``);
                None: no limit.
            audio_hz: sample rate of the pushed audio; None: that of the model's spectrograms.
            limits: sensor to its valid range (low, high); with other values in a window, it is
                absent (``out_of_range``).

        Raises:
            ConfigError: a setting is invalid.

        Examples:
            >>> stream = recognizer.stream(window_s=2, hop_s=0.5)
            >>> for n in range(60):
            ...     stream.push("rgb", n / 25, np.full((48, 96, 3), 4 * n, np.uint8))
            >>> prediction = stream.step(2.4)
            >>> prediction.clip.start_s, prediction.mask, prediction.reasons
            (0.0, {'rgb': True, 'flow': True, 'audio': False}, {'audio': 'no_data'})
        """
        settings = StreamSettings(
            window_s, hop_s, deadline_s, tolerance_s, share, frozen_s, audio_hz, limits or {}
        )
        self.networks.serve(1, self._threads)
        return Stream(settings, self.decode_settings, self.modalities, self.answer)

    def answer(self, clip: Clip, decoded: DecodedClip, recent: Recent | None = None) -> Prediction:
        """Return the prediction for one clip as soon as possible.

        Backbones that are large enough for it use all threads.

        Args:
            clip: the clip.
            decoded: its inputs.
            recent: results for clips that overlap with it.
        """
        plan = BatchPlan(0, [clip], (SET,), last=False)
        batch = collate(plan, [decoded], pin=self.networks.device.type == "cuda")
        with threads_of_pass(self._threads):
            (prediction,) = self._answers(self.networks.compute(batch, recent), Dropout())
        return prediction

    @cached_property
    def _threads(self) -> int:
        return fastest_threads(self.networks)

    def _batches(
        self, stack: ExitStack, clips: Iterable[Clip], workers: int | None, stop: StopFlag
    ) -> Iterator[Batch]:
        size, pin = self.networks.batch_size, self.networks.device.type == "cuda"
        plans = _plans(clips, size)
        if workers == 0:
            decoded = ((plan, decode_clips([*plan.clips], self.decode_settings)) for plan in plans)
            return (collate(plan, some, pin) for plan, some in decoded)
        count = workers or default_workers(beside_gpu=pin)
        decode = self.networks.recipe.decode
        pool = stack.enter_context(open_pool(self.decode_settings, decode, count, size, stop))
        batches = (collate(plan, some, pin) for plan, some in pool.batches(plans))
        return iter(stack.enter_context(Prefetcher(batches)))

    def _computed(
        self, stack: ExitStack, batches: Iterator[Batch], stop: StopFlag
    ) -> Iterator[Computed]:
        workers = ForwardWorkers(self.networks, worker_count(self.networks))
        stack.enter_context(workers)
        try:
            for batch in batches:
                stop.check("all predictions so far are written")
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
