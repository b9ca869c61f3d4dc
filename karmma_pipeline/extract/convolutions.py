"""Convolutions over time alone, put so that one CPU thread computes them fast.

With one thread PyTorch (`ConvParams::use_mkldnn`) takes oneDNN only if a kernel is larger than 1
in height or width; else an older code copies the input once per tap. In R(2+1)D such kernels do
a quarter of the arithmetic and then take more than half of the time.
B clips, C channels, T frames, h and w of a feature map.
"""

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def speed_up(net: nn.Module) -> int:
    """Let convolutions with kernels (k, 1, 1) be computed in two dimensions; return how many."""
    found = [m for m in net.modules() if type(m) is nn.Conv3d and _is_over_time(m)]
    for convolution in found:
        convolution.forward = partial(_over_time, convolution)  # type: ignore[method-assign]
    return len(found)


def _is_over_time(m: nn.Conv3d) -> bool:
    plain = m.padding_mode == "zeros" and not isinstance(m.padding, str)
    return (
        plain
        and m.kernel_size[0] > 1
        and m.kernel_size[1:] == (1, 1)
        and m.stride == (1, 1, 1)  # others go to oneDNN as they are
        and tuple(m.padding)[1:] == (0, 0)
    )


def _over_time(m: nn.Conv3d, x: Tensor) -> Tensor:
    """Convolve [B, C, T, h, w] as [B, C, T, h * w]: a view, whatever the layout."""
    padding, dilation = (int(m.padding[0]), 0), (m.dilation[0], 1)
    weight = m.weight.squeeze(-1)
    y = F.conv2d(x.flatten(3), weight, m.bias, (1, 1), padding, dilation, m.groups)
    return torch.unflatten(y, 3, x.shape[3:])
