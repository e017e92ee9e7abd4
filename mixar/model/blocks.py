"""The pre-norm ViT block of MAR's backbone, with cross-attention if there is a memory (DC-CA)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixar.model.attention import Attention, CrossAttention, Lengths, Queries
from mixar.model.dropout import Dropping, drop
from mixar.model.rows import Linear, flat, grouped


class Mlp(Dropping):
    """Linear, exact GELU, Linear, dropout after both."""

    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__(dropout)
        self.fc1 = Linear(width, hidden)
        self.fc2 = Linear(hidden, width)

    def forward(self, x: Tensor, keys: Tensor | None) -> Tensor:
        """x [T, D] to [T, D]; keys as in `Attention`."""
        hidden = self.fc1(x)
        # in place if no gradient needs the input, so that the model's widest tensor exists only once
        hidden = F.gelu(hidden) if hidden.requires_grad else torch.ops.aten.gelu_(hidden)
        return drop(self.fc2(drop(hidden, keys, 2, self.now)), keys, 3, self.now)


class Block(nn.Module):
    """x += attention(norm(x)); x += cross-attention(x, memory) under DC-CA; x += mlp(norm(x)).

    Args:
        memory_width: width of the memory; None for a block without cross-attention. The branch of cross-attention has
            no norm of its own: the published parameter count of DC-CA does not include one.
        kernel: `model.attention`.
    """

    def __init__(
        self, width: int, heads: int, mlp_ratio: float, dropout: float, eps: float, memory_width: int | None = None,
        kernel: str = "auto",
    ) -> None:  # fmt: skip
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attn = Attention(width, heads, dropout, kernel)
        self.cross_attn = None if memory_width is None else CrossAttention(width, memory_width, heads, dropout, kernel)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = Mlp(width, int(width * mlp_ratio), dropout)

    def forward(
        self, x: Tensor, lengths: Lengths, memory: Tensor | None, keys: Tensor | None, queries: Queries | None = None
    ) -> Tensor:
        """x [T, D] of packed images to [T, D], or [R, D] for the `queries`. Without gradients x is overwritten.

        Args:
            lengths: tokens per image.
            memory: [B, N, D'] under DC-CA, else None.
            keys: int64 [T], this layer's dropout key of each token; see `drop`.
            queries: the tokens to return; for the others only keys and values of the self-attention are computed.
        """
        x = grouped(x)
        normed, asking = self.norm1(x), lengths
        if queries is not None:
            x, asking = grouped(flat(x)[queries.rows]), queries.lengths
            keys = None if keys is None else keys[queries.rows]
        x = _add(x, self.attn(normed, lengths, keys, queries))
        if self.cross_attn is not None:
            assert memory is not None, "a block with cross-attention needs the memory of discrete tokens"
            x = _add(x, self.cross_attn(x, asking, memory, None if keys is None else ~keys))  # own keys
        return flat(_add(x, self.mlp(self.norm2(x), keys)))


def _add(x: Tensor, branch: Tensor) -> Tensor:
    """x + branch, in place if no gradient needs x, so that the residual stream stays in the cache."""
    return x + branch if x.requires_grad or branch.requires_grad else x.add_(branch)
