"""The fusion block: tokens of several modalities in, logits per head out, any subset may be absent.

The architecture is the one that reproduces the paper's FLOP bars: a linear embedding per
modality, a learned modality token added to each token, learned tokens per position that
stand in for an absent modality, [CLS], pre-norm transformer layers, then one shared
multi-head MLP on CLS and on the mean of each present modality's tokens; logits are averaged.
Or, with ``pool: attentive``, V-JEPA 2's attentive pooler over the tokens of what is present.

B clips in a batch, M modalities, N tokens of a modality, D width, C classes of a head,
L length of the whole sequence.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from karmma_pipeline.modalities import canonical
from karmma_pipeline.models.absence import filled, find_rule
from karmma_pipeline.models.size import FusionSize as FusionSize

#: Deviation with which learned tokens are drawn.
TOKEN_STD = 0.02


class TokenModel(nn.Module):
    """What every model of cached tokens has: modalities, heads, standardization.

    Args:
        modalities: name to (tokens N, backbone width).
        heads: name to number of classes C.
        means: whether it needs the mean of the training clips' tokens, see `set_mean`.

    Attributes:
        modalities: names in the order of a mask's columns.
        tokens: N of each.
        heads: C of each.
    """

    def __init__(
        self,
        modalities: Mapping[str, tuple[int, int]],
        heads: Mapping[str, int],
        means: bool = False,
    ) -> None:
        super().__init__()
        self.modalities = canonical(modalities)
        self.tokens = {m: modalities[m][0] for m in self.modalities}
        self.heads = dict(heads)
        self.needs_means = means
        for m in self.modalities:
            self.register_buffer(f"mean_{m}", torch.zeros(modalities[m][1]))
            self.register_buffer(f"std_{m}", torch.ones(modalities[m][1]))
            if means:
                self.register_buffer(f"typical_{m}", torch.zeros(modalities[m]))

    def standardise(self, modality: str, mean: Tensor, std: Tensor) -> None:
        """Set what is subtracted from the features of a modality and divides them, [width] each.

        Frozen networks differ in scale by orders of magnitude, which one learning rate cannot
        serve. Saved with the model; 0 and 1 until set. It costs no multiply-add.
        """
        self.get_buffer(f"mean_{modality}").copy_(mean)
        self.get_buffer(f"std_{modality}").copy_(std)

    def set_mean(self, modality: str, mean: Tensor) -> None:
        """Set the mean of the training clips' tokens as they are stored, [N, width]."""
        self.get_buffer(f"typical_{modality}").copy_(mean)

    def features(self, modality: str, stored: Tensor) -> Tensor:
        """Return the tokens [B, N, width] of what a store holds of a modality: these."""
        return stored

    def encode(self, tokens: Mapping[str, Tensor], mask: Tensor) -> Mapping[str, Tensor]:
        """Return what `answer` takes, once for all masks under which clips are asked about.

        Args:
            tokens: as of `FusionModel.forward`.
            mask: bool [B, M], what any of these masks lets through.
        """
        return tokens

    def answer(self, tokens: Mapping[str, Tensor], mask: Tensor) -> dict[str, Tensor]:
        """Classify what `encode` gave under a mask; see `FusionModel.forward`."""
        logits: dict[str, Tensor] = self(tokens, mask)
        return logits

    def _scaled(self, modality: str, features: Tensor) -> Tensor:
        mean, std = self.get_buffer(f"mean_{modality}"), self.get_buffer(f"std_{modality}")
        return (features - mean) / std

    def _standardised(self, modality: str, features: Tensor, here: Tensor) -> Tensor:
        """Return features [B, N, width] as numbers of one scale, zeros where absent.

        Args:
            modality: whose.
            features: any float dtype; what stands in absent rows, NaN included, is not used.
            here: bool [B, 1, 1], where it is present.
        """
        features = torch.where(here, features, features.new_zeros(()))
        features = features.to(self.get_buffer(f"mean_{modality}").dtype)
        return torch.where(here, self._scaled(modality, features), features)


def _feed_forward(size: FusionSize) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(size.dim, size.ffn_width),
        nn.GELU(),
        nn.Dropout(size.dropout),
        nn.Linear(size.ffn_width, size.dim),
    )


class _Layer(nn.Module):
    """Pre-norm transformer layer; `key_mask` bool [B, 1, 1, L] is False where nobody may look."""

    def __init__(self, size: FusionSize) -> None:
        super().__init__()
        self.attention_heads = size.attention_heads
        self.dropout = size.dropout
        self.norm_attention = nn.LayerNorm(size.dim)
        self.qkv = nn.Linear(size.dim, 3 * size.dim)
        self.project = nn.Linear(size.dim, size.dim)
        self.norm_ffn = nn.LayerNorm(size.dim)
        self.ffn = _feed_forward(size)

    def forward(self, x: Tensor, key_mask: Tensor | None) -> Tensor:
        B, L, D = x.shape
        qkv = self.qkv(self.norm_attention(x)).view(B, L, 3, self.attention_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, heads, L, D / heads]
        dropout = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=key_mask, dropout_p=dropout)
        x = x + self.project(attended.transpose(1, 2).reshape(B, L, D))
        return x + F.dropout(self.ffn(self.norm_ffn(x)), self.dropout, self.training)


class AttentivePool(nn.Module):
    """A learned query per head looks at the tokens: V-JEPA 2's attentive pooler.

    Source: facebookresearch/vjepa2, src/models/attentive_pooler.py. As there, values are not
    projected after the attention, and queries are not normalised before it. Its self-attention
    blocks are the fusion model's layers.
    """

    def __init__(self, size: FusionSize, heads: Iterable[str]) -> None:
        super().__init__()
        self.heads = tuple(heads)
        self.attention_heads, self.dropout = size.attention_heads, size.dropout
        self.tokens = nn.ParameterDict({h: nn.Parameter(torch.empty(size.dim)) for h in self.heads})
        self.query = nn.Linear(size.dim, size.dim)
        self.key_value = nn.Linear(size.dim, 2 * size.dim)
        self.norm_ffn = nn.LayerNorm(size.dim)
        self.ffn = _feed_forward(size)

    def forward(self, x: Tensor, key_mask: Tensor | None) -> Tensor:
        """Return what each head is read off, [B, heads, D], of normalised tokens [B, L, D]."""
        B, L, D = x.shape
        queries = torch.stack([self.tokens[h] for h in self.heads])  # the dictionary is sorted
        q = self.query(queries).view(1, len(queries), self.attention_heads, -1).transpose(1, 2)
        k, v = self.key_value(x).view(B, L, 2, self.attention_heads, -1).permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        q = q.expand(B, -1, -1, -1)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=key_mask, dropout_p=dropout)
        pooled = queries + attended.transpose(1, 2).reshape(B, len(queries), D)
        return pooled + F.dropout(self.ffn(self.norm_ffn(pooled)), self.dropout, self.training)


class FusionModel(TokenModel):
    """Fuses cached tokens and classifies; works for any number of modalities and heads.

    Args:
        size: widths, depth and the treatment of absence.
        modalities: name to (tokens N, backbone width).
        heads: name to number of classes C.
    """

    def __init__(
        self, size: FusionSize, modalities: Mapping[str, tuple[int, int]], heads: Mapping[str, int]
    ) -> None:
        self.rule = find_rule(size.absent)
        super().__init__(modalities, heads, means=self.rule.fill is not None)
        self.size = size
        D = size.dim
        self.embed = nn.ModuleDict({m: nn.Linear(modalities[m][1], D) for m in self.modalities})
        self.modality_token = nn.ParameterDict(
            {m: nn.Parameter(torch.empty(D)) for m in self.modalities}
        )
        self.position_tokens = nn.ParameterDict(
            {m: nn.Parameter(torch.empty(self.tokens[m], D)) for m in self.modalities}
        )
        self.cls = nn.Parameter(torch.empty(D))
        self.layers = nn.ModuleList(_Layer(size) for _ in range(size.layers))
        self.norm = nn.LayerNorm(D)
        attentive = size.pool == "attentive"
        self.pool = AttentivePool(size, self.heads) if attentive else None
        if not attentive:
            self.hidden = nn.Sequential(
                nn.Linear(D, size.head_width), nn.GELU(), nn.Dropout(size.dropout)
            )
        width = D if attentive else size.head_width
        self.classify = nn.Linear(width, sum(self.heads.values()))
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=module.in_features**-0.5)
                nn.init.zeros_(module.bias)
        tokens = [self.cls, *self.modality_token.values(), *self.position_tokens.values()]
        if self.pool is not None:
            tokens += self.pool.tokens.values()
        for token in tokens:
            nn.init.trunc_normal_(token, std=TOKEN_STD)

    @torch.no_grad()
    def scale_positions(self, std: float) -> None:
        """Give the position tokens, as they were drawn, another deviation.

        They are added to embedded tokens of a deviation of about 1. Much smaller ones hide where
        in the clip a token lies, and training hardly makes them larger.
        """
        if std != TOKEN_STD:  # a factor that rounds to 1 would still change bits
            for token in self.position_tokens.values():
                token *= std / TOKEN_STD

    def forward(self, tokens: Mapping[str, Tensor], mask: Tensor) -> dict[str, Tensor]:
        """Classify a batch.

        Args:
            tokens: modality to features [B, N, width], any float dtype. What stands in the
                rows of an absent modality, NaN included, has no influence.
            mask: bool [B, M] in the order of ``self.modalities``; False is absent. Best on
                the CPU, whatever the device of the tokens.

        Returns:
            Logits, head to [B, C].
        """
        seen, mixed = self._layout(mask)
        mask = mask.to(self.cls.device)
        here = {m: mask[:, column, None, None] for column, m in seen}
        parts = [self._embed(m, of, here[m]) for m, of in self._features(tokens, here)]
        cls = self.cls.expand(mask.shape[0], 1, -1)
        x = torch.cat([cls.to(parts[0].dtype) if parts else cls, *parts], dim=1)
        key_mask = self._key_mask(mask, seen) if mixed else None
        for layer in self.layers:
            x = layer(x, key_mask)
        x = self.norm(x)
        if self.pool is not None:
            counts = None if self.rule.taken_for_data else self._key_mask(mask, seen)
            return self._classify_pooled(self.pool(x, counts))
        return self._classify(x, mask, seen)

    def _layout(self, mask: Tensor) -> tuple[list[tuple[int, str]], bool]:
        """Return the modalities in the sequence, and whether some rows must not see them all.

        Looks at values: a mask on the CPU costs no wait for the device. A graph that is being
        exported must serve every mask: there all modalities have a place, and some are hidden.
        """
        columns = list(enumerate(self.modalities))
        if self.rule.in_sequence or torch.onnx.is_in_onnx_export():
            return columns, not self.rule.in_sequence
        seen = [(column, m) for column, m in columns if bool(mask[:, column].any())]
        return seen, not bool(mask[:, [column for column, _ in seen]].all())

    def _features(
        self, tokens: Mapping[str, Tensor], here: Mapping[str, Tensor]
    ) -> Iterable[tuple[str, Tensor]]:
        """Return the standardised features of each modality, absent rows filled by the rule."""
        standardised = ((m, self._standardised(m, tokens[m], here[m])) for m in here)
        if not self.needs_means:
            return standardised
        means = {m: self._scaled(m, self.get_buffer(f"typical_{m}")) for m in here}
        return filled(self.rule, dict(standardised), here, means).items()

    def _embed(self, modality: str, features: Tensor, here: Tensor) -> Tensor:
        """Return the sequence part of a modality, [B, N, D]."""
        embedded = self.embed[modality](features)
        if not self.rule.taken_for_data and self.rule.in_sequence:  # its own tokens and no more
            embedded = torch.where(here, embedded, embedded.new_zeros(()))
        own = self.modality_token[modality] + self.position_tokens[modality]
        return embedded + own.to(embedded.dtype)

    def _key_mask(self, mask: Tensor, seen: list[tuple[int, str]]) -> Tensor:
        parts = [mask[:, column, None].expand(-1, self.tokens[m]) for column, m in seen]
        keys = torch.cat([torch.ones_like(mask[:, :1]), *parts], dim=1)
        return keys[:, None, None, :]

    def _classify(self, x: Tensor, mask: Tensor, seen: list[tuple[int, str]]) -> dict[str, Tensor]:
        """Average the logits of CLS and of the mean of each modality that counts."""
        lengths = [1, *(self.tokens[m] for _, m in seen)]
        summaries = torch.stack(
            [part.mean(dim=1) for part in torch.split(x, lengths, dim=1)], dim=1
        )
        logits = self.classify(self.hidden(summaries))  # [B, 1 + seen, all classes]
        counts = mask[:, [column for column, _ in seen]]
        if self.rule.taken_for_data:  # it does not know that anything is absent
            counts = torch.ones_like(counts)
        weight = torch.cat([torch.ones_like(mask[:, :1]), counts], dim=1)[..., None]
        total = torch.where(weight, logits, logits.new_zeros(())).sum(dim=1)
        averaged = total / weight.sum(dim=1)
        by_head = torch.split(averaged, list(self.heads.values()), dim=-1)
        return dict(zip(self.heads, by_head, strict=True))

    def _classify_pooled(self, pooled: Tensor) -> dict[str, Tensor]:
        """Return the logits of each head from its own query, [B, heads, D]."""
        sizes, layer = list(self.heads.values()), self.classify
        rows = zip(torch.split(layer.weight, sizes), torch.split(layer.bias, sizes), strict=True)
        of_heads = zip(self.heads, pooled.unbind(dim=1), rows, strict=True)
        return {head: F.linear(x, weight, bias) for head, x, (weight, bias) in of_heads}
