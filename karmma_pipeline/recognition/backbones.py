"""The backbones behind a trained model, set up again from what its card records of them.

A model knows where its tokens came from: network, weights by digest, sampling, front ends. So
raw video needs no recipe; and what is set up here is compared with the record before it is used,
for a model that is fed other features answers without an error, and wrongly.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from karmma_pipeline import config
from karmma_pipeline.config import Recipe
from karmma_pipeline.data.manifest import Manifest
from karmma_pipeline.data.sensors import Sensor
from karmma_pipeline.errors import CheckpointError, ConfigError
from karmma_pipeline.extraction.inference.networks import Networks
from karmma_pipeline.extraction.recipe import Audio, ExtractRecipe, Flow
from karmma_pipeline.models.backbones import BackboneChoice, registry
from karmma_pipeline.models.backbones.backbone import recorded
from karmma_pipeline.models.backbones.choice import WITHOUT_WEIGHTS, Engine
from karmma_pipeline.models.exported import ExportedModel, card_of
from karmma_pipeline.models.saved import PLACES, VERSIONS, ModelCard, TrainedModel
from karmma_pipeline.store import ModalitySpec

SET = "model"
"""Name of the one backbone set that a model needs."""


def recipe_of(
    model: TrainedModel, weights: Mapping[str, str], device: str, engine: Engine | None = None
) -> ExtractRecipe:
    """Return the extraction recipe whose tokens a model takes.

    Args:
        model: of a run, or exported: then its own files are the networks.
        weights: modality to a file of weights that has moved since, or its published name.
        device: where the backbones run.
        engine: what computes them; None: what computed the tokens of the training.

    Raises:
        ConfigError: the card does not say enough, or an option names what it does not have.
        CheckpointError: an exported model lacks a file.
    """
    card = model.card
    recorded = {m: facts for m, facts in card.provenance.items() if "backbone" in facts}
    if not recorded:
        raise ConfigError(
            f"the model {card.name!r} was trained on imported features, whose backbones are not "
            "recorded, so it cannot be applied to raw video."
        )
    if unknown := [m for m in weights if m not in recorded]:
        raise ConfigError(
            f"--weights {unknown[0]}=...: the model has no backbone for this modality; it has "
            f"{', '.join(recorded)}."
        )
    files = _exported(model, weights, device, engine) if isinstance(model, ExportedModel) else {}
    choices = {m: files.get(m) or _choice(of, weights.get(m), engine) for m, of in recorded.items()}
    tree: dict[str, Any] = {
        "manifest": "-",
        "out": "-",
        "device": "cpu" if files else device,
        "sets": {SET: choices},
        "sampling": _common(recorded, "sampling"),
        "sensors": {
            m: _known(Sensor, of["sensor"]) for m, of in recorded.items() if "sensor" in of
        },
    }
    for key, settings in (("flow", Flow), ("audio", Audio)):
        if of := recorded.get(key, {}).get(key):  # beside the settings stand facts
            tree[key] = _known(settings, of)
    return config.build(ExtractRecipe, tree, f"the model {card.name!r}")


def _exported(
    model: ExportedModel, weights: Mapping[str, str], device: str, engine: Engine | None
) -> dict[str, BackboneChoice]:
    if weights:
        raise ConfigError(
            f"--weights: {model.path} is an exported model, which contains its weights."
        )
    if device not in {"auto", "cpu"}:
        raise ConfigError(
            f"device={device!r}: {model.path} is an exported model, which runs in onnxruntime "
            "on the CPU; omit the device, or use the run instead."
        )
    if engine is not None:
        raise ConfigError(
            f"engine={engine!r}: {model.path} is an exported model, which runs in onnxruntime; "
            "omit the engine, or use the run instead."
        )
    choices = model.choices()
    for m, facts in model.card.provenance.items():
        # Its maker's network, whose code would be run, must not stand in for a file.
        if m not in choices and facts.get("backbone", "") not in {"", *WITHOUT_WEIGHTS}:
            raise CheckpointError(
                f"{model.path}: has no file for the backbone of {m}; export again."
            )
    return choices


def sensors_of(run: str | Path) -> dict[str, Sensor]:
    """Return the modalities of a run's model that are sensors, and how their files are read.

    Raises:
        CheckpointError: there is no model, or it is damaged.
    """
    recorded = card_of(run).provenance
    return {m: _sensor(facts) for m, facts in recorded.items() if "sensor" in facts}


def _sensor(facts: Mapping[str, Any]) -> Sensor:
    return config.build(Sensor, _known(Sensor, facts["sensor"]), "the model's sensor")


def _known(model: type[Recipe], of: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in of.items() if name in model.model_fields}


def _choice(facts: Mapping[str, Any], weights: str | None, engine: Engine | None) -> dict[str, Any]:
    """Turn a record of a backbone into the choice that a recipe would make."""
    choice = recorded(facts)
    if facts["backbone"] in WITHOUT_WEIGHTS:
        return choice
    choice["engine"] = engine or str(facts.get("engine") or "torch").partition(" ")[0]
    choice |= {"weights": weights or facts["weights"], "key_map": facts["weights_key_map"]}
    if registry.find(facts["backbone"]).audio is not None:
        # As it was then, whatever the network states now.
        choice |= {"audio": _known(Audio, facts["audio"])}
    return choice


def _common(recorded: Mapping[str, Mapping[str, Any]], key: str) -> Any:
    """Return a setting that all modalities share, as those of one extraction do."""
    values = [facts[key] for facts in recorded.values()]
    if any(value != values[0] for value in values):
        raise ConfigError(
            f"the model's modalities were extracted with different {key}, so they cannot be "
            "computed in one pass over the video. Extract them together and train on that store."
        )
    return values[0]


def check_networks(networks: Networks, card: ModelCard) -> list[str]:
    """Compare what was set up with what the model was trained on.

    Returns:
        Sentences on libraries that have other versions now.

    Raises:
        ConfigError: the tokens would be others.
    """
    notes: list[str] = []
    faults: list[str] = []
    for modality, spec in specs_of(networks).items():
        now = spec.model_dump(mode="json")["provenance"]  # plain, as the card has it
        for key, here, was in config.differences(now, card.provenance[modality]):
            if key not in PLACES:
                said = f"{modality}.{key} was {was} in training, now {here}"
                (notes if key in VERSIONS else faults).append(said)
    if faults:
        raise ConfigError(
            f"the model {card.name!r} was trained on different features: "
            f"{'; '.join(faults[:3])}. Pass the weights that it was trained with, as --weights "
            "MODALITY=FILE."
        )
    return notes


def specs_of(networks: Networks) -> dict[str, ModalitySpec]:
    """Return how the tokens of each modality look, and where they come from."""
    return dict(networks.store_spec(SET, Manifest((), {})).modalities)


def parse_weights(given: tuple[str, ...]) -> dict[str, str]:
    """Read ``MODALITY=FILE`` options.

    Raises:
        ConfigError: one has no ``=``, or its file does not exist.
    """
    pairs = {}
    for text in given:
        modality, equals, value = text.partition("=")
        if not (equals and modality and value):
            raise ConfigError(f"--weights {text!r}: write MODALITY=FILE, such as rgb=swin.pt.")
        if Path(value).suffix and not Path(value).is_file():
            raise ConfigError(f"--weights {text}: no such file.")
        pairs[modality] = value
    return pairs
