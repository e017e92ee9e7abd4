"""The pre-norm ViT block of MAR's backbone, with DC-CA's cross-attention where there is a memory."""

import torch.nn.functional as F
from torch import Tensor, nn

from mixar.model.attention import Attention, CrossAttention, Lengths


class Mlp(nn.Module):
    """Linear, exact GELU, Linear, dropout after both."""

    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.fc2(self.dropout(F.gelu(self.fc1(x)))))


class Block(nn.Module):
    """x += attention(norm(x)); x += cross-attention(x, memory) under DC-CA; x += mlp(norm(x)).

    Args:
        memory_width: width of the memory; None for a block without cross-attention. Its residual branch has no norm of
            its own: the published size of DC-CA leaves no room for one.
    """

    def __init__(
        self, width: int, heads: int, mlp_ratio: float, dropout: float, eps: float, memory_width: int | None = None
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attn = Attention(width, heads, dropout)
        self.cross_attn = None if memory_width is None else CrossAttention(width, memory_width, heads, dropout)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = Mlp(width, int(width * mlp_ratio), dropout)

    def forward(self, x: Tensor, lengths: Lengths, memory: Tensor | None) -> Tensor:
        """x [T, D], packed images of `lengths`; memory [B, N, D'] under DC-CA: [T, D]."""
        x = x + self.attn(self.norm1(x), lengths)
        if self.cross_attn is not None:
            assert memory is not None, "a block with cross-attention needs the memory of discrete tokens"
            x = x + self.cross_attn(x, lengths, memory)
        return x + self.mlp(self.norm2(x))
