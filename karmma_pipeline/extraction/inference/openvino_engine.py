"""OpenVINO as the engine of a backbone: the same module, converted, one clip at a time on a CPU.

The module is exported by torch and converted by OpenVINO itself. Conversion takes up to half a
minute, so that what it gives is kept, under a digest of the exported graph, its weights, the
input's shape and the versions of both libraries: a network whose code, layer or pooling has changed
never meets the conversion of another. Each clip goes through alone, so that its tokens depend
neither on the other clips of a batch nor on how many batches run at once.
"""

import hashlib
import logging
import os
import re
import sys
import tempfile
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from karmma_pipeline import files
from karmma_pipeline.errors import ConfigError, KarmmaError
from karmma_pipeline.models.backbones import Backbone, BackboneChoice, state_dicts

_logger = logging.getLogger(__name__)

# How far the tokens of noise may be from those of torch, of their norm; rounding is 1e-6 to 1e-5.
_TOLERANCE = 1e-3

_OPERATIONS = re.compile(r"No conversion rule found for operations: (.+)")


def is_installed() -> bool:
    """Tell whether the library is there."""
    return find_spec("openvino") is not None


def name_and_version() -> str:
    """Return what a store records of the engine."""
    return f"openvino {version('openvino')}"


def check(choice: BackboneChoice, device: torch.device) -> None:
    """See that a backbone's engine can work here.

    Raises:
        ConfigError: the library is missing, or the device is no CPU.
    """
    if not is_installed():
        raise ConfigError(
            f"{choice.name}: engine openvino is not installed; pip install "
            "'karmma-pipeline[openvino]', or set engine: torch."
        )
    if device.type != "cpu":
        raise ConfigError(
            f"{choice.name}: engine openvino runs on CPUs only, but the device is {device}; set "
            "device: cpu or engine: torch."
        )


class OpenVino:
    """A backbone, converted and compiled when it is first called; B clips, N tokens, D width."""

    def __init__(self, backbone: Backbone) -> None:
        self._backbone = backbone
        self._model: Any = None
        self._compiled: Any = None
        # Requests that no call uses now. A new one takes memory for all activations: two threads
        # that do so for every clip wait for one another in the kernel, a sixth of the time.
        self._free: list[Any] = []
        self._served = (0, 0)

    def convert(self) -> None:
        """Convert the network, or read what was kept of an earlier time.

        Raises:
            ConfigError: it cannot be converted; the message says what it lacks.
        """
        self._model = self._model or _converted(self._backbone)

    def serve(self, passes: int, threads: int = 1) -> None:
        """Get ready for so many calls at once.

        Args:
            passes: calls at once.
            threads: of each; one is the thread that calls. How many changes the last bits.

        Raises:
            ConfigError: as of `convert`.
        """
        if (passes, threads) != self._served:
            self.convert()
            self._compiled = None  # its memory is free before that of the next is taken
            self._free = []
            name = self._backbone.choice.name
            self._compiled = _compiled(self._model, name, passes, passes * threads)
            self._served = passes, threads

    def __call__(self, x: Tensor) -> Tensor:
        """Turn inputs [B, ...], float32 and contiguous, into tokens [B, N, D]."""
        if self._compiled is None:
            self.serve(1)
        try:
            request = self._free.pop()
        except IndexError:
            request = self._compiled.create_infer_request()
        tokens = torch.stack([_pass(request, clip) for clip in torch.split(x, 1)])
        self._free.append(request)  # not after an error, whatever state that left it in
        return tokens


def _pass(request: Any, clip: Tensor) -> Tensor:
    (tokens,) = request.infer([clip.numpy()], share_inputs=True).values()
    return torch.from_numpy(tokens[0])


@cache
def _library() -> Any:
    # It would report its import and every conversion to its maker, over the network. It does
    # without this package where there is none.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    return openvino


@cache
def _core() -> Any:
    return _library().Core()


def _compiled(model: Any, name: str, streams: int = 1, threads: int = 1) -> Any:
    # A stream is what one call at a time computes in. Two streams with two threads have one each,
    # and that is the calling one; it is not tied to a CPU, which other processes would share.
    settings = {
        "NUM_STREAMS": streams,
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",
        "ENABLE_CPU_PINNING": False,
        "ENABLE_HYPER_THREADING": True,
    }
    try:
        return _core().compile_model(model, "CPU", settings)
    except RuntimeError as error:
        raise _refusal(name, error) from error


def _refusal(name: str, error: BaseException) -> ConfigError:
    """Say which operations OpenVINO lacks, or else what it or torch.export says."""
    text = str(error).strip()
    lacking = _OPERATIONS.search(text)
    reason = (
        f"no conversion rule for {lacking[1]}"
        if lacking
        else (text.splitlines() or [repr(error)])[0][:200]
    )
    return ConfigError(
        f"{name}: engine openvino does not support this network ({reason}); set engine: torch."
    )


def _converted(backbone: Backbone) -> Any:
    """Return a backbone as OpenVINO's model, kept since an earlier time or converted now."""
    name = backbone.choice.name
    try:
        with torch.no_grad():
            x = torch.randn(
                (1, *backbone.choice.input_shape), generator=torch.Generator().manual_seed(0)
            )
            program = torch.export.export(backbone, (x,), strict=False)
    except Exception as error:  # torch.export raises whatever the network's code provokes
        raise _refusal(name, error) from error
    kept = folder() / f"{_digest(program, x)}.safetensors"
    if (read := _read(kept)) is not None:
        return read
    _logger.info("converting %s for openvino, once; it is cached in %s", name, kept.parent)
    packed = _packed(_convert(program, name))
    # Kept or not, it is what was written and read that computes, or the first run might differ
    # from the others in a last bit.
    model = _unpacked(packed)
    _compare(model, backbone, x)
    try:
        _keep(kept, packed)
    except (KarmmaError, OSError) as error:
        _logger.warning("%s: will be converted again at the next start, because %s", name, error)
    return model


def folder() -> Path:
    """Return where converted networks are kept; what lies there may be deleted at any time."""
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(caches) / "karmma-pipeline" / "openvino"


def _digest(program: torch.export.ExportedProgram, x: Tensor) -> str:
    """Return what tells conversions apart."""
    constants = {k: v for k, v in program.constants.items() if isinstance(v, Tensor)}
    parts = (
        str(program.graph),
        str(program.graph_signature),
        str(tuple(x.shape)),
        state_dicts.digest(program.state_dict),
        state_dicts.digest(constants),
        torch.__version__,
        name_and_version(),
    )
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _convert(program: torch.export.ExportedProgram, name: str) -> Any:
    """Convert an exported module with OpenVINO's own front end.

    As `openvino.convert_model` does it, which adds messages to the root logger and makes sizes
    that are fixed unknown.
    """
    _library()
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.fx_decoder import TorchFXPythonDecoder
    from openvino.frontend.pytorch.torchdynamo.export_decompositions import ops_to_not_decompose
    from torch.export.decomp_utils import CustomDecompTable

    table: Any = CustomDecompTable()  # type: ignore[no-untyped-call]
    for operation in ops_to_not_decompose():  # these it has rules for, which are faster
        with suppress(KeyError):
            table.pop(operation)
    try:
        with torch.no_grad():
            module = program.run_decompositions(table).module()
        frontend = FrontEndManager().load_by_framework("pytorch")
        decoder = TorchFXPythonDecoder(module, dynamic_shapes=False)
        return frontend.convert(frontend.load(decoder))
    except Exception as error:  # of its own classes, and of torch's
        raise _refusal(name, error) from error


def _packed(model: Any) -> dict[str, Tensor]:
    """Return a model as bytes: its graph (.xml) and its weights (.bin) as OpenVINO writes them."""
    with tempfile.TemporaryDirectory(prefix="karmma-openvino-") as name:
        graph, weights = Path(name) / "model.xml", Path(name) / "model.bin"
        _library().serialize(model, graph, weights)
        return {
            path.suffix[1:]: torch.from_numpy(np.fromfile(path, np.uint8))
            for path in (graph, weights)
        }


def _unpacked(packed: dict[str, Tensor]) -> Any:
    weights = _library().Tensor(packed["bin"].numpy(), shared_memory=False)
    return _core().read_model(packed["xml"].numpy().tobytes(), weights)


def _keep(path: Path, packed: dict[str, Tensor]) -> None:
    with files.replacing(path) as temporary:
        files.sweep([path.parent])
        save_file(packed, temporary, {"sha256": state_dicts.digest(packed)})


def _read(path: Path) -> Any:
    """Return a model that was kept; None if there is none, or it is damaged."""
    try:
        with safe_open(path, "pt") as file:
            packed = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            if file.metadata()["sha256"] == state_dicts.digest(packed):
                return _unpacked(packed)
    except (SafetensorError, OSError, KeyError, TypeError):
        pass
    return None


def _compare(model: Any, backbone: Backbone, x: Tensor) -> None:
    """See that a conversion computes what the module does, before it is kept.

    Raises:
        ConfigError: it does not.
    """
    name = backbone.choice.name
    found = _pass(_compiled(model, name).create_infer_request(), x)
    with torch.inference_mode():
        wanted = backbone(x)[0].float()
    if found.shape != wanted.shape or not (found - wanted).norm() <= _TOLERANCE * wanted.norm():
        raise ConfigError(
            f"{name}: the tokens of engine openvino differ from torch's; set engine: torch."
        )
