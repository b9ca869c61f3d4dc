"""What stands for the tokens of an absent modality: the rules that a fusion model may follow.

B clips in a batch, M modalities, N tokens of a modality, D width of its features.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from karmma_pipeline import own_code
from karmma_pipeline.errors import CheckpointError

#: Tokens, modality to [B, N, D], standardised and zero where absent; presence, modality to bool
#: [B, 1, 1]; the mean of the training clips' tokens, modality to [N, D], standardised too. Returns
#: tokens; what it gives for rows that are present is not looked at.
Fill = Callable[
    [Mapping[str, Tensor], Mapping[str, Tensor], Mapping[str, Tensor]], Mapping[str, Tensor]
]


@dataclass(frozen=True)
class AbsentRule:
    """How a fusion model treats absence.

    Attributes:
        fill: what stands for the features of absent rows; None: zeros.
        taken_for_data: absent modalities count as present ones do; the model is not told.
        in_sequence: whether an absent modality has a place in the sequence at all.
    """

    fill: Fill | None = None
    taken_for_data: bool = False
    in_sequence: bool = True


def _mean(
    tokens: Mapping[str, Tensor], present: Mapping[str, Tensor], means: Mapping[str, Tensor]
) -> Mapping[str, Tensor]:
    return {m: means[m].expand_as(of) for m, of in tokens.items()}


#: Of the names in `size.ABSENT`.
RULES: dict[str, AbsentRule] = {
    "learned": AbsentRule(),
    "zeros": AbsentRule(taken_for_data=True),
    "mean": AbsentRule(_mean, taken_for_data=True),
    "drop": AbsentRule(in_sequence=False),
}


def find_rule(name: str) -> AbsentRule:
    """Return the rule of a name, or that whose features a function of one's own fills in.

    Raises:
        ConfigError: the function cannot be imported.
    """
    if name in RULES:
        return RULES[name]
    return AbsentRule(own_code.find(name, "size.absent"), taken_for_data=True)


def filled(
    rule: AbsentRule,
    tokens: Mapping[str, Tensor],
    present: Mapping[str, Tensor],
    means: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Return tokens in which a rule has filled the absent rows, and those alone.

    Raises:
        CheckpointError: what it gives has other shapes, or it lacks a modality.
    """
    if rule.fill is None:
        return dict(tokens)
    given = rule.fill(tokens, present, means)
    for m, of in tokens.items():
        if m not in given or given[m].shape != of.shape:
            shape = list(given[m].shape) if m in given else "nothing"
            raise CheckpointError(
                f"size.absent: returned the shape {shape} for {m}; it must be that of the "
                f"tokens, {list(of.shape)}."
            )
    return {m: of.where(present[m], given[m].to(of.dtype)) for m, of in tokens.items()}
