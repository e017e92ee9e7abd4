"""Code ids and their sub-tokens: the n bits per position in m equal splits, of which split 0 holds the low bits."""

import torch
from torch import Tensor


def split_ids(ids: Tensor, bits: int, splits: int) -> Tensor:
    """Sub-tokens int64 [B, N, m], each in 0..2^(bits/splits)-1, of code ids int64 [B, N]."""
    width = bits // splits
    return (ids[..., None] >> _shifts(width, splits, ids)) & (2**width - 1)


def combine_ids(sub: Tensor, bits: int) -> Tensor:
    """Code ids int64 [B, N] of sub-tokens int64 [B, N, m]: the inverse of `split_ids`."""
    splits = sub.shape[-1]
    return (sub << _shifts(bits // splits, splits, sub)).sum(-1)


def _shifts(width: int, splits: int, like: Tensor) -> Tensor:
    return torch.arange(splits, device=like.device) * width
