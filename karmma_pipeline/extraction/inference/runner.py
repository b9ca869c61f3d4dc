"""Runs a frozen backbone on a device with fixed compute settings."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import pairwise
from typing import Any, Literal

import torch
from pydantic import AliasChoices, Field, PositiveInt
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from karmma_pipeline.config import Recipe
from karmma_pipeline.errors import ConfigError, KarmmaError
from karmma_pipeline.extraction.inference import openvino_engine
from karmma_pipeline.extraction.inference.openvino_engine import OpenVino
from karmma_pipeline.extraction.inference.recent import Recent, digest
from karmma_pipeline.models.backbones import Backbone
from karmma_pipeline.models.backbones.choice import INPUT
from karmma_pipeline.models.backbones.layers import Parts
from karmma_pipeline.models.backbones.onnx_networks import OnnxNet

Precision = Literal["float32", "tf32", "bfloat16"]
MemoryFormat = Literal["contiguous", "channels_last"]

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
_PLAIN = torch.contiguous_format
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


class ComputeConfig(Recipe):
    """How a network computes; results differ in the last bits between configurations.

    Stores record it; the memory format is called ``layout`` there.
    """

    precision: Precision = Field(
        "float32", description="Precision of convolutions and matrix products."
    )
    memory_format: MemoryFormat = Field(
        "contiguous",
        validation_alias=AliasChoices("memory_format", "layout"),
        serialization_alias="layout",
        description="Memory format of weights and activations.",
    )
    compile: bool = Field(False, description="Whether torch.compile is used.")
    batch_size: PositiveInt = Field(1, description="Clips per forward pass.")
    chosen: str = Field("by the recipe", description="How these were chosen, and on which device.")

    def __str__(self) -> str:
        compiled = ", compiled" if self.compile else ""
        form = f"{self.precision}, {self.memory_format}{compiled}"
        return f"{form}, batch {self.batch_size} ({self.chosen})"


class _LargestOperation(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every operation of a pass, attention's own too, which no hook of a module sees.

    bytes: most that one of them reads and writes, parameters not counted.
    """

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
        sizes = (x.nbytes for x in tensors if not isinstance(x, nn.Parameter))
        self.bytes = max(self.bytes, sum(sizes))
        return out


class Network:
    """A backbone in one configuration; B clips in a batch, N tokens, D width.

    Attributes:
        openvino: the engine, where the choice names it; None: torch.
        halved: how often a batch was too big for the memory and was halved.
    """

    def __init__(self, backbone: Backbone, device: torch.device, config: ComputeConfig) -> None:
        self.openvino: OpenVino | None = None
        if backbone.choice.engine == "openvino":
            openvino_engine.check(backbone.choice, device)
            self.openvino = OpenVino(backbone)
        self.backbone, self.device = backbone.to(device), device
        self.halved = 0
        if self.openvino is None:
            self._ready_for_torch()
        self._clip_bytes = 0
        self.use(config)

    def _ready_for_torch(self) -> None:
        if type(self.backbone.net).__module__.startswith("torchvision."):
            fold_norms(self.backbone.net)  # custom networks may look at what lies between
        if self.device.type == "cpu":
            use_onednn(self.backbone)

    def use(self, config: ComputeConfig) -> None:
        """Change how it computes."""
        self.config, self._max_batch = config, config.batch_size
        # Weights and input in one format: where they differ, oneDNN and cuDNN reorder one of them
        # in every layer. The parameters stay the same objects, since modules, and the bound
        # methods of `use_onednn`, hold them.
        for parameter in self.backbone.parameters():
            wanted = self._format(parameter.dim())
            parameter.data = parameter.data.contiguous(memory_format=wanted)
        compiled = torch.compile(self.backbone) if config.compile else self.backbone
        self._call = self.openvino or compiled

    def serve(self, passes: int, threads: int) -> None:
        """Let an engine get ready for so many batches at once, and so many threads of each."""
        if self.openvino is not None:
            self.openvino.serve(passes, threads)
        elif isinstance(self.backbone.net, OnnxNet):
            self.backbone.net.session.serve(threads)

    def _format(self, dimensions: int) -> torch.memory_format:
        last = self.config.memory_format == "channels_last"
        return _CHANNELS_LAST.get(dimensions, _PLAIN) if last else _PLAIN

    def tokens(self, clips: Tensor) -> Tensor:
        """Turn decoded clips [B, ...], wherever they lie, into float32 tokens [B, N, D].

        A network that is cut at its input gives the clips as they are, in rows. A batch that does
        not fit into memory is halved until it does; none is lost.

        Raises:
            KarmmaError: not even one clip fits.
            ConfigError: torch.compile does not work here.
        """
        return torch.cat([self._fitting(some) for some in torch.split(clips, self._max_batch)])

    @property
    def by_frame(self) -> bool:
        """Whether frames go through by themselves, so that `tokens_by_frame` can be used."""
        choice = self.backbone.choice
        by_torch = self.openvino is None and not self.config.compile and choice.cut != INPUT
        alone = by_torch and choice.architecture.by_frame
        return alone and choice.raw_grid[0] == choice.frame_count

    def tokens_by_frame(self, clips: Tensor, recent: Recent) -> Tensor:
        """Return what `tokens` returns, computing only frames that were not seen lately.

        On a CPU the tokens of a frame do not depend on which others are computed, in no bit. On a
        GPU, where a pass of its own for each would be slow, they do in the last ones.
        """

        def parts(clip: Tensor) -> list[Parts]:
            keys = [(id(self), digest(frame)) for frame in clip.cpu().numpy()]
            return recent.of(keys, lambda places: self._parts_of_frames(clip[places]))

        with torch.inference_mode(), _products(self.device, self.config.precision):
            return torch.cat([self.backbone.tokens(parts(clip)) for clip in clips]).float()

    def _parts_of_frames(self, frames: Tensor) -> list[Parts]:
        """Return what is made of each of some frames."""
        together = 1 if self.device.type == "cpu" else len(frames)
        passes = [self.backbone.parts(self._prepared(some))
                  for some in torch.split(frames[:, None], together)]  # fmt: skip
        # Copies: a part of a pass would keep the rest of it in memory.
        return [
            Parts(maps[i : i + 1].clone(), None if extra is None else extra[i : i + 1].clone())
            for maps, extra in passes
            for i in range(len(maps))
        ]

    def clip_bytes(self, clip: Tensor) -> int:
        """Return about the memory that one clip [1, ...] takes in a pass, weights not counted.

        Worked out from the sizes of what the operations read and write, not measured: what a
        process takes depends on its allocator and on what ran before, and this number decides
        which clips are computed together.
        """
        if not self._clip_bytes:
            call, self._call = self._call, self.backbone  # compiled code hides its steps
            # OpenVINO's module is exported with fake tensors, so it has a pass without computing,
            # too. oneDNN's packed weights have none.
            fake = FakeTensorMode(allow_non_fake_inputs=True) if self.openvino else nullcontext()
            with fake, _LargestOperation() as largest:  # type: ignore[no-untyped-call]
                self.tokens(clip)
            self._call = call
            self._clip_bytes = 2 * largest.bytes  # a residual beside it, and a library's scratch
        return self._clip_bytes

    def _fitting(self, clips: Tensor) -> Tensor:
        try:
            return self._forward(clips)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        # Outside of the handler: the error's traceback holds the tensors that filled the memory.
        if len(clips) == 1:
            raise KarmmaError(
                f"{self.backbone.choice.name}: a single clip does not fit into the memory of "
                f"{self.device}; use another device, fewer frames or a smaller size."
            )
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.halved += 1
        self._max_batch = min(self._max_batch, (len(clips) + 1) // 2)
        return torch.cat(
            [self._fitting(half) for half in torch.split(clips, (len(clips) + 1) // 2)]
        )

    def _forward(self, clips: Tensor) -> Tensor:
        if self.backbone.choice.cut == INPUT:
            return clips.flatten(2)
        with torch.inference_mode(), _products(self.device, self.config.precision):
            try:
                tokens: Tensor = self._call(self._prepared(clips))
            except torch._dynamo.exc.TorchDynamoException as error:
                reason = str(error).strip().splitlines()[0]
                raise ConfigError(
                    f"compile=true: torch.compile failed for {self.backbone.choice.name} "
                    f"({reason}); set compile: false."
                ) from error
            return tokens.float()

    def _prepared(self, clips: Tensor) -> Tensor:
        x = self.backbone.prepare(clips.to(self.device, non_blocking=True))
        return x.contiguous(memory_format=self._format(x.dim()))


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error of torch means that memory is full, on a GPU or a CPU."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(
        words in str(error) for words in _OUT_OF_MEMORY
    )


@contextmanager
def _products(device: torch.device, precision: Precision) -> Iterator[None]:
    """Compute convolutions and products in a precision; float32 on a GPU means float32."""
    switches: list[Any] = []
    if device.type == "cuda":
        switches = [torch.backends.cuda.matmul, torch.backends.cudnn.conv]  # type: ignore[attr-defined]
    before = [switch.fp32_precision for switch in switches]
    for switch in switches:
        switch.fp32_precision = "tf32" if precision == "tf32" else "ieee"
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.fp32_precision = value


_PAIRS = {(nn.Conv2d, nn.BatchNorm2d), (nn.Conv3d, nn.BatchNorm3d)}


def use_onednn(net: nn.Module) -> int:
    """Let oneDNN compute all 3D convolutions that it can; return how many.

    PyTorch itself asks oneDNN only if there is more than one thread, and passes here have one
    each: without this a 3D convolution goes to slower code of PyTorch's own.
    """
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return 0
    count = 0
    for m in net.modules():
        # Padding by name or by copies of the edge is done outside of the convolution proper.
        if type(m) is nn.Conv3d and m.padding_mode == "zeros" and not isinstance(m.padding, str):
            m.forward = partial(_by_onednn, m, m.padding)  # type: ignore[method-assign]
            count += 1
    return count


def _by_onednn(m: nn.Conv3d, padding: tuple[int, ...], x: Tensor) -> Tensor:
    """Convolve [B, C, T, h, w]; bfloat16 and compiled code find oneDNN by themselves."""
    plain = x.dim() == 5 and x.dtype == m.weight.dtype == torch.float32
    if not plain or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
        return nn.Conv3d.forward(m, x)
    return torch.mkldnn_convolution(x, m.weight, m.bias, padding, m.stride, m.dilation, m.groups)


def fold_norms(net: nn.Module) -> int:
    """Multiply the batch norms of a frozen network into its convolutions; return how many.

    A norm that no longer learns is a scale and a shift per channel, as the weights and the bias
    of the convolution before it are: one pass over the activations less.

    Only where a norm follows its convolution in an `nn.Sequential`, and only if nothing else
    has a hold of the two. To be called before `use_onednn`: convolutions are replaced.
    """
    uses = Counter(child for m in net.modules() for child in m._modules.values() if child)
    count = 0
    for block in net.modules():
        if not isinstance(block, nn.Sequential) or type(block).forward is not nn.Sequential.forward:
            continue
        for (place, one), (behind, norm) in pairwise(block._modules.items()):
            if one and norm and _folds(one, norm) and uses[one] == uses[norm] == 1:
                block._modules[place] = fuse_conv_bn_eval(one, norm)  # type: ignore[type-var, arg-type]
                block._modules[behind] = nn.Identity()
                count += 1
    return count


def _folds(one: nn.Module, norm: nn.Module) -> bool:
    watched = any(m._forward_hooks or m._forward_pre_hooks for m in (one, norm))
    usable = not (watched or norm.training or getattr(norm, "running_mean", None) is None)
    return (type(one), type(norm)) in _PAIRS and usable
