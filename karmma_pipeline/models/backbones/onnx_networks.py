"""Networks as ONNX files, computed by onnxruntime on a CPU: those of an exported model; an extra.

A file is read once, its digest is compared, and onnxruntime gets the bytes, never the path: what
was changed on the way is refused, and a file cannot name other files. Each clip goes through
alone, so that its tokens do not depend on the other clips of a batch.

B clips in a batch, N tokens of a clip, D width.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from karmma_pipeline.errors import CheckpointError, one_line
from karmma_pipeline.models.backbones import hub
from karmma_pipeline.models.backbones.choice import BackboneChoice
from karmma_pipeline.models.backbones.registry import Architecture, FrameTransform, Kind

#: Names of a backbone's input and output in its file.
INPUT, TOKENS = "input", "tokens"


@dataclass(frozen=True)
class OnnxFile:
    """A graph on disk, known by its digest."""

    path: Path
    sha256: str

    def read(self) -> bytes:
        """Return its bytes.

        Raises:
            CheckpointError: it is not there, or is another file than the one that was written.
        """
        try:
            data = self.path.read_bytes()
        except OSError as error:
            raise CheckpointError(
                f"{self.path}: cannot be read ({error.strerror}); copy the whole folder again."
            ) from None
        if hashlib.sha256(data).hexdigest() != self.sha256:
            raise CheckpointError(
                f"{self.path}: changed or damaged: its checksum differs from the recorded one; "
                "copy the folder or export again."
            )
        return data


class OnnxSession:
    """A graph in onnxruntime, loaded when it is first needed; threads may share it."""

    def __init__(self, file: OnnxFile) -> None:
        self.file = file
        self._session: Any = None
        self._threads = 0
        self._loading = threading.Lock()

    def serve(self, threads: int = 1) -> None:
        """Get ready for calls of so many threads each; one is the thread that calls.

        Raises:
            ConfigError: onnxruntime is not installed.
            CheckpointError: the file is missing, changed, or no graph.
        """
        with self._loading:
            if threads != self._threads:
                self._session = None  # its memory is free before that of the next is taken
                self._session = _session(self.file, threads)
                self._threads = threads

    def __call__(self, inputs: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        """Return the outputs by name; what the graph has no use for is left out of the inputs.

        Raises:
            CheckpointError: the graph cannot be computed for them.
        """
        if self._session is None:
            self.serve()
        names = [output.name for output in self._session.get_outputs()]
        used = {one.name: inputs[one.name] for one in self._session.get_inputs()}
        try:
            return dict(zip(names, self._session.run(names, used), strict=True))
        except Exception as error:  # of its own classes, which derive from Exception alone
            reason = one_line(error, 300)
            raise CheckpointError(f"{self.file.path}: inference failed ({reason}).") from None


def _session(file: OnnxFile, threads: int) -> Any:
    library: Any = hub.library("onnxruntime")
    options = library.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3  # errors; it warns of graphs that are merely unusual
    # Threads that spin between passes would take the CPUs from decoding.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    data = file.read()
    try:
        return library.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # of its own classes, which derive from Exception alone
        reason = one_line(error, 300)
        raise CheckpointError(
            f"{file.path}: onnxruntime {library.__version__} cannot load it ({reason}); update it, "
            "or copy the whole folder again."
        ) from None


class OnnxNet(nn.Module):
    """A graph in place of a network; without parameters of its own.

    Args:
        file: takes `INPUT` and gives `TOKENS`, any number of rows.
        shape: tokens and width of a row.
        rows: that go through at once: those of one clip.
    """

    def __init__(self, file: OnnxFile, shape: tuple[int, int], rows: int = 1) -> None:
        super().__init__()
        self.shape, self.rows, self.session = shape, rows, OnnxSession(file)

    def forward(self, x: Tensor) -> Tensor:
        """Turn inputs [rows, ...] into tokens [rows, N, D]; on the meta device nothing is run."""
        if x.is_meta:
            return x.new_empty(x.shape[0], *self.shape)
        parts = [self.session({INPUT: some.contiguous().numpy()})[TOKENS]
                 for some in torch.split(x, self.rows)]  # fmt: skip
        return torch.from_numpy(np.concatenate(parts))


@dataclass(frozen=True)
class _Build:
    """Makes the network of a file; equal ones are known as such, unlike closures."""

    file: OnnxFile
    shape: tuple[int, int]
    rows: int

    def __call__(self, weights: None = None) -> OnnxNet:
        return OnnxNet(self.file, self.shape, self.rows)


def _map(net: nn.Module, x: Tensor) -> Tensor:
    return net(x).transpose(1, 2)[..., None, None]


def _of_windows(net: nn.Module, x: Tensor) -> Tensor:
    return net(x)


class OnnxChoice(BackboneChoice):
    """A backbone whose network is an ONNX file, and that is fed as the file's writer says.

    It needs neither the library nor the code that the network came from. Its ``name`` and
    ``facts`` are those of that network.
    """

    file: Path
    sha256: str
    kind: Kind
    row_shape: tuple[int, int]
    view: FrameTransform | None = None
    facts: dict[str, Any]

    @property
    def architecture(self) -> Architecture:
        """The file as a network that ends with its tokens."""
        rows = self.series[0] if self.series is not None else 1
        build = _Build(OnnxFile(self.file, self.sha256), self.row_shape, rows)
        return Architecture(
            kind=self.kind,
            build=build,
            weights=None,
            feature_map=_of_windows if self.kind == "series" else _map,
            heads=(),
            transform=self.view,
            pretrained=build,
            facts=self.facts,
        )
