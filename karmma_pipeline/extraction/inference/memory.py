"""How much memory a forward pass takes, and how much all of them may take together."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from karmma_pipeline.extraction.recipe import ExtractRecipe

_peaks = [0]
"""What Linux has been made to forget."""


@dataclass
class Growth:
    """Bytes that memory grew by at most; known when the measurement is over."""

    size: int = 0


def budget(device: torch.device, recipe: ExtractRecipe) -> float:
    """Return the bytes of a device that forward passes may take."""
    if recipe.memory_gb:
        return recipe.memory_gb * 1e9
    if device.type == "cuda":
        return 0.8 * torch.cuda.mem_get_info(device)[0]
    return 0.5 * psutil.virtual_memory().available


@contextmanager
def measured(device: torch.device) -> Iterator[Growth]:
    """Measure the highest memory of what is done inside, above what was there before."""
    growth = Growth()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield growth
        growth.size = torch.cuda.max_memory_allocated(device) - before
        return
    _peaks.append(_status("VmHWM"))
    with suppress(OSError):  # a container may forbid it; an older, higher peak is then taken
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak, see proc(5)
    before = _status("VmRSS")
    yield growth
    growth.size = _status("VmHWM") - before


def peak() -> int:
    """Return the most bytes that this process has had in memory, the program before it not."""
    return max(*_peaks, _status("VmHWM"))


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))
