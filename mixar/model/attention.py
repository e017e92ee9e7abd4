"""Attention over packed rows of tokens: the one place where images of different lengths meet."""

from itertools import groupby

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mixar.model.dropout import drop

Lengths = tuple[int, ...]  # tokens of each image in a packed row, known on the host


def runs(lengths: Lengths) -> list[tuple[int, int]]:
    """Runs of consecutive images of one length, as (images, length)."""
    return [(len(list(images)), length) for length, images in groupby(lengths)]


def attend(q: Tensor, k: Tensor, v: Tensor, dropout: float, keys: Tensor | None) -> Tensor:
    """Softmax attention of equal-length images, q [B, L, H, d] on k and v [B, M, H, d]: [B, L, H, d].

    Args:
        dropout: of the attention weights.
        keys: int64 [B, L], one a query; None drops nothing.
    """
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if keys is None:
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    if q.device.type != "cpu":  # the fused kernels draw by themselves, from torch's generator
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout).transpose(1, 2)
    # on a CPU torch, too, holds all weights as soon as some of them are dropped
    weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
    heads = torch.arange(q.shape[1], device=q.device)[:, None]
    return (drop(weights, keys[:, None] + heads, 0, dropout) @ v).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention (timm's ViT layout: one qkv projection, in that order)."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, lengths: Lengths, keys: Tensor | None) -> Tensor:
        """x [T, D], image after image of `lengths`, each attending within itself: [T, D].

        Args:
            keys: int64 [T], what decides on dropout; None drops nothing.
        """
        qkv = rearrange(self.qkv(x), "t (three heads d) -> t three heads d", three=3, heads=self.heads)
        sizes = [images * length for images, length in runs(lengths)]
        parts = [None] * len(sizes) if keys is None else keys.split(sizes)
        outs = []
        for (images, length), rows, part in zip(runs(lengths), qkv.split(sizes), parts):
            q, k, v = rearrange(rows, "(b n) three heads d -> three b n heads d", b=images, n=length)
            out = attend(q, k, v, self.dropout, None if part is None else part.view(images, length))
            outs.append(rearrange(out, "b n heads d -> (b n) (heads d)"))
        x = self.proj(torch.cat(outs))
        return x if keys is None else drop(x, keys, 1, self.dropout)


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

    def forward(self, x: Tensor, lengths: Lengths, memory: Tensor, keys: Tensor | None) -> Tensor:
        """x [T, D] of `lengths`, each image on its own row of memory [B, N, D']: [T, D]. Keys as in `Attention`."""
        q = rearrange(self.q(x), "t (heads d) -> t heads d", heads=self.heads)
        k, v = (rearrange(f(memory), "b n (heads d) -> b n heads d", heads=self.heads) for f in (self.k, self.v))
        sizes = [images * length for images, length in runs(lengths)]
        counts = [images for images, _ in runs(lengths)]
        parts = [None] * len(sizes) if keys is None else keys.split(sizes)
        outs = []
        for (images, length), rows, part, ks, vs in zip(
            runs(lengths), q.split(sizes), parts, k.split(counts), v.split(counts)
        ):
            own = None if part is None else part.view(images, length)
            out = attend(rearrange(rows, "(b n) h d -> b n h d", b=images, n=length), ks, vs, self.dropout, own)
            outs.append(rearrange(out, "b n h d -> (b n) (h d)"))
        x = self.proj(torch.cat(outs))
        return x if keys is None else drop(x, keys, 1, self.dropout)
