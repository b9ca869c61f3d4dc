"""The losses: cross-entropy, and the distillation of KARMMA. B clips, C classes of a head.

A loss is a sum over clips divided by how many clips count in the *whole* batch, so that parts
of a batch (of ranks, or passed one after another) simply add up, however unequal they are.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from karmma_pipeline.data.loading.loader import Batch

UNKNOWN = -1
Logits = Mapping[str, Tensor]


def cross_entropy(
    logits: Logits,
    labels: Mapping[str, Tensor],
    smoothing: float = 0.0,
    counts: Tensor | None = None,
) -> Tensor:
    """Return the mean over heads of the mean cross-entropy; clips without a label do not count.

    Args:
        logits: head to [B, C].
        labels: head to int64 [B], -1 where unknown.
        smoothing: label smoothing.
        counts: float [heads], labels that are known in the whole batch; those here if not given.
    """
    losses = [
        F.cross_entropy(
            scores.float(),
            labels[head],
            ignore_index=UNKNOWN,
            label_smoothing=smoothing,
            reduction="sum",
        )
        for head, scores in logits.items()
    ]
    if counts is None:
        counts = known_labels(labels, logits)
    return (torch.stack(losses) / _divisor(counts, losses[0])).mean()


def known_labels(labels: Mapping[str, Tensor], heads: Sequence[str] | Logits) -> Tensor:
    """Count the clips with a label of each head, float64 [heads]."""
    # On the CPU, where labels lie: counting costs no wait for the device, and gloo sums them.
    return torch.stack([(labels[h] != UNKNOWN).sum() for h in heads]).double().cpu()


def _divisor(counts: Tensor, like: Tensor) -> Tensor:
    return counts.clamp(min=1).to(like.device, like.dtype, non_blocking=True)


def teacher_log_probabilities(
    teachers: Sequence[Tensor],
    valid: Tensor,
    weights: Sequence[float],
    temperature: float,
    average: str = "probabilities",
) -> Tensor:
    """Return the average of several teachers for a head: log probabilities [B, C], softened.

    probabilities: the mean of softmax(logits / T), a mixture of the teachers. logits: softmax of
    the mean of logits / T, which weights confident teachers more. A teacher that saw
    nothing of a clip is left out of that clip's mean.

    Args:
        teachers: logits [B, C] of each teacher.
        valid: bool [teachers, B], whether a teacher saw something of the clip.
        weights: of each teacher.
        temperature: T.
        average: ``probabilities`` or ``logits``.
    """
    if len(teachers) == 1:
        return F.log_softmax(teachers[0].float() / temperature, dim=1)
    share = valid * torch.tensor(weights, device=valid.device)[:, None]
    share = (share / share.sum(dim=0).clamp(min=torch.finfo(share.dtype).tiny))[..., None]
    softened = torch.stack([logits.float() / temperature for logits in teachers])
    if average == "logits":
        mixed = torch.where(share > 0, share * softened, 0).sum(dim=0)
        return F.log_softmax(mixed, dim=1)
    # In logarithms: a probability that float32 rounds to 0 would be -inf in the KL.
    parts = torch.where(share > 0, share.log() + F.log_softmax(softened, dim=2), -torch.inf)
    return torch.where(valid.any(dim=0)[:, None], parts.logsumexp(dim=0), 0)


def distillation(
    student: Logits, teacher: Logits, valid: Tensor, temperature: float, count: Tensor | None = None
) -> Tensor:
    """Return T^2 * KL(teacher || student) of the softened distributions, mean over heads.

    The factor T^2 keeps the gradient's size independent of T (Hinton et al., 2015).

    Args:
        student: head to logits [B, C]. The gradient flows through these.
        teacher: head to log probabilities [B, C], softened by the same T.
        valid: bool [B], clips of which a teacher saw something; the mean is over these.
        temperature: T.
        count: float [1], valid clips of the whole batch; those here if not given.
    """
    losses = []
    for head, scores in student.items():
        log_q = F.log_softmax(scores.float() / temperature, dim=1)
        per_clip = F.kl_div(log_q, teacher[head], reduction="none", log_target=True).sum(dim=1)
        losses.append(torch.where(valid, per_clip, per_clip.new_zeros(())).sum())
    if count is None:
        count = valid.sum().double().cpu()
    return temperature**2 * (torch.stack(losses) / _divisor(count, losses[0])).mean()


TERMS = ("loss", "kl", "cross_entropy")
"""What an objective may say of a batch: the loss that is minimised, and its parts."""


class Objective(Protocol):
    """What a model is trained for. ``terms``: those of `TERMS` that `loss` returns."""

    terms: ClassVar[tuple[str, ...]]

    def counts(self, batch: Batch) -> Tensor:
        """Return how many clips each term of the loss averages over, float64 on the CPU."""

    def loss(self, logits: dict[str, Tensor], batch: Batch, counts: Tensor) -> dict[str, Tensor]:
        """Return the share of these clips in the loss of the whole batch, and in its parts."""


class LabelObjective:
    """Cross-entropy with the labels."""

    terms: ClassVar[tuple[str, ...]] = ("loss", "cross_entropy")

    def __init__(self, heads: Sequence[str], smoothing: float) -> None:
        self.heads, self.smoothing = tuple(heads), smoothing

    def counts(self, batch: Batch) -> Tensor:
        """Return the labels that are known, [heads]."""
        return known_labels(batch.labels, self.heads)

    def loss(self, logits: dict[str, Tensor], batch: Batch, counts: Tensor) -> dict[str, Tensor]:
        """Return the share of these clips."""
        labels = {head: batch.labels[head].to(of.device) for head, of in logits.items()}
        entropy = cross_entropy(logits, labels, self.smoothing, counts)
        return {"loss": entropy, "cross_entropy": entropy}


class MaskedLogits(Protocol):
    """A teacher's logits of each clip under each mask."""

    def valid(self, clip_index: Tensor, mask: Tensor) -> Tensor:
        """Return the clips of which it saw anything, bool [B]."""

    def logits(self, clip_index: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Return its logits, head to [B, C]."""


@dataclass(frozen=True)
class DistillationObjective:
    """KARMMA: the cached logits of teachers under the same masks, and the labels.

    Args:
        labels: the cross-entropy.
        teachers: the logits of each.
        alpha: weight of the KL term.
        temperature: T.
        weights: of the teachers in their average; empty: all the same.
        average: ``probabilities`` or ``logits``.
    """

    labels: Objective
    teachers: Sequence[MaskedLogits]
    alpha: float
    temperature: float
    weights: Sequence[float] = ()
    average: str = "probabilities"

    terms: ClassVar[tuple[str, ...]] = TERMS

    def counts(self, batch: Batch) -> Tensor:
        """Return the labels that are known and the clips that a teacher saw, [heads + 1]."""
        taught = self._valid(batch).any(dim=0).sum().double()
        return torch.cat([self.labels.counts(batch), taught[None]])

    def loss(self, logits: dict[str, Tensor], batch: Batch, counts: Tensor) -> dict[str, Tensor]:
        """Return alpha * T^2 * KL + (1 - alpha) * cross-entropy."""
        device = next(iter(logits.values())).device
        valid = self._valid(batch).to(device)
        cached = [teacher.logits(batch.clip_index, batch.mask) for teacher in self.teachers]
        targets = {
            head: teacher_log_probabilities(
                [one[head].to(device) for one in cached],
                valid,
                self.weights or (1.0,) * len(self.teachers),
                self.temperature,
                self.average,
            )
            for head in logits
        }
        kl = distillation(logits, targets, valid.any(dim=0), self.temperature, counts[-1:])
        entropy = self.labels.loss(logits, batch, counts[:-1])["loss"]
        loss = self.alpha * kl + (1 - self.alpha) * entropy
        return {"loss": loss, "kl": kl, "cross_entropy": entropy}

    def _valid(self, batch: Batch) -> Tensor:
        """Return whether each teacher saw anything of each clip, bool [teachers, B]."""
        return torch.stack([t.valid(batch.clip_index, batch.mask) for t in self.teachers])
