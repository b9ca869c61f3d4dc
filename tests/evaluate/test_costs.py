from karmma_pipeline.evaluate.costs import paper_costs, paper_table, peak_memory_mib
from karmma_pipeline.models.backbones import BackboneChoice
from karmma_pipeline.models.fusion import FusionSize


def test_all_fourteen_bars_of_the_paper_come_out_within_a_hundredth_of_a_percent() -> None:
    rows = paper_costs()
    assert len(rows) == 14
    assert max(abs(row.difference) for row in rows) < 0.01
    assert "| teacher | V+F+A | 1707.166" in paper_table(rows)


def test_peak_memory_grows_with_the_modalities_and_holds_the_weights() -> None:
    choice = BackboneChoice(name="resnet18", image=(64, 64))
    small = FusionSize(dim=16, attention_heads=2, ffn_width=16, head_width=16)
    found = peak_memory_mib({"rgb": choice, "audio": choice}, small, {"verb": 4})
    weights = 11.2e6 * 4 / 2**20
    assert weights < found["audio",] < 1000
    assert found["rgb", "audio"] > found["audio",] + 0.8 * weights
