"""Convolutions that one CPU thread computes fast, with the norms after them folded in.

With one thread, or for a single small clip, PyTorch (`ConvParams::use_mkldnn`) does not give
(k, 1, 1) and (1, 1, 1) kernels, and some others, to oneDNN. The older code that it takes copies
the input once per tap and loses the memory layout, which makes the pooling behind it slow, too:
together more than half of the time of S3D and R(2+1)D.
"""

from collections import Counter
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

_PAIRS = {(nn.Conv2d, nn.BatchNorm2d), (nn.Conv3d, nn.BatchNorm3d)}


def speed_up(net: nn.Module) -> int:
    """Let oneDNN compute all 3D convolutions that it can; return how many."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return 0
    found = 0
    for m in net.modules():
        if type(m) is nn.Conv3d and m.padding_mode == "zeros" and not isinstance(m.padding, str):
            m.forward = partial(_by_onednn, m, m.padding)  # type: ignore[method-assign]
            found += 1
    return found


def _by_onednn(m: nn.Conv3d, padding: tuple[int, ...], x: Tensor) -> Tensor:
    """Convolve [B, C, T, h, w]; bfloat16 and compiled code find oneDNN by themselves."""
    plain = x.dim() == 5 and x.dtype == m.weight.dtype == torch.float32
    if not plain or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
        return nn.Conv3d.forward(m, x)
    return torch.mkldnn_convolution(x, m.weight, m.bias, padding, m.stride, m.dilation, m.groups)


def fold_norms(net: nn.Module) -> int:
    """Multiply the batch norms of a frozen network into its convolutions; return how many.

    Only where a norm follows its convolution in an `nn.Sequential`, and only if nothing else
    has a hold of the two. To be called before `speed_up`: convolutions are replaced.
    """
    uses = Counter(child for m in net.modules() for child in m._modules.values() if child)
    found = 0
    for block in net.modules():
        if not isinstance(block, nn.Sequential) or type(block).forward is not nn.Sequential.forward:
            continue
        for (place, one), (behind, norm) in pairwise(block._modules.items()):
            if one and norm and _folds(one, norm) and uses[one] == uses[norm] == 1:
                block._modules[place] = fuse_conv_bn_eval(one, norm)  # type: ignore[type-var, arg-type]
                block._modules[behind] = nn.Identity()
                found += 1
    return found


def _folds(one: nn.Module, norm: nn.Module) -> bool:
    watched = any(m._forward_hooks or m._forward_pre_hooks for m in (one, norm))
    usable = not (watched or norm.training or getattr(norm, "running_mean", None) is None)
    return (type(one), type(norm)) in _PAIRS and usable
