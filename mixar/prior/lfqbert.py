"""MaskBit's generator (LFQBert), the discrete prior g_M: a bidirectional transformer over the bits of the codes.

Weber et al., "MaskBit: Embedding-free Image Generation via Bit Tokens" (2024). The parameter names are those of the
published checkpoint, so it loads key for key.
"""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mixar.config import PriorConfig
from mixar.ops import code_bits

_EPS = 1e-12  # of every norm, as in BERT


class Prior(nn.Module):
    """The prediction of every sub-token of an image from those that are not masked, and the class.

    There is no embedding table: a sub-token enters as its ±1 bits, a masked one as zeros. The class is an additional
    token at the end of the sequence.
    """

    bits_to_indices: Tensor  # the buffer of bit values, under its published name

    def __init__(self, config: PriorConfig):
        super().__init__()
        self.config = config
        width, split_bits = config.width, config.bits // config.splits
        self.pos_emb = nn.Parameter(torch.empty(1, config.grid**2 + 1, width))
        self.register_buffer("bits_to_indices", 2 ** torch.arange(split_bits, dtype=torch.int32))
        self.class_emb = nn.Embedding(config.classes + 1, width)  # the last row is the dropped class
        self.input_proj = nn.Linear(config.bits, width)
        self.first_layer = nn.Sequential(nn.LayerNorm(width, eps=_EPS), nn.Dropout(config.dropout))
        blocks = [nn.Sequential(AttentionLayer(config), FeedForwardLayer(config)) for _ in range(config.depth)]
        self.transformer = nn.Sequential(OrderedDict(layers=nn.Sequential(*blocks)))
        self.norm_after_transformer = nn.LayerNorm(width, eps=_EPS) if config.prenorm else nn.Identity()
        self.last_layer = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width, eps=_EPS))
        self.prediction_layer = nn.Linear(width, config.splits * 2**split_bits)

        nn.init.trunc_normal_(self.pos_emb, std=0.02)
        self.apply(_init_weights)

    def blocks(self) -> dict[str, list[nn.Module]]:
        """The blocks that engines recompute, compile and shard one by one."""
        return {"backbone": [*self.transformer.get_submodule("layers").children()]}

    @property
    def mask_id(self) -> int:
        """The id of a masked sub-token: one past the last code of a split."""
        return 2 ** (self.config.bits // self.config.splits)

    def forward(self, tokens: Tensor, labels: Tensor, drop: Tensor | None = None) -> Tensor:
        """Logits of every sub-token.

        Args:
            tokens: int64 [B, N, m] sub-tokens, each of which may be `mask_id`.
            labels: int64 [B] classes; not modified.
            drop: bool [B], True where the dropped class replaces the class.

        Returns:
            [B, N, m, 2^(bits/m)].
        """
        if drop is not None:
            labels = torch.where(drop, self.config.classes, labels)
        x = torch.cat([self.input_proj(self.input_bits(tokens)), self.class_emb(labels)[:, None]], dim=1)
        x = self.first_layer(x + self.pos_emb)
        x = self.norm_after_transformer(self.transformer(x))
        x = self.prediction_layer(self.last_layer(x[:, :-1]))
        return rearrange(x, "b n (m k) -> b n m k", m=self.config.splits)

    def input_bits(self, tokens: Tensor) -> Tensor:
        """±1 bits [B, N, bits] of sub-tokens [B, N, m], with split 0 and low bits first; 0 where masked."""
        signs = code_bits(tokens.masked_fill(tokens == self.mask_id, -1), len(self.bits_to_indices))
        return rearrange(signs, "b n m c -> b n (m c)").to(self.pos_emb.dtype)


class ResidualLayer(nn.Module):
    """A residual branch with its norm: after the sum (post-norm) or before the branch (pre-norm)."""

    def __init__(self, config: PriorConfig):
        super().__init__()
        self.prenorm = config.prenorm
        self.norm = nn.LayerNorm(config.width, eps=_EPS)

    def branch(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] to [B, N, D]."""
        return x + self.branch(self.norm(x)) if self.prenorm else self.norm(x + self.branch(x))


class AttentionLayer(ResidualLayer):
    """Self-attention and its dropout."""

    def __init__(self, config: PriorConfig):
        super().__init__(config)
        self.mha = SelfAttention(config.width, config.heads, config.dropout)
        self.dropout = nn.Dropout(config.dropout)

    def branch(self, x: Tensor) -> Tensor:
        return self.dropout(self.mha(x))


class FeedForwardLayer(ResidualLayer):
    """The two-layer MLP and its dropout."""

    def __init__(self, config: PriorConfig):
        super().__init__(config)
        self.net = nn.Sequential(
            nn.Linear(config.width, config.mlp_width),
            nn.GELU(),
            nn.Linear(config.mlp_width, config.width),
            nn.Dropout(config.dropout),
        )

    def branch(self, x: Tensor) -> Tensor:
        return self.net(x)


class SelfAttention(nn.Module):
    """Multi-head self-attention with the parameters of nn.MultiheadAttention, but always with fused kernels."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)  # over [3D, D], torch's own bounds

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] to [B, N, D]."""
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        q, k, v = rearrange(qkv, "b n (three h c) -> three b h n c", three=3, h=self.heads)
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        return self.out_proj(rearrange(x, "b h n c -> b n (h c)"))


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.trunc_normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
