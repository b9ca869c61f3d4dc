"""What a whole network, its head included, sees in a clip: a check that weights are right."""

import torch
from torch import Tensor

from karmma_pipeline.errors import CheckpointError
from karmma_pipeline.models.backbones import published, state_dicts
from karmma_pipeline.models.backbones.backbone import read_weights
from karmma_pipeline.models.backbones.choice import BackboneChoice


def top_classes(choice: BackboneChoice, x: Tensor, count: int = 5) -> list[tuple[str, float]]:
    """Return the classes that the head finds most likely, and their probabilities.

    Args:
        choice: a video network with weights from a file or published ones.
        x: one input, float32 [1, 3, T, h, w].
        count: classes to return.

    Returns:
        Nothing where the weights hold no head, or one whose classes are not known.
    """
    architecture = choice.architecture
    name = choice.weights if choice.source == "published" else "DEFAULT"
    member = published.enum_member(architecture, name)
    if choice.source == "random" or architecture.kind != "video" or member is None:
        return []
    classes: list[str] = member.meta["categories"]
    whole = architecture.build(weights=None).eval()
    where, tensors = read_weights(choice)
    try:
        loaded = state_dicts.fill(whole, tensors, where)
    except CheckpointError:
        return []
    lacking = (*loaded.missing, *loaded.wrong_shape)
    if any(key.startswith(f"{head}.") for key in lacking for head in architecture.heads):
        return []
    with torch.inference_mode():
        best = whole(x).softmax(-1)[0].topk(count)
    return [
        (classes[index], probability)
        for probability, index in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]
