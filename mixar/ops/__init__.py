"""The operators that training and sampling spend their bandwidth on, in plain PyTorch."""

import math
from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=8)
def _frequencies(features: int, max_period: float, device: torch.device) -> Tensor:
    half = features // 2
    return torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float32, device=device) / half)


def timestep_embed(t: Tensor, features: int = 256, max_period: float = 10000.0) -> Tensor:
    """Sinusoidal features of a timestep, [cos | sin], frequencies max_period^(-i / half).

    Args:
        t: [R], on the scale of the 1000 training steps.

    Returns:
        float32 [R, features].
    """
    angle = t.float()[:, None] * _frequencies(features, max_period, t.device)
    return torch.cat([angle.cos(), angle.sin()], -1)


def code_bits(codes: Tensor, bits: int) -> Tensor:
    """The ±1 bits of discrete tokens, least significant first; a dropped token (negative id) gives zeros.

    Args:
        codes: int64 [...].

    Returns:
        float32 [..., bits].
    """
    ones = (codes[..., None] >> torch.arange(bits, device=codes.device)) & 1
    return (2 * ones - 1).float() * (codes >= 0)[..., None]


def mix_gather(encoded: Tensor, rows: Tensor, filling: Tensor) -> Tensor:
    """The decoder's input before its positions: encoder output where a token was seen, `filling` elsewhere (Eq. 9).

    Args:
        encoded: [T, D], the encoder's packed output.
        rows: int64 [T], distinct places of those tokens in the flattened [B*P] sequence.
        filling: [B, P, D].

    Returns:
        [B, P, D].
    """
    return filling.flatten(0, 1).index_copy(0, rows, encoded.to(filling.dtype)).view_as(filling)
