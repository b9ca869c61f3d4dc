"""The losses: cross-entropy, and the distillation of KARMMA. B clips, C classes of a head.

A loss is a sum over clips divided by how many clips count in the *whole* batch, so that parts
of a batch (of ranks, or passed one after another) simply add up, however unequal they are.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from karmma_pipeline.data.loading.loader import Batch
from karmma_pipeline.errors import ConfigError, named_line

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
    student: Logits,
    teacher: Logits,
    valid: Tensor,
    temperature: float,
    count: Tensor | None = None,
    worth: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Return T^2 * KL(teacher || student) of the softened distributions, mean over heads.

    The factor T^2 keeps the gradient's size independent of T (Hinton et al., 2015).

    Args:
        student: head to logits [B, C]. The gradient flows through these.
        teacher: head to log probabilities [B, C], softened by the same T.
        valid: bool [B], clips of which a teacher saw something; the mean is over these.
        temperature: T.
        count: float [1], valid clips of the whole batch; those here if not given.
        worth: head to bool [B], the KL of other clips is 0; all if not given.
    """
    losses = []
    for head, scores in student.items():
        log_q = F.log_softmax(scores.float() / temperature, dim=1)
        per_clip = F.kl_div(log_q, teacher[head], reduction="none", log_target=True).sum(dim=1)
        counts = valid if worth is None else valid & worth[head]
        losses.append(torch.where(counts, per_clip, per_clip.new_zeros(())).sum())
    if count is None:
        count = valid.sum().double().cpu()
    return temperature**2 * (torch.stack(losses) / _divisor(count, losses[0])).mean()


def worth_teaching(
    clips: str, student: Logits, teacher: Logits, labels: Mapping[str, Tensor], temperature: float
) -> dict[str, Tensor] | None:
    """Return the clips from whose teacher there is something to learn, head to bool [B].

    Args:
        clips: ``right``: those that the teacher answers rightly; ``better``: those to whose label
            it gives more probability than the student, both softened; ``all``: None is returned.
        student: head to logits [B, C].
        teacher: head to log probabilities [B, C], softened by T.
        labels: head to int64 [B]; where one is unknown, -1, the teacher is believed.
        temperature: T.
    """
    if clips == "all":
        return None
    worth = {}
    for head, answers in teacher.items():
        label = labels[head].to(answers.device)
        if clips == "right":
            knows = answers.argmax(dim=1) == label
        else:
            place = label.clamp(min=0)[:, None]
            mine = F.log_softmax(student[head].detach().float() / temperature, dim=1)
            knows = (answers.gather(1, place) > mine.gather(1, place))[:, 0]
        worth[head] = knows | (label == UNKNOWN)
    return worth


class Objective(Protocol):
    """What a model is trained for."""

    @property
    def terms(self) -> tuple[str, ...]:
        """What `loss` returns, in order: ``loss``, which is minimised, and its parts."""

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
class Unseen:
    """A teacher that is asked of clips alone from which it did not learn.

    Args:
        teacher: its logits.
        learned: bool, by place in the student's store, the clips that it was trained on.
    """

    teacher: MaskedLogits
    learned: Tensor

    def valid(self, clip_index: Tensor, mask: Tensor) -> Tensor:
        """Return the clips of which it saw anything and that it did not learn from, bool [B]."""
        return self.teacher.valid(clip_index, mask) & ~self.learned[clip_index]

    def logits(self, clip_index: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Return its logits, head to [B, C]."""
        return self.teacher.logits(clip_index, mask)


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
        clips: those whose KL counts, see `worth_teaching`.
    """

    labels: Objective
    teachers: Sequence[MaskedLogits]
    alpha: float
    temperature: float
    weights: Sequence[float] = ()
    average: str = "probabilities"
    clips: str = "all"

    terms: ClassVar[tuple[str, ...]] = ("loss", "kl", "cross_entropy")

    def counts(self, batch: Batch) -> Tensor:
        """Return the labels that are known and the clips that a teacher saw, [heads + 1]."""
        taught = self._valid(batch).any(dim=0).sum().double()
        return torch.cat([self.labels.counts(batch), taught[None]])

    def loss(self, logits: dict[str, Tensor], batch: Batch, counts: Tensor) -> dict[str, Tensor]:
        """Return alpha * T^2 * KL + (1 - alpha) * cross-entropy."""
        device = next(iter(logits.values())).device
        valid = self._valid(batch).to(device)
        targets = self._targets(batch, valid, logits)
        worth = worth_teaching(self.clips, logits, targets, batch.labels, self.temperature)
        kl = distillation(logits, targets, valid.any(dim=0), self.temperature, counts[-1:], worth)
        entropy = self.labels.loss(logits, batch, counts[:-1])["loss"]
        loss = self.alpha * kl + (1 - self.alpha) * entropy
        return {"loss": loss, "kl": kl, "cross_entropy": entropy}

    def taught(self, batch: Batch, device: torch.device) -> "TeacherAnswers":
        """Return what the teachers say of a batch: the logits of one, or of their average."""
        valid = self._valid(batch).to(device)
        if len(self.teachers) == 1:
            (teacher,) = self.teachers
            answers = teacher.logits(batch.clip_index, batch.mask)
            logits = {head: of.float().to(device) for head, of in answers.items()}
        else:
            logits = self._targets(batch, valid, batch.labels)
        return TeacherAnswers(logits, valid.any(dim=0))

    def _targets(self, batch: Batch, valid: Tensor, heads: Iterable[str]) -> dict[str, Tensor]:
        """Return the average teacher's log probabilities, softened by T, head to [B, C]."""
        cached = [teacher.logits(batch.clip_index, batch.mask) for teacher in self.teachers]
        return {
            head: teacher_log_probabilities(
                [one[head].to(valid.device) for one in cached],
                valid,
                self.weights or (1.0,) * len(self.teachers),
                self.temperature,
                self.average,
            )
            for head in heads
        }

    def _valid(self, batch: Batch) -> Tensor:
        """Return whether each teacher saw anything of each clip, bool [teachers, B]."""
        return torch.stack([t.valid(batch.clip_index, batch.mask) for t in self.teachers])


class TeacherAnswers(dict[str, Tensor]):
    """A teacher's logits of a batch, head to float32 [B, C].

    valid: bool [B], False where no teacher saw anything of the clip: its row says nothing.
    """

    def __init__(self, logits: Mapping[str, Tensor], valid: Tensor) -> None:
        super().__init__(logits)
        self.valid = valid


# Columns of the metrics that are ours.
_RESERVED = frozenset({"steps", "gradient_norm"})


class OwnObjective:
    """A loss of one's own.

    Args:
        name: ``package.module:function``, for messages.
        function: called with a batch (all but its tokens on the logits' device), float32 logits,
            head to [B, C], what the teachers say (`TeacherAnswers`, None without teachers) and the
            keywords. It returns the mean over these clips, a scalar, or a dict of scalars with
            ``loss`` among them, whose other terms are logged.
        keywords: of the function.
        batch: a few clips on which it is tried; what it returns then, it returns in training.
        logits: of the model for these.
        taught: whether there are teachers.

    Attributes:
        teachers: whose answers it gets; set before training.

    Raises:
        ConfigError: it fails, or returns something else.
    """

    def __init__(
        self,
        name: str,
        function: Callable[..., Any],
        keywords: Mapping[str, Any],
        batch: Batch,
        logits: Mapping[str, Tensor],
        taught: bool,
    ) -> None:
        self.name, self.function, self.keywords = name, function, dict(keywords)
        self.teachers: DistillationObjective | None = None
        self.terms: tuple[str, ...] = ()
        scores = {head: of.detach().float().requires_grad_() for head, of in logits.items()}
        nothing = {head: torch.zeros_like(of) for head, of in scores.items()}
        saw = torch.ones(len(batch.clip_index), dtype=torch.bool)
        try:
            terms = self._call(batch, scores, TeacherAnswers(nothing, saw) if taught else None)
        except ConfigError:
            raise
        except Exception as error:  # whatever code of one's own raises
            reason = named_line(error)
            raise ConfigError(
                f"objective={name!r}: failed on the first batch ({reason})."
            ) from error
        if not terms["loss"].requires_grad:
            raise ConfigError(f"objective={name!r}: its loss does not depend on the logits.")
        self.terms = ("loss", *sorted(terms.keys() - {"loss"}))

    def counts(self, batch: Batch) -> Tensor:
        """Return the clips, [1]."""
        return torch.tensor([len(batch.clip_index)], dtype=torch.float64)

    def loss(self, logits: dict[str, Tensor], batch: Batch, counts: Tensor) -> dict[str, Tensor]:
        """Return the share of these clips in the mean over the whole batch."""
        share = len(batch.clip_index) / float(counts[0])
        device = next(iter(logits.values())).device
        taught = None if self.teachers is None else self.teachers.taught(batch, device)
        return {name: share * of for name, of in self._call(batch, logits, taught).items()}

    def _call(
        self, batch: Batch, logits: Mapping[str, Tensor], taught: TeacherAnswers | None
    ) -> dict[str, Tensor]:
        device = next(iter(logits.values())).device
        there = replace(
            batch,
            present=batch.present.to(device),
            mask=batch.mask.to(device),
            labels={head: of.to(device) for head, of in batch.labels.items()},
        )
        full = {head: of.float() for head, of in logits.items()}
        said = self.function(there, full, taught, **self.keywords)
        terms = said if isinstance(said, dict) else {"loss": said}
        names = [n for n in terms if not re.fullmatch(r"[a-z]\w*", str(n)) or n in _RESERVED]
        scalar = all(isinstance(of, Tensor) and of.dim() == 0 for of in terms.values())
        if names or "loss" not in terms or not scalar:
            what = f"names such as {names[0]!r}" if names else f"a {type(said).__name__}"
            raise ConfigError(
                f"objective={self.name!r}: returned {what}; return a scalar tensor (the mean "
                "over the clips), or a dict of such tensors with the key 'loss'."
            )
        if self.terms and terms.keys() != {*self.terms}:
            raise ConfigError(
                f"objective={self.name!r}: returned the terms {', '.join(terms)}, but previously "
                f"{', '.join(self.terms)}; return the same terms for every batch."
            )
        return terms
