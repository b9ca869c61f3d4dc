import json
from pathlib import Path

import pytest
import torch

from karmma_pipeline.errors import CheckpointError
from karmma_pipeline.models.fusion import FusionSize
from karmma_pipeline.models.saved import ModelCard, load_model, save_model


def make_card(dim: int = 8) -> ModelCard:
    return ModelCard(
        kind="student",
        name="s",
        size=FusionSize(dim=dim, attention_heads=2, ffn_width=8, head_width=8),
        modalities={"rgb": (2, 3), "imu": (1, 4)},
        heads={"verb": ("a", "b")},
        provenance={"rgb": {"backbone": "x"}},
        store_digest="0",
    )


def test_a_saved_model_comes_back_with_all_it_is(tmp_path: Path) -> None:
    model = make_card().build().eval()
    model.standardise("rgb", torch.arange(3.0), torch.full((3,), 2.0))
    save_model(tmp_path, model, make_card())
    again, card = load_model(tmp_path)
    assert card.model_copy(update={"weights_sha256": ""}) == make_card()
    tokens = {"rgb": torch.randn(2, 2, 3), "imu": torch.randn(2, 1, 4)}
    mask = torch.ones(2, 2, dtype=torch.bool)
    assert torch.equal(again(tokens, mask)["verb"], model(tokens, mask)["verb"])
    assert not again.training


def test_damage_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no saved model"):
        load_model(tmp_path)
    save_model(tmp_path, make_card().build(), make_card())
    (tmp_path / "model.json").write_text(json.dumps(make_card(dim=16).model_dump(mode="json")))
    with pytest.raises(CheckpointError, match="does not fit"):
        load_model(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="damaged"):
        load_model(tmp_path)
    (tmp_path / "model.json").write_text('{"kind": "student", "evil": 1}')
    with pytest.raises(CheckpointError, match="evil: unknown key"):
        load_model(tmp_path)
