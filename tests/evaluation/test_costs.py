from typing import Literal

import pytest

from karmma_pipeline.evaluation.costs import subset_costs
from karmma_pipeline.evaluation.paper import paper_costs, paper_table
from karmma_pipeline.evaluation.peak_memory import peak_memory_mib
from karmma_pipeline.models.backbones import BackboneChoice
from karmma_pipeline.models.fusion import FusionSize


def test_all_fourteen_bars_of_the_paper_come_out_within_a_hundredth_of_a_percent() -> None:
    rows = paper_costs()
    assert len(rows) == 14
    assert max(abs(row.difference) for row in rows) < 0.01
    assert "| teacher | V+F+A | 1707.166" in paper_table(rows)


@pytest.mark.parametrize("pool", ["mean", "attentive"])
def test_stand_in_tokens_cost_what_the_papers_formula_says(
    pool: Literal["mean", "attentive"],
) -> None:
    """Closed form of the fusion block's FLOPs, with every modality's tokens in the sequence."""
    choice = BackboneChoice(name="resnet18", image=(64, 64))
    size = FusionSize(dim=16, layers=2, attention_heads=2, ffn_width=24, head_width=32, pool=pool)
    rows = subset_costs({"rgb": choice, "audio": choice}, size, {"verb": 4, "noun": 3})
    n, width = choice.output_shape
    d, f, h, C, L, M = 16, 24, 32, 7, 2, 2
    N = 1 + M * n
    fusion = 2 * M * n * width * d + 2 * L * N * (4 * d**2 + 2 * d * f) + 4 * L * d * N**2
    if pool == "mean":
        fusion += (1 + M) * 2 * (d * h + h * C)
    else:  # 2 queries: projected, keys and values of all tokens, attention, feed-forward, classes
        fusion += 2 * (2 * d**2 + N * 2 * d**2 + 2 * 2 * N * d + 2 * 2 * d * f + d * C)
    both, rgb, audio = rows
    assert both.gflops == both.gflops_as_run
    extractor = both.gflops - fusion / 1e9
    for one in (rgb, audio):
        assert one.gflops < one.gflops_as_run
        assert one.gflops_as_run == pytest.approx(extractor / 2 + fusion / 1e9, rel=1e-9)


@pytest.mark.slow
def test_peak_memory_grows_with_the_modalities_and_holds_the_weights() -> None:
    choice = BackboneChoice(name="resnet18", image=(64, 64))
    small = FusionSize(dim=16, attention_heads=2, ffn_width=16, head_width=16)
    found = peak_memory_mib({"rgb": choice, "audio": choice}, small, {"verb": 4})
    weights = 11.2e6 * 4 / 2**20
    assert weights < found["audio",] < 1000
    assert found["rgb", "audio"] > found["audio",] + 0.8 * weights


@pytest.mark.slow
def test_memory_of_object_boxes_which_have_no_network_is_that_of_the_fusion_block() -> None:
    choice = BackboneChoice(name="boxes", frames=8)
    small = FusionSize(dim=16, attention_heads=2, ffn_width=16, head_width=16)
    found = peak_memory_mib({"boxes": choice}, small, {"verb": 4})
    assert 0 <= found["boxes",] < 20
