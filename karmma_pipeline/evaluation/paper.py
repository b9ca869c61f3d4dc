"""The paper's fourteen GFLOPs bars, read off the vector graphics of its web page, beside ours.

Source: visinf.github.io/KARMMA (arXiv 2504.08578), figures of October 2025. GFLOPs count 2
per multiply-add, batch 1.
"""

from dataclasses import dataclass

from karmma_pipeline.evaluation.costs import subset_costs
from karmma_pipeline.modalities import label
from karmma_pipeline.models.backbones import BackboneChoice
from karmma_pipeline.models.fusion import FusionSize

GFLOPS = {
    "teacher": {
        ("rgb", "flow", "audio"): 1707.16646,
        ("rgb", "flow"): 1137.01096,
        ("rgb", "audio"): 1137.01096,
        ("flow", "audio"): 1137.01096,
        ("rgb",): 567.96139,
        ("flow",): 567.96139,
        ("audio",): 567.96139,
    },
    "student": {
        ("rgb", "flow", "audio"): 358.16672,
        ("rgb", "flow"): 353.03113,
        ("rgb", "audio"): 181.28123,
        ("flow", "audio"): 181.28123,
        ("rgb",): 176.37881,
        ("flow",): 176.37881,
        ("audio",): 4.67222,
    },
}

HEADS = {"verb": 97, "noun": 300}

#: Inferred from the FLOP bars, all but the number of attention heads (ours: width 64 each).
SIZES = {
    "teacher": FusionSize(
        dim=768, layers=2, attention_heads=12, ffn_width=768, head_width=1536, absent="drop"
    ),
    "student": FusionSize(
        dim=384, layers=1, attention_heads=6, ffn_width=384, head_width=768, absent="drop"
    ),
}

_VIDEO = {"frames": 32, "tokens": (12, 5, 5)}
#: The student's audio network is inferred: 253 tokens and the bar within 0.007 %.
BACKBONES = {
    "teacher": {
        m: BackboneChoice(name="swin3d_b", weights="random:0", **_VIDEO)
        for m in ("rgb", "flow", "audio")
    },
    "student": {
        "rgb": BackboneChoice(name="swin3d_t", weights="random:0", **_VIDEO),
        "flow": BackboneChoice(name="swin3d_t", weights="random:0", **_VIDEO),
        "audio": BackboneChoice(name="efficientnet_b0", weights="random:0", image=(342, 715)),
    },
}


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
    """Recompute the fourteen GFLOPs bars from the architectures of the paper."""
    return [
        PaperCost(kind, cost.modalities, cost.gflops, GFLOPS[kind][cost.modalities])
        for kind in ("teacher", "student")
        for cost in subset_costs(BACKBONES[kind], SIZES[kind], HEADS)
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
