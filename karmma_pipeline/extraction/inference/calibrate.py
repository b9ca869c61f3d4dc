"""Finds out how a network computes fastest on a device without leaving plain float32.

Timed on one synthetic batch, on a CPU in the seconds of the one thread that computes it, so that
other work on the machine does not decide. B clips in a batch, T frames, h and w the input's size.
"""

import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from karmma_pipeline import jobs
from karmma_pipeline.errors import KarmmaError
from karmma_pipeline.extraction.inference import memory
from karmma_pipeline.extraction.inference.runner import Mode, Network, Precision
from karmma_pipeline.extraction.recipe import ExtractRecipe
from karmma_pipeline.extraction.types import InputSpec

COSINE = 0.999
"""What every token must keep to its float32 self."""

GAIN = 0.95
"""A choice must take less than this share of the time: clocks are not exact."""

_KEYS = ("precision", "layout", "batch_size")
_MOST = {"cpu": 16, "cuda": 128}
_PROBE = {"cpu": 1, "cuda": 4}
_REPEATS, _ENOUGH_S = 3, 0.5
"""A pass is timed so often more, on a CPU until that many seconds have gone into it."""

_PATIENCE_S = 0.25
"""Where a clip takes longer on a CPU, larger batches are not tried: they gain nothing."""


@dataclass(frozen=True)
class Trial:
    """One mode on one batch: its tokens, seconds per clip, and how far it is from float32."""

    mode: Mode
    tokens: Tensor
    seconds: float
    cosine: float = 1.0
    error: float = 0.0


def example(spec: InputSpec, count: int) -> Tensor:
    """Return decoded clips that are like real ones: large shapes that move, and some grain."""
    generator = torch.Generator().manual_seed(0)
    h, w = spec.image
    frames = spec.frames if spec.per_frame else 1
    shapes = torch.randn(count, 3, max(2, frames // 4), 7, 7, generator=generator)
    video = F.interpolate(shapes, (frames, h, w), mode="trilinear")
    video += 0.1 * torch.randn(video.shape, generator=generator)
    if spec.transform is None:  # log-mel, already standardised
        images = video[:, 0]
        return images if spec.per_frame else images[:, 0]
    return (video * 50 + 120).clamp(0, 255).to(torch.uint8).transpose(1, 2).contiguous()


def precisions(device: torch.device) -> tuple[Precision, ...]:
    """Return what a device may be fast at besides float32."""
    if device.type == "cuda":
        has_bf16 = torch.cuda.get_device_capability(device) >= (8, 0)
        return ("tf32", "bfloat16") if has_bf16 else ()
    able = torch.cpu.get_capabilities()
    return ("bfloat16",) if able.get("avx512_bf16") or able.get("amx_bf16") else ()


def device_name(device: torch.device) -> str:
    """Return what a person calls the device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return str(torch.cpu.get_capabilities().get("cpu_name") or platform.machine())


def measure(network: Network, mode: Mode, clips: Tensor, plain: Tensor | None) -> Trial:
    """Run a mode over clips; ``plain``: their float32 tokens [B, N, D], None for themselves."""
    network.use(mode.model_copy(update={"batch_size": len(clips)}))
    tokens, seconds = _timed(network, clips)
    if plain is None:
        return Trial(mode, tokens, seconds / len(clips))
    error = (tokens - plain).abs().max().item()
    return Trial(mode, tokens, seconds / len(clips), least_cosine(tokens, plain), error)


def least_cosine(tokens: Tensor, plain: Tensor) -> float:
    """Return the smallest cosine of a token to its float32 self; those near zero have no direction.

    Both [B, N, D].
    """
    norms = plain.double().norm(dim=-1)
    cosines = F.cosine_similarity(tokens.double(), plain.double(), dim=-1)
    return cosines[norms > 0.01 * norms.mean()].min().item()


def _timed(network: Network, clips: Tensor) -> tuple[Tensor, float]:
    """Return the shortest of a few passes: others can only make one longer."""
    tokens, seconds = _once(network, clips)
    spent, most = seconds, _ENOUGH_S if network.device.type == "cpu" else float("inf")
    for _ in range(_REPEATS):
        if spent > most and not network.mode.compile:
            break
        again = _once(network, clips)[1]
        seconds, spent = min(seconds, again), spent + again
    return tokens, seconds


def _once(network: Network, clips: Tensor) -> tuple[Tensor, float]:
    """Run a pass; on a CPU, where it has one thread, the work of others is not counted."""
    clock = time.thread_time if network.device.type == "cpu" else time.perf_counter
    started = clock()
    tokens = network.tokens(clips).cpu()  # the copy waits for a GPU
    return tokens, clock() - started


def calibrate(network: Network, spec: InputSpec, recipe: ExtractRecipe) -> Mode:
    """Return the fastest mode that the recipe and the accuracy allow; nothing fixed is tried.

    Args:
        network: in any mode; it is left in the one that is returned.
        spec: what its input looks like.
        recipe: its keys that are not auto are taken as they are.
    """
    mode = Mode(**fixed(recipe), chosen=f"by calibration on {device_name(network.device)}")
    open_keys = auto(recipe)
    best = _fastest(network, spec, mode, open_keys)
    mode = best.mode
    if "batch_size" in open_keys:
        size = _batch(network, spec, best, recipe)
        mode = mode.model_copy(update={"batch_size": size})
    network.use(mode)
    return mode


def fixed(recipe: ExtractRecipe) -> dict[str, Any]:
    """Return the keys of a mode that a recipe states."""
    stated = {key: getattr(recipe, key) for key in _KEYS}
    return {"compile": recipe.compile, **{k: v for k, v in stated.items() if v != "auto"}}


def auto(recipe: ExtractRecipe) -> set[str]:
    """Return the keys of a mode that a recipe leaves to a calibration."""
    return {key for key in _KEYS if getattr(recipe, key) == "auto"}


def _fastest(network: Network, spec: InputSpec, mode: Mode, open_keys: set[str]) -> Trial:
    """Try the other layout, then the other precisions in the layout that won."""
    clips = example(spec, _PROBE[network.device.type])
    network.use(mode.model_copy(update={"batch_size": len(clips)}))
    network.tokens(clips)  # what only a first pass pays is not timed
    clips = clips[: max(1, len(clips) >> network.halved)]
    best = measure(network, mode, clips, None)
    plain = best.tokens
    for changed in _others(network.device, open_keys):
        trial = measure(network, best.mode.model_copy(update=changed), clips, plain)
        if trial.cosine >= COSINE and trial.seconds < GAIN * best.seconds:
            best = trial
    return best


def _others(device: torch.device, open_keys: set[str]) -> Iterator[dict[str, str]]:
    if "layout" in open_keys:
        yield {"layout": "channels_last"}
    if "precision" in open_keys:
        for precision in precisions(device):
            yield {"precision": precision}


def _batch(network: Network, spec: InputSpec, one: Trial, recipe: ExtractRecipe) -> int:
    """Double the batch while clips come faster and memory allows; a power of two."""
    kind = network.device.type
    if kind == "cpu" and one.seconds > _PATIENCE_S:
        return 1
    limit = memory.budget(network.device, recipe) / (jobs.cpu_count() if kind == "cpu" else 1)
    best, size, seconds = 1, 1, float("inf")
    while size <= _MOST[kind]:
        halved = network.halved
        try:
            with memory.measured(network.device) as growth:
                trial = measure(network, one.mode, example(spec, size), None)
        except KarmmaError:  # not even one clip fits; the run will say so
            break
        if network.halved > halved or trial.seconds > GAIN * seconds:
            break
        best, seconds = size, trial.seconds
        if 2 * growth.size > limit:
            break
        size *= 2
    return best
