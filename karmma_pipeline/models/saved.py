"""A fusion model on disk: ``model.safetensors`` and ``model.json``, which never run code."""

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load, save

from karmma_pipeline import config, files
from karmma_pipeline.config import Recipe
from karmma_pipeline.errors import CheckpointError, ConfigError
from karmma_pipeline.models.fusion import FusionModel, FusionSize

WEIGHTS, CARD = "model.safetensors", "model.json"


class ModelCard(Recipe):
    """What a saved model is, what it takes and where it comes from."""

    version: Literal[1] = Field(1, description="Version of this schema.")
    kind: Literal["teacher", "student", "baseline"] = Field(description="How it was trained.")
    name: str = Field(description="Name in legends.")
    size: FusionSize = Field(description="Architecture.")
    modalities: dict[str, tuple[int, int]] = Field(description="Tokens N and width D of each.")
    heads: dict[str, tuple[str, ...]] = Field(description="Class names of each head.")
    provenance: dict[str, dict[str, Any]] = Field(description="Where the tokens come from.")
    store_digest: str = Field(description="Digest of the feature store it was trained on.")
    training: dict[str, Any] = Field({}, description="The recipe that trained it.")

    def build(self) -> FusionModel:
        """Build the architecture with fresh weights."""
        classes = {head: len(names) for head, names in self.heads.items()}
        return FusionModel(self.size, self.modalities, classes)


def save_model(folder: Path, model: FusionModel, card: ModelCard) -> None:
    """Write a model; the card, which names it whole, comes last."""
    tensors = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    files.write_bytes(folder / WEIGHTS, save(tensors))
    files.write_json(folder / CARD, card.model_dump(mode="json"))


def read_card(folder: Path) -> ModelCard:
    """Read what a saved model is.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    path = folder / CARD
    try:
        return config.build(ModelCard, json.loads(path.read_text()), str(path))
    except OSError as error:
        raise CheckpointError(f"{path}: no saved model is there ({error.strerror}).") from None
    except (ConfigError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: the model card is damaged ({error}).") from None


def load_model(folder: Path) -> tuple[FusionModel, ModelCard]:
    """Load a model in evaluation mode, on the CPU.

    Raises:
        CheckpointError: it is missing, damaged, or its tensors do not fit its card.
    """
    card = read_card(folder)
    path = folder / WEIGHTS
    model = card.build()
    try:
        model.load_state_dict(load(path.read_bytes()))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}).") from None
    except SafetensorError as error:
        raise CheckpointError(f"{path}: the weights are damaged ({error}).") from None
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path}: does not fit {CARD} ({reason}).") from None
    return model.eval(), card
