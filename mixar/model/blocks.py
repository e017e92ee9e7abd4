"""The pre-norm ViT block of MAR's backbone, with DC-CA's cross-attention where there is a memory."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixar.model.attention import Attention, CrossAttention, Lengths, Wanted
from mixar.model.dropout import drop


class Mlp(nn.Module):
    """Linear, exact GELU, Linear, dropout after both."""

    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.dropout = dropout

    def forward(self, x: Tensor, keys: Tensor | None) -> Tensor:
        """x [T, D] to [T, D]; keys as in `Attention`."""
        hidden = self.fc1(x)
        # in place where no gradient needs the input: the widest tensor of the model is then there once
        hidden = F.gelu(hidden) if hidden.requires_grad else torch.ops.aten.gelu_(hidden)
        if keys is None:
            return self.fc2(hidden)
        return drop(self.fc2(drop(hidden, keys, 2, self.dropout)), keys, 3, self.dropout)


class Block(nn.Module):
    """x += attention(norm(x)); x += cross-attention(x, memory) under DC-CA; x += mlp(norm(x)).

    Args:
        memory_width: width of the memory; None for a block without cross-attention. Its residual branch has no norm of
            its own: the published size of DC-CA leaves no room for one.
        kernel: what attention runs in, `model.attention`.
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
        self, x: Tensor, lengths: Lengths, memory: Tensor | None, keys: Tensor | None, wanted: Wanted | None = None
    ) -> Tensor:
        """x [T, D], packed images of `lengths`; memory [B, N, D'] under DC-CA: [T, D]. Without gradients x is
        overwritten.

        Args:
            keys: int64 [T], this layer's key of each token, which decides what is dropped; None drops nothing.
            wanted: the tokens to return, [R, D]; beyond their part in the attention nothing is computed for others.
        """
        normed = self.norm1(x)
        if wanted is not None:
            x, lengths_out = x[wanted.rows], wanted.counts
            keys = None if keys is None else keys[wanted.rows]
        else:
            lengths_out = lengths
        x = _add(x, self.attn(normed, lengths, keys, wanted))
        if self.cross_attn is not None:
            assert memory is not None, "a block with cross-attention needs the memory of discrete tokens"
            x = _add(x, self.cross_attn(x, lengths_out, memory, None if keys is None else ~keys))  # keys of its own
        return _add(x, self.mlp(self.norm2(x), keys))


def _add(x: Tensor, branch: Tensor) -> Tensor:
    """x + branch, in place where no gradient needs x: the residual stream then stays in one place in the cache."""
    return x + branch if x.requires_grad or branch.requires_grad else x.add_(branch)
