import errno
import json
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from karmma_pipeline.errors import CheckpointError
from karmma_pipeline.models.fusion import FusionSize
from karmma_pipeline.models.saved import ModelCard, begin_from, load_model, save_model


def make_card(dim: int = 8) -> ModelCard:
    return ModelCard(
        kind="student",
        name="s",
        size=FusionSize(dim=dim, attention_heads=2, ffn_width=8, head_width=8),
        modalities={"rgb": (2, 3), "imu": (1, 4)},
        heads={"verb": ("a", "b"), "noun": ("x", "y", "z")},
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
    for head, logits in model(tokens, mask).items():
        assert torch.equal(again(tokens, mask)[head], logits)
    assert not again.training


def test_how_tokens_are_pooled_is_kept_where_it_is_not_the_mean(tmp_path: Path) -> None:
    card = make_card()
    save_model(tmp_path / "mean", card.build(), card)
    assert "pool" not in json.loads((tmp_path / "mean/model.json").read_text())["size"]
    attentive = card.model_copy(update={"size": card.size.model_copy(update={"pool": "attentive"})})
    model = attentive.build().eval()
    save_model(tmp_path / "attentive", model, attentive)
    again, found = load_model(tmp_path / "attentive")
    assert found.size.pool == "attentive"
    tokens = {"rgb": torch.randn(2, 2, 3), "imu": torch.randn(2, 1, 4)}
    mask = torch.tensor([[True, True], [False, True]])
    assert torch.equal(again(tokens, mask)["verb"], model(tokens, mask)["verb"])
    with pytest.raises(CheckpointError, match=r"set size\.pool: attentive"):
        begin_from(card.build(), card, tmp_path / "attentive")


def test_weights_lie_on_boundaries_so_that_every_process_computes_the_same_bits(
    tmp_path: Path,
) -> None:
    save_model(tmp_path, make_card(dim=48).build(), make_card(dim=48))
    for _ in range(5):
        model, _ = load_model(tmp_path)
        assert {p.data_ptr() % 64 for p in model.parameters()} == {0}


def test_damage_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no saved model"):
        load_model(tmp_path)
    save_model(tmp_path, make_card().build(), make_card())
    card = json.loads((tmp_path / "model.json").read_text())
    other = {**card, "size": make_card(dim=16).size.model_dump()}
    (tmp_path / "model.json").write_text(json.dumps(other))
    with pytest.raises(CheckpointError, match="does not match"):
        load_model(tmp_path)
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    for hurt in (whole[:100], whole[:-1] + bytes([whole[-1] ^ 1])):
        weights.write_bytes(hurt)
        with pytest.raises(CheckpointError, match="damaged"):
            load_model(tmp_path)
    weights.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_model(tmp_path)
    (tmp_path / "model.json").write_text('{"kind": "student", "evil": 1}')
    with pytest.raises(CheckpointError, match="evil: unknown key"):
        load_model(tmp_path)


def test_a_disk_that_fails_while_the_old_weights_are_taken_away_is_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(tmp_path, make_card().build(), make_card())
    unlink = Path.unlink

    def failing(path: Path, missing_ok: bool = False) -> None:
        if path.name == "model.previous.safetensors":
            raise OSError(errno.EIO, "Input/output error")
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", failing)
    with pytest.raises(OSError, match="Input/output"):
        save_model(tmp_path, make_card().build(), make_card())
    load_model(tmp_path)


class Killed(BaseException):
    """Ends a save as SIGKILL does: nothing is tidied up."""


def test_killed_at_any_write_the_old_or_the_new_model_can_be_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each rename of a save is the last thing that happens; then it is saved again and killed."""
    first, second, third = (make_card().build() for _ in range(3))
    replace = Path.replace
    for moment in range(6):
        folder = tmp_path / str(moment)
        save_model(folder, first, make_card())
        left = [moment]

        def dying(self: Path, target: Path, left: list[int] = left) -> Path:
            if left[0] == 0:
                raise Killed
            left[0] -= 1
            return replace(self, target)

        for model in (second, third):
            left[0] = moment
            with monkeypatch.context() as patch:
                patch.setattr(Path, "replace", dying)
                with suppress(Killed):
                    save_model(folder, model, make_card())
            found = load_model(folder)[0].get_parameter("cls")
            saved = [m.get_parameter("cls") for m in (first, second, third)]
            assert any(torch.equal(found, cls) for cls in saved)
        save_model(folder, third, make_card())
        assert torch.equal(load_model(folder)[0].get_parameter("cls"), third.get_parameter("cls"))
        assert sorted(p.name for p in folder.iterdir()) == ["model.json", "model.safetensors"]
