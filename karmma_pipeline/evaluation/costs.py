"""What one clip costs on every subset of modalities: FLOPs, parameters, peak memory.

FLOPs count 2 per multiply-add (`torch.utils.flop_counter`), one clip, backbones of the present
modalities included. The fusion block is counted twice over: with absent modalities left out of
the sequence, the convention of the paper's figures, and as the model treats them.
"""

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import torch
from torch.utils.flop_counter import FlopCounterMode

from karmma_pipeline.errors import KarmmaError
from karmma_pipeline.evaluation import paper
from karmma_pipeline.modalities import label, subsets
from karmma_pipeline.models.backbones import BackboneChoice, describe
from karmma_pipeline.models.fusion import FusionModel, FusionSize


@dataclass(frozen=True)
class SubsetCost:
    """Cost of one clip with some modalities.

    gflops: absent modalities left out. gflops_as_run: as the model treats absence.
    """

    modalities: tuple[str, ...]
    gflops: float
    gflops_as_run: float
    parameters: int


def subset_costs(
    backbones: Mapping[str, BackboneChoice], size: FusionSize, heads: Mapping[str, int]
) -> list[SubsetCost]:
    """Count FLOPs and parameters for every subset, on the meta device: it takes no memory.

    Parameters are those of the networks that run for the subset.
    """
    facts = {m: _describe(choice) for m, choice in backbones.items()}
    shapes = {m: backbones[m].output_shape for m in backbones}
    rows = []
    for subset in subsets(backbones):
        used = {m: shapes[m] for m in subset}
        extractors, extractor_parameters = (sum(facts[m][i] for m in subset) for i in (0, 1))
        gflops, parameters = _fusion(size, used, heads)
        as_run = gflops
        if size.absent != "drop":
            as_run, _ = _fusion(size, shapes, heads)
        rows.append(
            SubsetCost(
                subset,
                extractors + gflops,
                extractors + as_run,
                int(extractor_parameters) + parameters,
            )
        )
    return rows


@cache
def _describe(choice: BackboneChoice) -> tuple[float, int]:
    facts = describe(choice)
    return facts["gflops"], facts["parameters"]


def _fusion(
    size: FusionSize, shapes: Mapping[str, tuple[int, int]], heads: Mapping[str, int]
) -> tuple[float, int]:
    mask = torch.ones(1, len(shapes), dtype=torch.bool)
    with torch.device("meta"), torch.inference_mode():
        model = FusionModel(size, shapes, heads).eval()
        tokens = {m: torch.empty(1, *shape) for m, shape in shapes.items()}
        with FlopCounterMode(display=False) as counter:
            model(tokens, mask)
    return counter.get_total_flops() / 1e9, sum(p.numel() for p in model.parameters())


_PROBE = """
import json, os, sys
import torch
from karmma_pipeline.models.backbones import BackboneChoice
from karmma_pipeline.models.fusion import FusionModel, FusionSize
given = json.load(sys.stdin)
device, cuda = given["device"], given["device"].startswith("cuda")
size, heads = FusionSize(**given["size"]), given["heads"]
choices = {m: BackboneChoice(**c) for m, c in given["backbones"].items()}

def resident(key):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 2**10

def zeros(architecture):  # drawing random weights would take most of the time
    with torch.device("meta"):
        net = architecture.headless().eval()
    net.to_empty(device=device)
    for tensor in (*net.parameters(), *net.buffers()):
        tensor.zero_()
    return net

@torch.inference_mode()
def measure(used):
    before = resident("VmRSS:")
    open("/proc/self/clear_refs", "w").write("5")  # the peak counts from here
    nets = {m: zeros(choices[m].architecture) for m in used}
    model = FusionModel(size, {m: choices[m].output_shape for m in used}, heads).eval().to(device)
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    for m in used:
        x = torch.zeros(1, *choices[m].input_shape, device=device)
        choices[m].architecture.feature_map(nets[m], x)
    tokens = {m: torch.zeros(1, *choices[m].output_shape, device=device) for m in used}
    model(tokens, torch.ones(1, len(used), dtype=torch.bool))
    return torch.cuda.max_memory_reserved() / 2**20 if cuda else resident("VmHWM:") - before

for used in given["subsets"]:  # a fork each: what one leaves behind does not count for the next
    if not os.fork():
        print(measure(used), flush=True)
        os._exit(0)
    if os.wait()[1]:
        sys.exit(f"the process for {used} died")
"""


def peak_memory_mib(
    backbones: Mapping[str, BackboneChoice],
    size: FusionSize,
    heads: Mapping[str, int],
    device: str = "cpu",
) -> dict[tuple[str, ...], float]:
    """Measure the peak memory of one clip in float32 for every subset, each in its own process.

    On a GPU the allocator's reserved memory, as in the paper; on a CPU what the process grew
    by while it built the networks (of zeros) and ran them. Linux only.

    Raises:
        KarmmaError: it could not be measured, for lack of memory perhaps.
    """
    chosen = subsets(backbones)
    given = {
        "backbones": {m: choice.model_dump(mode="json") for m, choice in backbones.items()},
        "size": size.model_dump(),
        "heads": dict(heads),
        "device": device,
        "subsets": chosen,
    }
    return dict(zip(chosen, _probe(json.dumps(given)), strict=True))


@cache
def _probe(given: str) -> tuple[float, ...]:
    done = subprocess.run(
        [sys.executable, "-c", _PROBE], input=given, capture_output=True, text=True
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["killed"])[-1]
        raise KarmmaError(f"peak memory could not be measured ({reason}).")
    return tuple(float(line) for line in done.stdout.split())


@dataclass(frozen=True)
class PaperCost:
    """One of the paper's fourteen bars beside ours."""

    model: str
    modalities: tuple[str, ...]
    gflops: float
    published: float

    @property
    def difference(self) -> float:
        """Relative difference in percent."""
        return 100 * (self.gflops / self.published - 1)


def paper_costs() -> list[PaperCost]:
    """Recompute the fourteen GFLOPs bars from the architectures in `paper`."""
    return [
        PaperCost(kind, cost.modalities, cost.gflops, paper.GFLOPS[kind][cost.modalities])
        for kind in ("teacher", "student")
        for cost in subset_costs(paper.BACKBONES[kind], paper.SIZES[kind], paper.HEADS)
    ]


def paper_table(rows: list[PaperCost]) -> str:
    """Return a Markdown table of the bars."""
    lines = ["| model | subset | GFLOPs | paper | difference |", "|---|---|---:|---:|---:|"]
    lines += [
        f"| {r.model} | {label(r.modalities)} | {r.gflops:.5f} | {r.published:.5f} "
        f"| {r.difference:+.4f} % |"
        for r in rows
    ]
    return "\n".join(lines)
