"""Small networks that this project has trained on digits in motion, for the demo.

A teacher's and a student's for frames and for sound, and one for flow that both use: a larger one
knew no more. A recipe names one as ``karmma_pipeline.demo.networks:teacher_rgb``.
`karmma_pipeline.demo.train_networks` makes their weights, from clips with handwriting that no clip
of the demo shows.

B clips, T frames or 1, h and w the input, D width of the last stage.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from safetensors import safe_open
from torch import Tensor, nn

from karmma_pipeline.models.backbones import Architecture, FrameTransform
from karmma_pipeline.models.backbones.watched import Blocks

#: All weights, float16, each name after that of its network and a dot.
WEIGHTS = Path(__file__).with_name("networks.safetensors")

#: Their names, and the seed that each was trained with.
SEEDS = {"teacher_rgb": 0, "teacher_audio": 2, "student_rgb": 3, "flow": 4, "student_audio": 5}

_LARGE, _SMALL = (24, 48, 96), (12, 24, 48)
_FACTS = {"library": "karmma-pipeline", "licence": "MIT"}
_HEARD = {
    "sample_rate": 16_000, "n_fft": 1024, "win_length": 800, "hop_length": 160, "mels": 64,
    "mean": -30.0, "std": 15.0,
}  # fmt: skip


class ConvNet(nn.Module):
    """Convolutions in space, 16 times down, then one in time: [B, 3, T, h, w] to [B, D, T, ...].

    Args:
        widths: channels of the stages.
    """

    def __init__(self, widths: tuple[int, int, int]) -> None:
        super().__init__()
        first, second, last = widths
        self.stem = _stage(3, first, kernel=(1, 5, 5), stride=4)
        self.down = nn.Sequential(_stage(first, second, stride=2), _stage(second, last, stride=2))
        self.space = _stage(last, last)
        self.time = _stage(last, last, kernel=(3, 1, 1))

    def in_space(self, x: Tensor) -> Tensor:
        """Return the map of each frame; what lies at the picture's border is seen like the rest."""
        of_space: Tensor = self.space(self.down(self.stem(x if x.dim() == 5 else x.unsqueeze(2))))
        return of_space

    def in_time(self, of_space: Tensor) -> Tensor:
        """Return the feature map of the frames together."""
        of_time: Tensor = of_space + self.time(of_space)
        return of_time


def _stage(
    before: int, after: int, kernel: tuple[int, int, int] = (1, 3, 3), stride: int = 1
) -> nn.Sequential:
    t, h, w = (side // 2 for side in kernel)
    return nn.Sequential(
        nn.Conv3d(before, after, kernel, (1, stride, stride), (t, h, w), bias=False),
        nn.BatchNorm3d(after),
        nn.ReLU(),
    )


def _pretrained(name: str, build: Callable[[], ConvNet]) -> ConvNet:
    net = build()
    with safe_open(WEIGHTS, "pt") as file:
        own = [key for key in file.keys() if key.startswith(f"{name}.")]  # noqa: SIM118
        net.load_state_dict({key.removeprefix(f"{name}."): file.get_tensor(key) for key in own})
    return net


_BLOCKS = Blocks(
    ConvNet.in_space,
    lambda net, of_space, x: net.in_time(of_space),
    behind=("time",),
    names=("down", "space"),
)


def _network(name: str, widths: tuple[int, int, int], view: FrameTransform | None) -> Architecture:
    return Architecture(
        kind="image" if view is None else "video",
        build=lambda weights=None: ConvNet(widths),
        weights=None,
        feature_map=_BLOCKS,
        heads=(),
        frames=4,
        transform=view,
        audio=_HEARD if view is None else None,
        pretrained=partial(_pretrained, name, partial(ConvNet, widths)),
        facts=_FACTS,
    )


def _view(side: int, mean: float, std: float) -> FrameTransform:
    return FrameTransform(resize=(side,), crop=(side, side), mean=(mean,) * 3, std=(std,) * 3)


def teacher_rgb() -> Architecture:
    """Return the teacher's network for frames."""
    return _network("teacher_rgb", _LARGE, _view(96, 0.3, 0.2))


def student_rgb() -> Architecture:
    """Return the student's network for frames."""
    return _network("student_rgb", _SMALL, _view(64, 0.3, 0.2))


def flow() -> Architecture:
    """Return the network for flow."""
    return _network("flow", _SMALL, _view(64, 0.5, 0.15))


def teacher_audio() -> Architecture:
    """Return the teacher's network for spectrograms."""
    return _network("teacher_audio", _LARGE, None)


def student_audio() -> Architecture:
    """Return the student's network for spectrograms."""
    return _network("student_audio", _SMALL, None)
