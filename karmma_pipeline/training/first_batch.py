"""What code of one's own is held to before a run writes anything: it is tried on a few clips."""

import hashlib

import torch
from torch import Tensor

from karmma_pipeline.data.loading.loader import Batch, FeatureLoader
from karmma_pipeline.errors import ConfigError, KarmmaError, named_line
from karmma_pipeline.models.architectures import needs_whole_batches
from karmma_pipeline.models.fusion import TokenModel
from karmma_pipeline.store import TokenSource
from karmma_pipeline.store.spec import ClipNumbers
from karmma_pipeline.training.ranks import Ranks
from karmma_pipeline.training.recipe import TrainRecipe

_CLIPS = 4


def first_batch(
    name: str, model: TokenModel, store: TokenSource, clips: ClipNumbers
) -> tuple[Batch, dict[str, Tensor]]:
    """Return the first clips of a training and what a model on the CPU says of them.

    The last one is left with one modality, so that absence is tried as well.

    Raises:
        ConfigError: the model fails on them, or gives something else than logits.
    """
    (batch,) = FeatureLoader(store, clips[:_CLIPS], _CLIPS, threads=0).epoch(0)
    batch.mask[-1] = batch.present[-1] & (batch.present[-1].cumsum(0) == 1)
    training = model.training
    try:
        # Random numbers that this draws must not move those of the training.
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            logits = model.eval()(batch.tokens_on(torch.device("cpu")), batch.mask)
    except KarmmaError as error:
        raise ConfigError(str(error)) from error
    except Exception as error:  # whatever code of one's own raises
        reason = named_line(error)
        raise ConfigError(f"model={name!r}: failed on the first batch ({reason}).") from error
    model.train(training)
    return batch, logits


def check_start(recipe: TrainRecipe, model: TokenModel, ranks: Ranks) -> None:
    """Check that parts of a batch and ranks train one model.

    Raises:
        ConfigError: its numbers depend on which clips share a pass, or ranks begin with other
            weights.
    """
    if (recipe.accumulate > 1 or ranks.size > 1) and (parts := needs_whole_batches(model)):
        raise ConfigError(
            f"model={recipe.model!r}: {parts[0]} is a BatchNorm, which depends on the other "
            "clips of the forward pass; train it with accumulate: 1 on one rank, or use "
            "LayerNorm."
        )
    sha = hashlib.sha256()
    for tensor in model.state_dict().values():
        sha.update(tensor.detach().cpu().numpy().tobytes())
    if len({*ranks.gather(sha.hexdigest())}) > 1:
        raise ConfigError(
            f"model={recipe.model!r}: initial weights differ between ranks; draw them only with "
            "torch, which the recipe seeds."
        )
