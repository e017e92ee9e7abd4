"""Attention over packed rows of tokens: the one place where images of different lengths meet."""

from itertools import groupby

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

Lengths = tuple[int, ...]  # tokens of each image in a packed row, known on the host


def runs(lengths: Lengths) -> list[tuple[int, int]]:
    """Runs of consecutive images of one length, as (images, length)."""
    return [(len(list(images)), length) for length, images in groupby(lengths)]


def attend(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """Softmax attention of equal-length images, q [B, L, H, d] on k and v [B, M, H, d]: [B, L, H, d]."""
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), dropout_p=dropout)
    return out.transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention (timm's ViT layout: one qkv projection, in that order)."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.proj_drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, lengths: Lengths) -> Tensor:
        """x [T, D], image after image of `lengths`, each attending within itself: [T, D]."""
        qkv = rearrange(self.qkv(x), "t (three heads d) -> t three heads d", three=3, heads=self.heads)
        dropout = self.dropout if self.training else 0.0
        outs = []
        for (images, length), rows in zip(runs(lengths), qkv.split([i * n for i, n in runs(lengths)])):
            q, k, v = rearrange(rows, "(b n) three heads d -> three b n heads d", b=images, n=length)
            outs.append(rearrange(attend(q, k, v, dropout), "b n heads d -> (b n) (heads d)"))
        return self.proj_drop(self.proj(torch.cat(outs)))


class CrossAttention(nn.Module):
    """Multi-head attention on a memory, projections without bias (DC-CA)."""

    def __init__(self, width: int, memory_width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.q = nn.Linear(width, width, bias=False)
        self.k = nn.Linear(memory_width, width, bias=False)
        self.v = nn.Linear(memory_width, width, bias=False)
        self.proj = nn.Linear(width, width, bias=False)
        self.proj_drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, lengths: Lengths, memory: Tensor) -> Tensor:
        """x [T, D] of `lengths`, each image on its own row of memory [B, N, D']: [T, D]."""
        q = rearrange(self.q(x), "t (heads d) -> t heads d", heads=self.heads)
        k, v = (rearrange(f(memory), "b n (heads d) -> b n heads d", heads=self.heads) for f in (self.k, self.v))
        dropout = self.dropout if self.training else 0.0
        counts = [images for images, _ in runs(lengths)]
        outs = []
        for (images, length), rows, keys, values in zip(
            runs(lengths), q.split([i * n for i, n in runs(lengths)]), k.split(counts), v.split(counts)
        ):
            out = attend(rearrange(rows, "(b n) h d -> b n h d", b=images, n=length), keys, values, dropout)
            outs.append(rearrange(out, "b n h d -> (b n) (h d)"))
        return self.proj_drop(self.proj(torch.cat(outs)))
