"""The peak memory of one clip on every subset of modalities, measured in a process of its own.

What the calling process has allocated before, and what its allocators keep, would count too. So
this file is also a program: it reads what to measure from stdin and prints a line per subset.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from karmma_pipeline import own_code
from karmma_pipeline.errors import KarmmaError
from karmma_pipeline.jobs import StopFlag
from karmma_pipeline.modalities import canonical, evaluated_subsets
from karmma_pipeline.models.architectures import build_model
from karmma_pipeline.models.backbones import BackboneChoice
from karmma_pipeline.models.fusion import FusionSize

_PROCESS = Path("/proc/self")
_LOOK_S = 0.5


def peak_memory_mib(
    backbones: Mapping[str, BackboneChoice],
    size: FusionSize,
    heads: Mapping[str, int],
    device: str = "cpu",
    stop: StopFlag | None = None,
    model: str = "",
    model_args: Mapping[str, Any] = MappingProxyType({}),
) -> dict[tuple[str, ...], float]:
    """Measure the peak memory of one clip in float32 for every subset that is evaluated.

    Each in its own process.

    On a GPU the allocator's reserved memory, as in the paper; on a CPU what the process grew
    by while it built the networks (of zeros) and ran them, without code. Linux only.

    Raises:
        KarmmaError: it could not be measured, for lack of memory perhaps.
        StoppedError: a stop was asked for.
    """
    chosen = evaluated_subsets(backbones)
    request = {
        "backbones": {m: choice.model_dump(mode="json") for m, choice in backbones.items()},
        "size": size.model_dump(),
        "heads": dict(heads),
        "model": model,
        "model_args": dict(model_args),
        "device": device,
        "subsets": chosen,
    }
    text = json.dumps(request)
    if text not in _measured:  # runs of one architecture share what was measured
        _measured[text] = _measure_elsewhere(text, stop or StopFlag(resumes=False))
    return dict(zip(chosen, _measured[text], strict=True))


_measured: dict[str, tuple[float, ...]] = {}


def _measure_elsewhere(request: str, stop: StopFlag) -> tuple[float, ...]:
    """Run this file as a program; return what it prints."""
    command = [sys.executable, "-m", "karmma_pipeline.evaluation.peak_memory"]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, start_new_session=True
    ) as process:
        given: str | None = request
        try:
            while True:
                with suppress(subprocess.TimeoutExpired):
                    out, err = process.communicate(given, timeout=_LOOK_S)
                    break
                given = None  # it is written only once
                stop.check("no results of this evaluation were saved")
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # and what it has forked
    if process.returncode:
        reason = (err.strip().splitlines() or ["killed"])[-1]
        raise KarmmaError(f"peak memory could not be measured ({reason}).")
    return tuple(float(line) for line in out.split())


def _main() -> None:
    request = json.load(sys.stdin)
    choices = {m: BackboneChoice(**facts) for m, facts in request["backbones"].items()}
    size, device = FusionSize(**request["size"]), torch.device(request["device"])
    for choice in choices.values():  # libraries that are imported at first use must not count
        _ = choice.output_shape
        with torch.device("meta"):
            choice.architecture.headless()
    for used in request["subsets"]:
        # A fork each: what one measurement leaves behind does not count for the next. The parent
        # never touches CUDA, whose state does not survive a fork.
        if not os.fork():
            takes = choices if own_code.is_own(request["model"]) else used
            shapes = {m: choices[m].output_shape for m in takes}
            arguments = (request["model"], request["model_args"], size, shapes, request["heads"])
            chosen = {m: choices[m] for m in used}
            print(_measure(chosen, shapes, partial(build_model, *arguments), device), flush=True)
            os._exit(0)
        if os.wait()[1]:
            sys.exit(f"the process for {used} died")


@torch.inference_mode()
def _measure(
    choices: Mapping[str, BackboneChoice],
    shapes: Mapping[str, tuple[int, int]],
    build: Callable[[], torch.nn.Module],
    device: torch.device,
) -> float:
    before, code = _resident_mib("VmRSS:"), _resident_mib("RssFile:")
    (_PROCESS / "clear_refs").write_text("5")  # the kernel counts the peak (VmHWM) from here
    nets = {m: _zeros(choice, device) for m, choice in choices.items()}
    model = build().eval().to(device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    for m, choice in choices.items():
        clip = torch.zeros(1, *choice.input_shape, device=device)
        choice.architecture.features(nets[m], clip)
    tokens = {m: torch.zeros(1, *shape, device=device) for m, shape in shapes.items()}
    model(tokens, torch.tensor([[m in choices for m in canonical(shapes)]]))
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved() / 2**20
    # Code of libraries is mapped as it first runs, 15 to 90 MiB by the processor: it is left out.
    code = _resident_mib("RssFile:") - code
    return max(0.0, _resident_mib("VmHWM:") - before - code)


def _zeros(choice: BackboneChoice, device: torch.device) -> torch.nn.Module:
    """Return a network of zeros: drawing random weights would take most of the time."""
    with torch.device("meta"):
        net = choice.architecture.headless().eval()
    net.to_empty(device=device)
    for tensor in (*net.parameters(), *net.buffers()):
        tensor.zero_()
    return net


def _resident_mib(key: str) -> float:
    lines = (_PROCESS / "status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 2**10


if __name__ == "__main__":
    _main()
