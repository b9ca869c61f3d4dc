"""A fusion model on disk: ``model.safetensors`` and ``model.json``, which never run code.

The card names the digest of its weights. While a model replaces an older one, the old weights
stay beside the new ones until the new card is written, so that a pair that fits is there at
every moment.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, field_validator
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from karmma_pipeline import config, files, own_code
from karmma_pipeline.config import Recipe
from karmma_pipeline.errors import CheckpointError, ConfigError, one_line
from karmma_pipeline.modalities import canonical
from karmma_pipeline.models.architectures import LateFusion, OwnModel, build_model
from karmma_pipeline.models.backbones.choice import BackboneChoice
from karmma_pipeline.models.cut import CutModel, model_of_tokens, suffixes_of
from karmma_pipeline.models.fusion import FusionModel, FusionSize, TokenModel
from karmma_pipeline.runs import CARD

WEIGHTS = "model.safetensors"
# Facts of a provenance that are no reason to call features others: versions of libraries, which
# may change the last bits of a token, and where weights lie, whose digest says which they are.
VERSIONS = frozenset(
    {
        *("torchvision", "timm", "transformers", "licence", "engine"),
        *("decoder", "flow.opencv", "audio.librosa", "flow.pairs", "rounding_s"),
    }
)
PLACES = frozenset({"weights"})
_OLD = "model.previous.safetensors"
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._ -]*")
# Keys of a card that are left out while they say nothing, so that earlier versions can read it.
_NEWER: dict[str, Any] = {"stores": (), "model": "", "model_args": {}, "code": {}}
_logger = logging.getLogger(__name__)


class ModelCard(Recipe):
    """What a saved model is, what it takes and where it comes from."""

    version: Literal[1] = Field(1, description="Version of this schema.")
    kind: Literal["teacher", "student", "baseline"] = Field(description="How it was trained.")
    name: str = Field(description="Name in legends.")
    model: str = Field("", description="Architecture: empty, late_fusion, or a custom factory.")
    model_args: dict[str, Any] = Field({}, description="Keyword arguments of the factory.")
    code: dict[str, str] = Field(
        {}, description="Custom code that it runs, and the digest of its source file."
    )
    size: FusionSize = Field(
        description="Size of the fusion model, and its treatment of absent modalities."
    )
    modalities: dict[str, tuple[int, int]] = Field(description="Tokens N and width D per modality.")
    heads: dict[str, tuple[str, ...]] = Field(description="Class names of each head.")
    provenance: dict[str, dict[str, Any]] = Field(description="Provenance of the tokens.")
    dtypes: dict[str, str] = Field({}, description="Data type of the stored tokens per modality.")
    store_digest: str = Field(description="Digest of the feature store it was trained on.")
    stores: tuple[str, ...] = Field(
        (), description="Digests of the stores that were joined, in order; empty for one store."
    )
    training: dict[str, Any] = Field({}, description="The recipe that trained it.")
    weights_sha256: str = Field("", description="Digest of the weights; set when it is saved.")

    @field_validator("modalities", "heads")
    @classmethod
    def _plain_names(cls, named: dict[str, Any]) -> dict[str, Any]:
        for name in named:
            if not _NAME.fullmatch(name):
                raise ValueError(f"{name!r}: use letters, digits, '-', '_' and '.'")
        return named

    @field_validator("heads")
    @classmethod
    def _in_order(cls, heads: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
        # As they are read again, since JSON is written with sorted keys: the rows of the last
        # layer follow this order.
        return dict(sorted(heads.items()))

    @property
    def classes(self) -> dict[str, int]:
        """Head to number of classes C."""
        return {head: len(names) for head, names in self.heads.items()}

    @property
    def own(self) -> dict[str, str]:
        """The key that names code of one's own, to the name."""
        names = {"model": self.model, "size.absent": self.size.absent}
        return {key: name for key, name in names.items() if own_code.is_own(name)}

    def code_now(self) -> dict[str, str]:
        """Return the digests of the code of one's own that it runs, as it is now.

        Raises:
            ConfigError: it cannot be imported.
        """
        return {name: own_code.digest(name, key) for key, name in self.own.items()}

    @property
    def cut(self) -> tuple[str, ...]:
        """The modalities whose backbones are cut: the model holds what lies behind."""
        return tuple(m for m in canonical(self.modalities) if "cut" in self.provenance.get(m, {}))

    @property
    def token_shapes(self) -> dict[str, tuple[int, int]]:
        """N and D of the tokens that are fused: of a cut backbone those of its end."""
        return {**self.modalities, **{m: c.output_shape for m, c in self._choices.items()}}

    @property
    def _choices(self) -> dict[str, BackboneChoice]:
        """The networks that are cut, with weights that cost nothing."""
        if not self.cut:
            return {}
        # It imports torchvision, which a model of cached tokens does without.
        from karmma_pipeline.models.backbones.backbone import recorded

        facts = {m: recorded(self.provenance[m]) for m in self.cut}
        return {m: BackboneChoice(**{**of, "weights": "random:0"}) for m, of in facts.items()}

    def build(self) -> TokenModel:
        """Build the architecture with fresh weights; those behind a cut are undefined.

        Raises:
            ConfigError: it is one's own, and cannot be imported or built.
        """
        shapes = self.token_shapes
        model = build_model(self.model, self.model_args, self.size, shapes, self.classes)
        if not self.cut:
            return model
        from karmma_pipeline.models.backbones.suffix import Suffix  # torchvision, too

        # On the CPU, wherever the rest is: not all that a library's network holds is in its state.
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            suffixes = {m: Suffix(choice) for m, choice in self._choices.items()}
        return CutModel(model, suffixes, self.modalities)


@dataclass(frozen=True, repr=False)
class TrainedModel:
    """A trained model in evaluation mode and its model card; see `karmma_pipeline.load_model`.

    Examples:
        >>> model = km.load_model("runs/student")
        >>> shapes = model.card.modalities
        >>> tokens = {m: torch.zeros(2, *shape) for m, shape in shapes.items()}
        >>> mask = torch.tensor([[True, True, True], [True, False, False]])
        >>> logits = model.network(tokens, mask)
        >>> logits["verb"].shape == (2, len(model.card.heads["verb"]))
        True

    Attributes:
        network: a `torch.nn.Module`. Inputs: tokens, modality to float32 [B, N, D], and a mask,
            bool [B, M] in the order of ``network.modalities``. Output: logits, head to [B, C].
        card: model card with ``modalities``, ``heads``, provenance, ...
        path: folder of the model.
    """

    network: TokenModel
    card: ModelCard
    path: Path

    @property
    def name(self) -> str:
        """Name of the model in legends."""
        return self.card.name

    def __repr__(self) -> str:
        heads = ", ".join(f"{head} ({len(of)})" for head, of in self.card.heads.items())
        takes = ", ".join(self.network.modalities)
        return f"<{self.card.kind} {self.name!r} of {takes}: {heads}>"


def save_model(folder: Path, model: TokenModel, card: ModelCard) -> None:
    """Write a model; killed anywhere, the old or the new one can be loaded."""
    expected = {"": FusionModel, "late_fusion": LateFusion}.get(card.model, OwnModel)
    fusion = model_of_tokens(model)
    if type(fusion) is not expected:  # it would be read as another one, silently
        raise CheckpointError(
            f"{folder}: a {type(fusion).__name__} cannot be saved as model={card.model!r}; set "
            "model to its factory, package.module:factory."
        )
    data = save({k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()})
    card = card.model_copy(update={"weights_sha256": hashlib.sha256(data).hexdigest()})
    # Two files cannot be replaced at one moment. In this order a card always has its weights: the
    # old card those under their second name, until the new card is there.
    _keep_old(folder)
    files.write_bytes(folder / WEIGHTS, data)
    left_out = {key for key, empty in _NEWER.items() if getattr(card, key) == empty}
    files.write_json(folder / CARD, card.model_dump(mode="json", exclude=left_out))
    (folder / _OLD).unlink(missing_ok=True)


def _keep_old(folder: Path) -> None:
    """Give the weights that the card names a second name, unless they have it already."""
    try:
        wanted = json.loads((folder / CARD).read_text(encoding="utf-8"))["weights_sha256"]
        if files.sha256(folder / WEIGHTS) != wanted:
            return  # killed here before: the old name is the right one
        if (folder / _OLD).exists() and (folder / _OLD).samefile(folder / WEIGHTS):
            return
    except (OSError, KeyError, TypeError, ValueError):
        return
    with files.replacing(folder / _OLD) as temporary:
        temporary.unlink()
        try:
            os.link(folder / WEIGHTS, temporary)
        except OSError:  # a file system without hard links
            shutil.copyfile(folder / WEIGHTS, temporary)


def read_card(folder: Path) -> ModelCard:
    """Read what a saved model is.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    path = folder / CARD
    try:
        return config.build(ModelCard, json.loads(path.read_text(encoding="utf-8")), str(path))
    except OSError as error:
        raise CheckpointError(f"{path}: no saved model found ({error.strerror}).") from None
    except (ConfigError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the model card is damaged ({error}).") from None


def check_whole(folder: Path) -> None:
    """Check that a saved model is there, with the weights that its card names.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    _read_weights(folder, read_card(folder))


def load_model(folder: Path) -> tuple[TokenModel, ModelCard]:
    """Load a model in evaluation mode, on the CPU; says if code of one's own has changed since.

    Raises:
        CheckpointError: it is missing, damaged, or its tensors do not fit its card; or its
            architecture cannot be imported.
    """
    card = read_card(folder)
    _check_code(folder, card)
    tensors = _read_weights(folder, card)
    path = folder / WEIGHTS
    try:
        if card.size.layers > len(tensors):
            raise RuntimeError(f"{card.size.layers} layers in {len(tensors)} tensors")
        if own_code.is_own(card.model):  # which may look at its numbers, and draws some
            with torch.random.fork_rng(devices=[]):
                model = card.build()
        else:
            with torch.device("meta"):  # whatever sizes the card names, they cost no memory
                model = card.build()
        model.load_state_dict(tensors, assign=True)
    except ConfigError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    except (RuntimeError, KeyError) as error:
        reason = one_line(error, 200)
        raise CheckpointError(f"{path}: does not match {CARD} ({reason}).") from None
    return model.eval(), card


def _check_code(folder: Path, card: ModelCard) -> None:
    """Refuse an architecture that is not there; tell of one whose source is another one now."""
    try:
        code = card.code_now()
    except ConfigError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    for name, now in code.items():
        if (then := card.code.get(name)) != now:
            _logger.warning(
                "%s: the source of %s has changed since it was trained (%s then, %s now); its "
                "predictions may differ.",
                *(folder, name, (then or "unknown")[:12], now[:12]),
            )


def begin_from(model: TokenModel, card: ModelCard, folder: Path) -> list[str]:
    """Give a model the weights of a saved one, as far as they mean the same in both.

    Modalities meet by name if their tokens come from the same network in the same way, classes of
    a head by name.

    Args:
        model: changed in place.
        card: what it is.
        folder: of the saved model.

    Returns:
        What keeps its fresh weights: modalities, and classes as ``head: 3 of 8 classes``.

    Raises:
        CheckpointError: there is none, or it is of another size.
    """
    found, theirs = load_model(folder)
    if card.model or theirs.model:
        return _begin_alike(model, card, found, theirs, folder)
    for key in ("dim", "layers", "attention_heads", "ffn_width", "head_width", "pool"):
        here, there = getattr(card.size, key), getattr(theirs.size, key)
        if here != there:
            raise CheckpointError(
                f"{folder}: size.{key} is {there} in this model, but {here} in the recipe; to "
                f"start from its weights, set size.{key}: {there}."
            )
    anew = [m for m in model.modalities if not _same_tokens(card, theirs, m)]
    _begin_suffixes(model, found, anew)
    model, found = model_of_tokens(model), model_of_tokens(found)
    old, new = found.state_dict(), model.state_dict()
    for name, tensor in new.items():
        of_new = any(part in anew for part in (*name.split("."), *name.split("_", 1)))
        if name in old and not of_new and not name.startswith("classify."):
            tensor.copy_(old[name])
    rows, lacking = _class_rows(card.heads, theirs.heads)
    for name in ("classify.weight", "classify.bias"):
        for row, its in rows.items():
            new[name][row] = old[name][its]
    return [*anew, *lacking]


def _begin_suffixes(model: TokenModel, found: TokenModel, anew: Sequence[str]) -> None:
    theirs = suffixes_of(found)
    for modality, suffix in suffixes_of(model).items():
        if modality in theirs and modality not in anew:
            suffix.load_state_dict(theirs[modality].state_dict())


def _begin_alike(
    model: TokenModel, card: ModelCard, found: TokenModel, theirs: ModelCard, folder: Path
) -> list[str]:
    """Take over all weights; only our fusion block knows which of them mean the same elsewhere."""
    for key in ("model", "model_args", "size", "heads"):
        if (here := getattr(card, key)) != (there := getattr(theirs, key)):
            raise CheckpointError(
                f"{folder}: {key} is {there!r} in this model, but {here!r} in the recipe."
            )
    if list(model.modalities) != list(found.modalities) or not all(
        _same_tokens(card, theirs, m) for m in model.modalities
    ):
        raise CheckpointError(
            f"{folder}: was trained on tokens of other backbones than this run; start from a model "
            "of the same backbones."
        )
    _begin_suffixes(model, found, ())
    model_of_tokens(model).load_state_dict(model_of_tokens(found).state_dict())
    return []


def _same_tokens(one: ModelCard, other: ModelCard, modality: str) -> bool:
    """Tell whether a model begins with the tokens that a saved one takes.

    One whose backbone is cut begins with the backbone's own; one that trained a part of it does not
    end with them.
    """
    shapes = [card.token_shapes.get(modality) for card in (one, other)]
    if shapes[0] != shapes[1]:
        return False
    here, there = one.provenance[modality], other.provenance[modality]
    if "cut" in here and "cut" not in there:
        here = {key: of for key, of in here.items() if key != "cut"}
    return here == there


def _class_rows(
    heads: Mapping[str, tuple[str, ...]], theirs: Mapping[str, tuple[str, ...]]
) -> tuple[dict[int, int], list[str]]:
    """Return the rows of the classes that both have, and how many of each head only the first."""
    order = [(head, name) for head, names in theirs.items() for name in names]
    its = {key: row for row, key in enumerate(order)}
    mine = [(head, name) for head, names in heads.items() for name in names]
    rows = {row: its[key] for row, key in enumerate(mine) if key in its}
    lacking = []
    for head, names in heads.items():
        if count := sum((head, name) not in its for name in names):
            lacking.append(f"{head}: {count} of {len(names)} classes")
    return rows, lacking


def _read_weights(folder: Path, card: ModelCard) -> dict[str, Tensor]:
    """Return the tensors that the card names, from the file or the one it was replacing."""
    path = folder / WEIGHTS
    fault = (
        f"the weights are damaged or belong to another model; their digest is not that in {CARD}"
    )
    for candidate in (path, folder / _OLD):
        try:
            data = candidate.read_bytes()
        except OSError as error:
            if candidate == path:
                fault = f"cannot be read ({error.strerror})"
            continue
        if hashlib.sha256(data).hexdigest() == card.weights_sha256:
            try:
                # Clones lie on boundaries of 64 bytes. safetensors' own tensors lie anywhere, and
                # products then differ in their last bits from one process to the next.
                return {name: tensor.clone() for name, tensor in load(data).items()}
            except SafetensorError as error:
                fault = f"is not a safetensors file ({error})"
    raise CheckpointError(f"{path}: {fault}; copy the folder again, or train in another one.")
