"""How the parts of backbones behind their cuts begin, and how they train."""

import torch

from karmma_pipeline.errors import ConfigError
from karmma_pipeline.models.backbones.choice import INPUT
from karmma_pipeline.models.cut import CutModel, suffixes_of
from karmma_pipeline.models.fusion import TokenModel
from karmma_pipeline.models.saved import ModelCard
from karmma_pipeline.training.ranks import Ranks
from karmma_pipeline.training.recipe import SuffixSettings, TrainRecipe


def adapt(recipe: TrainRecipe, model: TokenModel, ranks: Ranks) -> list[str]:
    """Let suffixes train as a recipe says; return what a reader should know.

    Raises:
        ConfigError: it says something of suffixes and no backbone is cut; or batch norms learn
            from parts of a batch.
    """
    suffixes, settings = suffixes_of(model), recipe.suffix
    if not suffixes:
        if settings.model_copy(update={"weights": {}}) != SuffixSettings():
            raise ConfigError(
                "suffix: no backbone of this store has a cut; remove the key, or extract with "
                "cut: STAGE or cut: input."
            )
        return []
    for modality, suffix in suffixes.items():
        if (
            not settings.freeze_norm
            and suffix.norms()
            and (recipe.accumulate, ranks.size) != (1, 1)
        ):
            raise ConfigError(
                f"suffix.freeze_norm=false: {modality}'s backbone has batch norms, which depend "
                "on the other clips of the forward pass; train with accumulate: 1 on one rank, "
                "or remove the key."
            )
        suffix.adapt(
            freeze_norm=settings.freeze_norm,
            stochastic=settings.stochastic,
            save_memory=settings.save_memory,
        )
        if not settings.lr:
            suffix.requires_grad_(requires_grad=False)
    if settings.augments:
        _augment(model, settings)
    return [_said(modality, model, settings) for modality in suffixes]


def _augment(model: TokenModel, settings: SuffixSettings) -> None:
    from karmma_pipeline.models.augment import Augmentation  # torchvision, too

    assert isinstance(model, CutModel)  # noqa: S101  (it has suffixes)
    video = [s for s in model.suffixes.values() if s.architecture.kind == "video"]
    if not any(suffix.cut == INPUT for suffix in video):
        raise ConfigError(
            "suffix.crop, colour and flip need stored frames, but no video backbone of this "
            "store was extracted with cut: input; remove them."
        )
    model.augmentation = Augmentation(settings.crop, settings.colour, settings.flip)


def _said(modality: str, model: TokenModel, settings: SuffixSettings) -> str:
    suffix = suffixes_of(model)[modality]
    count = sum(p.numel() for p in suffix.parameters() if p.requires_grad)
    what = f"{count:,} parameters train at lr {settings.lr:g}" if count else "frozen"
    if settings.save_memory and not suffix.stages():
        what += "; save_memory has no effect, as the network has no stages or list of blocks"
    return f"{modality}: {suffix.choice.name} from {suffix.cut} on: {what}"


def begin(recipe: TrainRecipe, model: TokenModel, card: ModelCard) -> None:
    """Give suffixes the weights of the networks whose prefixes made the store.

    Raises:
        CheckpointError: they are not there, or are others.
        ConfigError: `suffix.weights` names a modality that has no suffix.
    """
    suffixes, moved = suffixes_of(model), recipe.suffix.weights
    if unknown := [m for m in moved if m not in suffixes]:
        raise ConfigError(
            f"suffix.weights.{unknown[0]}: has no cut; modalities with a cut: "
            f"{', '.join(suffixes) or 'none'}."
        )
    if suffixes:
        from karmma_pipeline.models.backbones.suffix import weights_behind  # torchvision, too
    for modality, suffix in suffixes.items():
        whole = weights_behind(card.provenance[modality], moved.get(modality))
        with torch.no_grad():
            suffix.net.load_state_dict({name: whole[name] for name in suffix.net.state_dict()})
