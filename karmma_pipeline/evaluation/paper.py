"""The paper's published numbers, read off the vector graphics of its web page.

Source: visinf.github.io/KARMMA (arXiv 2504.08578), figures of October 2025. GFLOPs count 2
per multiply-add, batch 1; memory is in MiB; accuracy is action top-1 in percent.
"""

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

MEMORY_MIB = {
    "teacher": {
        ("rgb", "flow", "audio"): 2570.00,
        ("rgb", "flow"): 2178.00,
        ("rgb", "audio"): 2198.00,
        ("flow", "audio"): 2178.00,
        ("rgb",): 1803.97,
        ("flow",): 1803.97,
        ("audio",): 1803.97,
    },
    "student": {
        ("rgb", "flow", "audio"): 1356.00,
        ("rgb", "flow"): 1320.00,
        ("rgb", "audio"): 1223.98,
        ("flow", "audio"): 1209.98,
        ("rgb",): 1165.98,
        ("flow",): 1165.98,
        ("audio",): 102.00,
    },
}

DROP_CURVES = {
    "EPIC-KITCHENS-100": {
        "Baseline": (40.00, 36.16, 32.24, 28.38, 24.64, 21.55, 18.05, 15.82, 13.84, 12.79),
        "Baseline w/ δ": (41.49, 39.45, 37.25, 34.77, 32.26, 29.85, 27.70, 25.93, 24.56, 23.43),
        "KARMMA student": (43.00, 40.99, 38.79, 36.48, 33.82, 31.40, 29.78, 27.63, 26.14, 25.17),
    },
    "Something-Something V2": {
        "Baseline": (57.31, 53.28, 49.09, 44.82, 40.58, 36.86, 32.99, 29.97, 27.39, 25.64),
        "Baseline w/ δ": (60.31, 58.07, 55.51, 52.24, 49.07, 45.73, 42.46, 39.70, 37.54, 35.51),
        "KARMMA student": (62.88, 61.36, 59.35, 57.31, 55.23, 53.30, 51.42, 50.17, 48.81, 47.66),
    },
}
"""At drop rates 0, 10, ... 90 %."""

HEADS = {"verb": 97, "noun": 300}

SIZES = {
    "teacher": FusionSize(
        dim=768, layers=2, attention_heads=12, ffn_width=768, head_width=1536, absent="drop"
    ),
    "student": FusionSize(
        dim=384, layers=1, attention_heads=6, ffn_width=384, head_width=768, absent="drop"
    ),
}
"""Inferred from the FLOP bars, all but the number of attention heads (ours: width 64 each)."""

_VIDEO = {"frames": 32, "tokens": (12, 5, 5)}
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
"""The student's audio network is inferred: 253 tokens and the bar within 0.007 %."""
