"""Dropout as a function of the image: the same units are dropped whatever the micro-batch, the rank or the engine.

A mask is a window of a long row of coin tosses, at a place that a token's key decides. To read a window costs a
fraction of drawing one, and the row is the same on every machine.
"""

from functools import lru_cache

import torch
from torch import Tensor

from mixar import rng
from mixar.rng import Stream

TOSSES = 1 << 24


@lru_cache(maxsize=8)
def _tosses(p: float, device: torch.device) -> Tensor:
    """bool [TOSSES], True (keep) with chance 1 - p."""
    u = torch.rand(TOSSES, generator=torch.Generator().manual_seed(0))
    return (u >= p).to(device)


# an operator, so that a compiled block takes it as it is: the row is too long to become a constant of every graph
@torch.library.custom_op("mixar::kept", mutates_args=())
def _kept(keys: Tensor, site: int, width: int, p: float) -> Tensor:
    windows = _tosses(p, keys.device).as_strided((TOSSES - width, width), (1, 1))
    start = rng.bits(site, Stream.DROPOUT, keys.flatten(), 1)[:, 0].remainder(TOSSES - width)
    return windows[start.view(keys.shape)]


@_kept.register_fake
def _(keys: Tensor, site: int, width: int, p: float) -> Tensor:
    return keys.new_empty((*keys.shape, width), dtype=torch.bool)


def token_keys(keys: Tensor, tokens: int, layer: int) -> Tensor:
    """int64 [B, tokens], one key per token in one layer, from one key per image, int64 [B]."""
    return rng.bits(layer, Stream.DROPOUT, keys, tokens)


def drop(x: Tensor, keys: Tensor, site: int, p: float) -> Tensor:
    """x [..., W] with each value zero with chance p, else divided by 1 - p, as the row's key int64 [...] decides.

    Args:
        site: which dropout of the layer it is.
    """
    return torch.where(_kept(keys, site, x.shape[-1], p), x * (1 / (1 - p)), 0.0)
