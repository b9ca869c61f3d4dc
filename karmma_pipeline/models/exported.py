"""An exported model: a folder of ONNX files and ``export.json``, which says all else of it.

It is read without the run, the store, torch's weights or any code of its makers: digests of all
files, classes, front ends and sampling stand in ``export.json``. `open_model` takes such a folder,
one on the hub, or a run.

B clips in a batch, M modalities, N tokens of a modality, D width, C classes of a head.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, PositiveInt, field_validator
from torch import Tensor

from karmma_pipeline import config
from karmma_pipeline.config import Recipe
from karmma_pipeline.errors import CheckpointError, ConfigError, one_line
from karmma_pipeline.models.backbones import BackboneChoice, hub
from karmma_pipeline.models.backbones.front_end import Audio
from karmma_pipeline.models.backbones.onnx_networks import OnnxChoice, OnnxFile, OnnxSession
from karmma_pipeline.models.backbones.registry import FrameTransform, Kind
from karmma_pipeline.models.fusion import TokenModel
from karmma_pipeline.models.saved import ModelCard, TrainedModel, load_model, read_card
from karmma_pipeline.runs import EXPORT, saved_folder

FUSION = "fusion.onnx"
BACKBONES = "backbones"
README = "README.md"

#: Names of inputs and outputs of the fusion's file: ``tokens.rgb``, ``mask``, ``logits.verb``.
TOKENS_OF, MASK, LOGITS_OF = "tokens.", "mask", "logits."

_FILE = re.compile(rf"{re.escape(FUSION)}|{BACKBONES}/[A-Za-z0-9_][A-Za-z0-9._-]*\.onnx")
_ON_HUB = "hf:"

# What a provenance says beside the network itself: `Networks` adds it again from the settings.
_OF_PREPARATION = frozenset(
    ("engine", "sampling", "sensor", "decoder", "rounding_s", "flow", "boxes", "audio")
)


class ExportedBackbone(Recipe):
    """A network in a file, and what it is fed."""

    file: str = Field(description="ONNX file; modalities may share one.")
    kind: Kind = Field(description="Kind of input; see `Architecture.kind`.")
    input: tuple[PositiveInt, ...] = Field(description="Shape of one input.")
    row_shape: tuple[PositiveInt, PositiveInt] = Field(
        description="Tokens and width per clip or, for a sensor, per window."
    )
    transform: FrameTransform | None = Field(None, description="Preprocessing of frames.")
    audio: Audio | None = Field(None, description="Spectrogram of the network, if it defines one.")

    def choice(self, folder: Path, sha256: str, facts: Mapping[str, Any]) -> OnnxChoice:
        """Return it as a backbone that is chosen.

        Args:
            folder: of the exported model.
            sha256: of its file.
            facts: provenance of the modality.

        Raises:
            ConfigError: what it is fed makes no sense.
        """
        of_kinds: dict[str, dict[str, Any]] = {
            "video": {"frames": self.input[1] if len(self.input) > 1 else None},
            "image": {"image": self.input[1:]},
            "series": {"series": self.input},
        }
        tree = {
            "name": str(facts.get("backbone", self.file)),
            "file": folder / self.file,
            "sha256": sha256,
            "kind": self.kind,
            "row_shape": self.row_shape,
            "view": self.transform,
            "audio": self.audio,
            "facts": {key: of for key, of in facts.items() if key not in _OF_PREPARATION},
            **of_kinds.get(self.kind, {}),
        }
        return config.build(OnnxChoice, tree, str(folder / EXPORT))


class ExportCard(Recipe):
    """What an exported model is."""

    version: Literal[1] = Field(1, description="Version of this schema.")
    model: ModelCard = Field(description="Model card of the exported model.")
    opset: int = Field(description="ONNX opset version.")
    backbones: dict[str, ExportedBackbone] = Field(
        description="Modality -> network, where it has one."
    )
    files: dict[str, str] = Field(description="SHA-256 of each file.")
    int8: tuple[str, ...] = Field((), description="Files with int8 matrix products.")
    measured: dict[str, Any] = Field({}, description="Measurements of the export, as in README.md.")

    @field_validator("files")
    @classmethod
    def _inside(cls, named: dict[str, str]) -> dict[str, str]:
        for name in named:
            if not _FILE.fullmatch(name):
                raise ValueError(f"{name!r}: must be {FUSION} or {BACKBONES}/NAME.onnx")
        return named


@dataclass(frozen=True, repr=False)
class ExportedModel(TrainedModel):
    """An exported model; its ``network`` is computed by onnxruntime on the CPU.

    Attributes:
        export: what the folder says of itself.
    """

    export: ExportCard

    def file(self, name: str) -> OnnxFile:
        """Return a file of the folder.

        Raises:
            CheckpointError: the folder records none of this name.
        """
        return _file(self.path, self.export, name)

    def choices(self) -> dict[str, BackboneChoice]:
        """Return the backbone of each modality that has a file.

        Raises:
            CheckpointError: the folder records no such file.
            ConfigError: what one is fed makes no sense.
        """
        return {
            m: one.choice(self.path, self.file(one.file).sha256, self.card.provenance[m])
            for m, one in self.export.backbones.items()
        }


class OnnxFusion(TokenModel):
    """The fusion of an exported model behind the interface of the one that was trained."""

    def __init__(self, card: ModelCard, file: OnnxFile) -> None:
        super().__init__(card.modalities, card.classes)
        self.session = OnnxSession(file)

    def forward(self, tokens: Mapping[str, Tensor], mask: Tensor) -> dict[str, Tensor]:
        """Classify a batch; see `FusionModel.forward`. Logits lie where the tokens do."""
        inputs = {TOKENS_OF + m: _float32(tokens[m]) for m in self.modalities}
        inputs[MASK] = np.ascontiguousarray(mask.cpu().numpy())
        outputs = self.session(inputs)
        device = tokens[self.modalities[0]].device
        return {h: torch.from_numpy(outputs[LOGITS_OF + h]).to(device) for h in self.heads}


def _float32(tokens: Tensor) -> Any:
    return tokens.detach().to("cpu", torch.float32).contiguous().numpy()


def open_model(path: str | Path, checkpoint: str = "best") -> TrainedModel:
    """Load a model: of a run, of one of its checkpoints, or an exported one.

    Args:
        path: a run, such as ``runs/student``, a folder in it, such as ``runs/student/best``, what
            `karmma export` has written, or ``hf:USER/NAME``, the same on the hub.
        checkpoint: which one of a run: ``best`` or ``last``.

    Raises:
        CheckpointError: there is none, or it is damaged.
        ConfigError: a package that exported models need is not installed.
    """
    folder = located(path)
    if is_export(folder):
        export = read_export(folder)
        fusion = OnnxFusion(export.model, _file(folder, export, FUSION)).eval()
        fusion.session.serve()  # a damaged file is to be told of now
        return ExportedModel(fusion, export.model, folder, export)
    folder = saved_folder(folder, checkpoint)
    network, card = load_model(folder)
    return TrainedModel(network, card, folder)


def card_of(path: str | Path) -> ModelCard:
    """Return what a model is, of all that `open_model` takes.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    folder = located(path)
    return read_export(folder).model if is_export(folder) else read_card(saved_folder(folder))


def located(path: str | Path) -> Path:
    """Return the folder of a model; one on the hub (``hf:USER/NAME``) is downloaded.

    Raises:
        ConfigError: the hub's client is not installed.
        CheckpointError: the download failed, or the repository holds no exported model.
    """
    text = str(path)
    if not text.startswith(_ON_HUB):
        return Path(path)
    repository = text.removeprefix(_ON_HUB)
    folder = hub.folder_of(repository, (EXPORT, README, FUSION, f"{BACKBONES}/*.onnx"))
    if not is_export(folder):
        raise CheckpointError(f"{text}: not an exported model; {EXPORT} is missing.")
    return folder


def is_export(folder: Path) -> bool:
    """Tell whether a folder is an exported model."""
    return (folder / EXPORT).is_file()


def read_export(folder: Path) -> ExportCard:
    """Read what an exported model is.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    path = folder / EXPORT
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(tree, dict):
            raise TypeError(f"expected a mapping, found {one_line(tree, 40)}")
        card = config.build(ExportCard, tree, str(path))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}).") from None
    except (ConfigError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is damaged ({error}).") from None
    unknown = sorted({*card.backbones} - {*card.model.modalities} | _without_record(card))
    if unknown:
        raise CheckpointError(f"{path}: is damaged ({unknown[0]!r} is not described).")
    return card


def _without_record(card: ExportCard) -> set[str]:
    return {m for m in card.backbones if "sampling" not in card.model.provenance.get(m, {})}


def _file(folder: Path, export: ExportCard, name: str) -> OnnxFile:
    if name not in export.files:
        raise CheckpointError(f"{folder / EXPORT}: lists no file {name!r}; export again.")
    return OnnxFile(folder / name, export.files[name])
