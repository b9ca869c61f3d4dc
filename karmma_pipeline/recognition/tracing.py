"""The networks of a trained model as ONNX files.

Each backbone is a file of its own, so that the one of an absent modality need not be run; the
fusion takes the tokens of all modalities and a mask. Batches may be of any size.

B clips in a batch, M modalities, N tokens, D width, S subsets of the modalities.
"""

import contextlib
import io
import json
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.onnx.utils import register_custom_op_symbolic

from karmma_pipeline import files
from karmma_pipeline.errors import CheckpointError, ConfigError, one_line
from karmma_pipeline.extraction.inference.networks import example, network_key
from karmma_pipeline.extraction.types import InputSpec
from karmma_pipeline.modalities import canonical
from karmma_pipeline.models.backbones import Backbone, BackboneChoice, hub
from karmma_pipeline.models.backbones.choice import WITHOUT_WEIGHTS
from karmma_pipeline.models.backbones.onnx_networks import INPUT, TOKENS
from karmma_pipeline.models.backbones.state_dicts import digest
from karmma_pipeline.models.cut import suffixes_of
from karmma_pipeline.models.exported import (
    BACKBONES,
    FUSION,
    LOGITS_OF,
    MASK,
    TOKENS_OF,
    ExportedBackbone,
)
from karmma_pipeline.models.fusion import TokenModel
from karmma_pipeline.models.saved import ModelCard
from karmma_pipeline.recognition.backbones import SET
from karmma_pipeline.recognition.recognizer import Recognizer
from karmma_pipeline.views import middle_frames

#: Version of ONNX's operators: in every onnxruntime since 1.12 (2022).
OPSET = 17

# A protobuf, which an ONNX file is, ends at 2 GiB.
_MOST_BYTES = 2**31 - 2**20

_CLIPS = 2  # that go through at once where a graph is traced and checked: a batch, and no more


@dataclass(frozen=True)
class Traced:
    """The networks of a model as they were written, and their tokens.

    Attributes:
        backbones: modality to its file and what it is fed.
        inputs: modality to clips of noise as a decoder gives them, [B, ...].
        tokens: modality to what PyTorch makes of them, [B, N, D].
        trained: modality whose backbone was cut to the digest of its weights, trained ones too.
    """

    backbones: dict[str, ExportedBackbone]
    inputs: dict[str, Tensor]
    tokens: dict[str, Tensor]
    trained: dict[str, str]


class _Tokens(nn.Module):
    """A backbone as it is traced: what ONNX lacks is said in other operators.

    ``frames``: of its input, the middle ones of which the network takes; None: as many.
    """

    def __init__(self, backbone: Backbone, frames: int | None = None) -> None:
        super().__init__()
        self.backbone = backbone
        choice = backbone.choice
        grids = (choice.raw_grid, choice.tokens) if choice.tokens else ()
        self.pools = [_averages(n, o) if n != o else None for n, o in zip(*grids, strict=True)]
        self.frames = slice(None) if frames is None else middle_frames(frames, choice.frame_count)

    def forward(self, x: Tensor) -> Tensor:
        architecture = self.backbone.architecture
        if architecture.kind == "series":  # windows by themselves, whose number is the batch's
            made = architecture.feature_map(self.backbone.net, x)
            tokens = made if isinstance(made, Tensor) else made.map
            return tokens.unsqueeze(1) if tokens.dim() == 2 else tokens
        x = x if self.frames == slice(None) else x[:, :, self.frames]
        features, extra = architecture.parts(self.backbone.net, x)
        for axis, average in enumerate(self.pools, start=2):
            if average is not None:
                features = (features.transpose(axis, 4) @ average).transpose(axis, 4)
        tokens = features.flatten(2).transpose(1, 2)
        return tokens if extra is None else torch.cat([extra, tokens], dim=1)


def _averages(size: int, wanted: int) -> Tensor:
    """Return adaptive average pooling of an axis as a matrix [size, wanted]."""
    return nn.functional.adaptive_avg_pool1d(torch.eye(size), wanted)


class _Fusion(nn.Module):
    """A fusion model as it is traced: tokens of each modality, then the mask."""

    def __init__(self, model: TokenModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        *tokens, mask = given
        logits = self.model(dict(zip(self.model.modalities, tokens, strict=True)), mask)
        return tuple(logits[head] for head in self.model.heads)


def write_backbones(folder: Path, recognizer: Recognizer) -> Traced:
    """Write the backbones of a model, each once, into ``folder/backbones``.

    One that is cut is written as a whole, with what was trained of it, and rounds nothing where its
    store did.

    Raises:
        ConfigError: ONNX cannot express one.
        CheckpointError: one is too large.
    """
    networks, card = recognizer.networks, recognizer.card
    traced, firsts = Traced({}, {}, {}, {}), dict[str, str]()
    choices, suffixes = networks.recipe.sets[SET], suffixes_of(recognizer.model)
    for modality in canonical(choices):
        choice, suffix = choices[modality].cut_at(None), suffixes.get(modality)
        if choice.name in WITHOUT_WEIGHTS or choice.source == "none":
            continue
        spec = networks.jobs(SET)[modality].spec
        key = network_key(choice) if suffix is None else modality  # which was trained by itself
        first = firsts.setdefault(key, modality)
        backbone = Backbone(choice)
        if suffix is not None:  # its state lacks what lies before the cut
            backbone.net.load_state_dict({**backbone.net.state_dict(), **suffix.net.state_dict()})
            traced.trained[modality] = digest(backbone.net.state_dict())
        clips = example(spec, _CLIPS)
        with torch.no_grad():
            x = backbone.prepare(clips)
            module = _Tokens(backbone, choices[modality].stored_frames).eval()
            made = backbone(x[:, :, module.frames]).float()
            traced.inputs[modality], traced.tokens[modality] = clips, made
            rows = x.flatten(0, 1) if choice.series is not None else x
            _, N, D = module(rows[:1]).shape
        # Not the choice's own shape: the file picks its frames of those that are stored.
        one = _fed(f"{BACKBONES}/{first}.onnx", choice, tuple(x.shape[1:]), spec, (N, D))
        traced.backbones[modality] = one
        if first == modality:
            about = one.model_dump(mode="json") | {
                "sampling": card.provenance[modality]["sampling"]
            }
            _trace(folder / one.file, module, {INPUT: rows}, [TOKENS], about)
    return traced


def _fed(
    file: str,
    choice: BackboneChoice,
    input_shape: tuple[int, ...],
    spec: InputSpec,
    row_shape: tuple[int, int],
) -> ExportedBackbone:
    return ExportedBackbone(
        file=file,
        kind=choice.architecture.kind,
        input=input_shape,
        row_shape=row_shape,
        transform=spec.transform,
        audio=spec.audio,
    )


def write_fusion(folder: Path, model: TokenModel, card: ModelCard) -> None:
    """Write the fusion of a model: inputs ``tokens.M``, bool ``mask`` [B, M]; ``logits.HEAD``.

    Raises:
        ConfigError: ONNX cannot express it.
    """
    given = {TOKENS_OF + m: of for m, of in typical(model).items()}
    given[MASK] = torch.ones(_CLIPS, len(model.modalities), dtype=torch.bool)
    given[MASK][1, 1:] = False
    outputs = [LOGITS_OF + head for head in model.heads]
    about = {"modalities": list(model.modalities), "heads": card.model_dump(mode="json")["heads"]}
    _trace(folder / FUSION, _Fusion(model).eval(), given, outputs, about)


def typical(model: TokenModel) -> dict[str, Tensor]:
    """Return tokens of noise [B, N, D] that are spread as those of the training were."""
    generator = torch.Generator().manual_seed(0)
    made = {}
    for m in model.modalities:
        mean, std = model.get_buffer(f"mean_{m}"), model.get_buffer(f"std_{m}")
        noise = torch.randn((_CLIPS, model.tokens[m], len(mean)), generator=generator)
        made[m] = mean + std * noise
    return made


def _trace(
    path: Path,
    module: nn.Module,
    given: Mapping[str, Tensor],
    outputs: Sequence[str],
    about: Mapping[str, Any],
) -> None:
    """Write a module as an ONNX file whose first axes are of any length.

    Args:
        path: the file.
        module: what is called with the inputs in their order.
        given: the inputs by name.
        outputs: names of what it gives.
        about: written into the file's metadata.
    """
    _teach_logaddexp()
    data = io.BytesIO()
    try:
        # It warns of each Python value that it takes for constant, and prints the graph of what it
        # cannot express; what is wrong is found where the file is held against the module.
        with torch.no_grad(), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            torch.onnx.export(
                module,
                tuple(given.values()),
                data,  # type: ignore[arg-type]  # a file, which its hint leaves out
                input_names=list(given),
                output_names=list(outputs),
                dynamic_axes={key: {0: "batch"} for key in (*given, *outputs)},
                opset_version=OPSET,
                dynamo=False,
            )
    except Exception as error:  # whatever the network's code or the exporter raises
        operator = re.search(r"operator '(\S+)'", str(error))
        reason = f"operator {operator[1]} is not supported" if operator else one_line(error, 200)
        raise ConfigError(
            f"{path.stem}: cannot be exported to ONNX, opset {OPSET} ({reason})."
        ) from None
    if data.tell() > _MOST_BYTES:
        raise CheckpointError(f"{path.stem}: exceeds the 2 GB limit of an ONNX file.")
    onnx = hub.library("onnx")
    graph = onnx.load_model_from_string(data.getvalue())
    for node in graph.graph.node:
        if node.op_type == "Transpose":  # the exporter leaves the -1 of `movedim` as it is
            order = node.attribute[0].ints
            order[:] = [axis % len(order) for axis in order]
    onnx.helper.set_model_props(graph, {"karmma": json.dumps(about, sort_keys=True)})
    files.write_bytes(path, graph.SerializeToString())


def _teach_logaddexp() -> None:
    """Say ``logaddexp``, which late fusion averages probabilities with, in ONNX's operators."""

    def logaddexp(g: Any, a: Any, b: Any) -> Any:
        below = g.op("Neg", g.op("Abs", g.op("Sub", a, b)))
        one = g.op("Constant", value_t=torch.tensor(1.0))
        return g.op("Add", g.op("Max", a, b), g.op("Log", g.op("Add", one, g.op("Exp", below))))

    register_custom_op_symbolic("aten::logaddexp", logaddexp, OPSET)


def quantise(path: Path) -> bool:
    """Put the products with constant weights of a file into int8; tell whether it has any.

    Activations are scaled as they come (dynamic quantisation). Convolutions stay as they are: in
    int8 onnxruntime computes them on CPUs several times slower. Weights have 7 bits, so that sums
    do not overflow on CPUs without VNNI, where the same file would answer otherwise.
    """
    library = hub.library("onnxruntime.quantization")
    before = path.read_bytes()
    with _quiet_root(), files.replacing(path) as temporary:
        library.quantize_dynamic(
            path,
            temporary,
            op_types_to_quantize=["MatMul"],
            weight_type=library.QuantType.QInt8,
            per_channel=True,
            reduce_range=True,
        )
    if b"DynamicQuantizeLinear" in path.read_bytes():
        return True
    files.write_bytes(path, before)
    return False


@contextlib.contextmanager
def _quiet_root() -> Iterator[None]:
    """Let a library log nothing by way of the root logger, nor set that up."""
    root, disabled = logging.getLogger(), logging.root.manager.disable
    handlers = list(root.handlers)
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(disabled)
        root.handlers[:] = handlers
