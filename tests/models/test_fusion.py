from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from karmma_pipeline.models.fusion import FusionModel, FusionSize

SHAPES = {"rgb": (4, 6), "flow": (4, 6), "audio": (3, 5)}
HEADS = {"verb": 7, "noun": 3}
RULES = ["learned", "zeros", "drop", "learned attentive", "zeros attentive", "drop attentive"]


def make_model(rule: str, seed: int = 0) -> FusionModel:
    """Build a model of a rule for absence, such as ``drop``, or ``drop attentive``."""
    torch.manual_seed(seed)
    absent, _, pool = rule.partition(" ")
    size = FusionSize(
        dim=16,
        layers=2,
        attention_heads=4,
        ffn_width=24,
        head_width=20,
        absent=absent,
        pool="attentive" if pool else "mean",
    )
    return FusionModel(size, SHAPES, HEADS).eval()


def make_tokens(clips: int, seed: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {m: torch.randn(clips, *shape, generator=generator) for m, shape in SHAPES.items()}


def both(out: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat(list(out.values()), dim=1)


@pytest.mark.parametrize("absent", RULES)
def test_what_stands_in_an_absent_modality_has_no_influence(absent: str) -> None:
    model, tokens = make_model(absent), make_tokens(4)
    mask = torch.tensor([[1, 0, 1], [1, 1, 0], [0, 0, 1], [0, 0, 0]], dtype=torch.bool)
    out = both(model(tokens, mask))
    for column, m in enumerate(model.modalities):
        tokens[m][~mask[:, column]] = torch.nan
    torch.testing.assert_close(both(model(tokens, mask)), out, rtol=0, atol=0)
    assert out.isfinite().all()


@pytest.mark.parametrize("absent", RULES)
@settings(max_examples=20, deadline=None)
@given(bits=st.lists(st.integers(0, 7), min_size=2, max_size=6))
def test_a_clip_does_not_depend_on_its_batch(absent: str, bits: list[int]) -> None:
    model, tokens = make_model(absent), make_tokens(len(bits))
    mask = torch.tensor([[bool(b >> i & 1) for i in range(3)] for b in bits])
    out = both(model(tokens, mask))
    for row in range(len(bits)):
        one = {m: t[row : row + 1] for m, t in tokens.items()}
        alone = both(model(one, mask[row : row + 1]))
        torch.testing.assert_close(out[row : row + 1], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rule", ["drop", "drop attentive"])
def test_dropping_a_modality_equals_a_model_that_never_had_it(rule: str) -> None:
    model, tokens = make_model(rule), make_tokens(3)
    mask = torch.tensor([[True, False, True]]).repeat(3, 1)
    shapes = {m: SHAPES[m] for m in ("rgb", "audio")}
    smaller = FusionModel(model.size, shapes, HEADS).eval()
    own = smaller.state_dict()
    smaller.load_state_dict({k: v for k, v in model.state_dict().items() if k in own})
    torch.testing.assert_close(both(model(tokens, mask)), both(smaller(tokens, mask[:, [0, 2]])))


def test_absence_is_told_apart_only_where_the_setting_says_so() -> None:
    tokens, full = make_tokens(1), torch.ones(1, 3, dtype=torch.bool)
    part = torch.tensor([[True, True, False]])
    for absent in RULES:
        model = make_model(absent)
        assert not torch.allclose(both(model(tokens, full)), both(model(tokens, part)))
    silent = {**tokens, "audio": torch.zeros_like(tokens["audio"])}
    zeros, learned = make_model("zeros"), make_model("learned")
    torch.testing.assert_close(both(zeros(silent, full)), both(zeros(tokens, part)))
    assert not torch.allclose(both(learned(silent, full)), both(learned(tokens, part)))


def test_the_forward_pass_is_the_papers() -> None:
    """One clip, all modalities, written out by hand from the paper's description."""
    model, tokens = make_model("learned"), make_tokens(1)
    model.standardise("audio", torch.full((5,), 0.5), torch.full((5,), 2.0))
    p = dict(model.named_parameters())
    parts = [p["cls"][None]]
    for m in ("rgb", "flow", "audio"):
        x = tokens[m][0] if m != "audio" else (tokens[m][0] - 0.5) / 2
        embedded = x @ p[f"embed.{m}.weight"].T + p[f"embed.{m}.bias"]
        parts.append(embedded + p[f"modality_token.{m}"] + p[f"position_tokens.{m}"])
    x = torch.cat(parts)

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.layer_norm(x, (16,), p[f"{name}.weight"], p[f"{name}.bias"])

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    for layer in ("layers.0", "layers.1"):
        qkv = linear(norm(x, f"{layer}.norm_attention"), f"{layer}.qkv")
        q, k, v = torch.split(qkv, 16, dim=1)
        heads = []
        for h in range(4):
            s = slice(4 * h, 4 * h + 4)
            weights = (q[:, s] @ k[:, s].T / 4**0.5).softmax(dim=1)
            heads.append(weights @ v[:, s])
        x = x + linear(torch.cat(heads, dim=1), f"{layer}.project")
        inner = F.gelu(linear(norm(x, f"{layer}.norm_ffn"), f"{layer}.ffn.0"))
        x = x + linear(inner, f"{layer}.ffn.3")
    x = norm(x, "norm")
    means = torch.stack([x[0], x[1:5].mean(0), x[5:9].mean(0), x[9:12].mean(0)])
    logits = linear(F.gelu(linear(means, "hidden.0")), "classify").mean(dim=0, keepdim=True)
    out = both(model(tokens, torch.ones(1, 3, dtype=torch.bool)))
    torch.testing.assert_close(out, logits, rtol=1e-4, atol=1e-5)


def test_a_query_per_head_looks_at_the_tokens_of_what_is_present() -> None:
    """The attentive pool of one clip, written out by hand, after the layers and the norm."""
    model, tokens = make_model("learned attentive"), make_tokens(1)
    seen = []
    model.norm.register_forward_hook(lambda _, __, out: seen.append(out))
    out = model(tokens, torch.tensor([[True, False, True]]))
    x = torch.cat([seen[0][0, :5], seen[0][0, 9:]])  # CLS and rgb, audio; flow is absent
    p = {name.removeprefix("pool."): of for name, of in model.named_parameters()}
    keys, values = torch.split(x @ p["key_value.weight"].T + p["key_value.bias"], 16, dim=1)
    for head, rows in (("verb", slice(0, 7)), ("noun", slice(7, 10))):
        query = p["query.weight"] @ p[f"tokens.{head}"] + p["query.bias"]
        parts = [slice(4 * h, 4 * h + 4) for h in range(4)]
        looked = [(keys[:, s] @ query[s] / 2).softmax(dim=0) @ values[:, s] for s in parts]
        pooled = p[f"tokens.{head}"] + torch.cat(looked)
        inner = F.layer_norm(pooled, (16,)) @ p["ffn.0.weight"].T + p["ffn.0.bias"]
        pooled = pooled + F.gelu(inner) @ p["ffn.3.weight"].T + p["ffn.3.bias"]
        logits = p["classify.weight"][rows] @ pooled + p["classify.bias"][rows]
        torch.testing.assert_close(out[head][0], logits, rtol=1e-4, atol=1e-5)


@pytest.mark.extra
def test_the_attentive_pool_is_v_jepa_2s() -> None:
    """With its weights in ours, layers included, the classifier of transformers says the same."""
    vjepa2 = pytest.importorskip("transformers.models.vjepa2.modeling_vjepa2")
    shape = {"hidden_size": 16, "num_attention_heads": 4, "num_pooler_layers": 2}
    config = vjepa2.VJEPA2Config(**shape, mlp_ratio=4.0, layer_norm_eps=1e-5)
    torch.manual_seed(0)
    theirs = vjepa2.VJEPA2AttentivePooler(config).eval()
    torch.nn.init.normal_(theirs.query_tokens)
    ours = FusionModel(
        FusionSize(dim=16, layers=2, attention_heads=4, ffn_width=64, pool="attentive"),
        {"rgb": (9, 6)},
        {"verb": 7},
    ).eval()
    assert ours.pool is not None
    copied: list[tuple[Any, ...]] = [(ours.pool, theirs.cross_attention_layer, "cross_attn")]
    copied += zip(ours.layers, theirs.self_attention_layers, ["self_attn"] * 2, strict=True)
    for mine, their, name in copied:
        attention = getattr(their, name)
        qkv = [attention.q_proj, attention.k_proj, attention.v_proj]
        if name == "self_attn":
            copy(mine.project, attention.out_proj)
            copy(mine.qkv, *qkv)
            copy(mine.norm_attention, their.layer_norm1)
        else:
            copy(mine.query, qkv[0])
            copy(mine.key_value, *qkv[1:])
            copy(ours.norm, their.layer_norm1)
        copy(mine.norm_ffn, their.layer_norm2)
        copy(mine.ffn[0], their.mlp.fc1)
        copy(mine.ffn[3], their.mlp.fc2)
    ours.pool.tokens["verb"].data = theirs.query_tokens.data[0, 0]
    into: list[torch.Tensor] = []
    next(ours.layers.children()).register_forward_pre_hook(lambda _, given: into.append(given[0]))
    rgb = torch.randn(2, 9, 6)
    out = ours({"rgb": rgb}, torch.ones(2, 1, dtype=torch.bool))
    torch.testing.assert_close(out["verb"], ours.classify(theirs(into[0])), rtol=1e-4, atol=1e-5)


def copy(mine: torch.nn.Module, *theirs: torch.nn.Module) -> None:
    for name, to in mine.named_parameters():
        to.data = torch.cat([dict(one.named_parameters())[name].data for one in theirs])


def test_attention_heads_must_divide_the_width() -> None:
    with pytest.raises(ValueError, match="dim=10 must be divisible by attention_heads=3"):
        FusionSize(dim=10, attention_heads=3)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"dim": 1_000_002},
            "dim=1000002, layers=1, ffn_width=384, head_width=768 give 4e.12 weig",
        ),
        ({"head_width": 10**9}, "head_width=1000000000 give"),
        ({"layers": 10**9}, "layers"),
    ],
)
def test_a_size_that_no_memory_holds_is_refused_by_name(change: dict[str, int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        FusionSize(**change)


def test_position_tokens_are_scaled_and_nothing_else() -> None:
    plain, scaled = make_model("learned"), make_model("learned")
    plain.scale_positions(0.02)
    scaled.scale_positions(0.5)
    fresh, wide = make_model("learned").state_dict(), scaled.state_dict()
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, fresh[name])
        factor = 25 if name.startswith("position_tokens.") else 1
        torch.testing.assert_close(wide[name], factor * tensor)
    drawn = torch.cat([t.flatten() for n, t in wide.items() if n.startswith("position_tokens.")])
    assert float(drawn.std()) == pytest.approx(0.5, rel=0.2)  # of 176 numbers
