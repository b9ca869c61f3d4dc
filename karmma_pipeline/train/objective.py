"""The losses: cross-entropy, and the distillation of KARMMA. B clips, C classes of a head."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

UNKNOWN = -1
Logits = Mapping[str, Tensor]


def cross_entropy(logits: Logits, labels: Mapping[str, Tensor], smoothing: float = 0.0) -> Tensor:
    """Return the mean over heads of the mean cross-entropy; clips without a label do not count.

    Args:
        logits: head to [B, C].
        labels: head to int64 [B], -1 where unknown.
        smoothing: label smoothing.
    """
    losses = []
    for head, scores in logits.items():
        summed = F.cross_entropy(
            scores.float(),
            labels[head],
            ignore_index=UNKNOWN,
            label_smoothing=smoothing,
            reduction="sum",
        )
        losses.append(summed / (labels[head] != UNKNOWN).sum().clamp(min=1))
    return torch.stack(losses).mean()


def distillation(student: Logits, teacher: Logits, valid: Tensor, temperature: float) -> Tensor:
    """Return T^2 * KL(teacher || student) of the softened distributions, mean over heads.

    The factor T^2 keeps the gradient's size independent of T (Hinton et al., 2015).

    Args:
        student: head to logits [B, C]. The gradient flows through these.
        teacher: head to logits [B, C].
        valid: bool [B], clips of which the teacher saw something; the mean is over these.
        temperature: T.
    """
    losses = []
    for head, scores in student.items():
        log_q = F.log_softmax(scores.float() / temperature, dim=1)
        log_p = F.log_softmax(teacher[head].float() / temperature, dim=1)
        per_clip = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=1)
        summed = torch.where(valid, per_clip, per_clip.new_zeros(())).sum()
        losses.append(summed / valid.sum().clamp(min=1))
    return temperature**2 * torch.stack(losses).mean()
