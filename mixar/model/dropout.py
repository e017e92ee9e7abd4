"""Dropout as a function of the image: the same units are dropped for any micro-batch, rank and engine.

A mask is a window of a long row of random bits, at an offset given by the token's key. Reading a window costs a
fraction of drawing one, and the row is the same on every machine.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixar import rng
from mixar.rng import Stream

TOSSES = 1 << 24


class Dropping(nn.Module):
    """A module with a probability of dropout.

    Attributes:
        dropout: the probability in training.
    """

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout

    @property
    def now(self) -> float:
        """The present probability, 0 outside of training."""
        return self.dropout if self.training else 0.0


@lru_cache(maxsize=8)
def _tosses(p: float, device: torch.device) -> Tensor:
    """bool [TOSSES], True (keep) with probability 1 - p."""
    u = torch.rand(TOSSES, generator=torch.Generator().manual_seed(0))
    return (u >= p).to(device)


# a custom operator, so that torch.compile does not trace into it: the row is too long to be a constant of every graph
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


def drop(x: Tensor, keys: Tensor | None, site: int, p: float) -> Tensor:
    """x [..., W] with each value set to zero with probability p, else divided by 1 - p.

    Args:
        keys: int64 [...], one per row of x: they decide which values are dropped. None leaves it to torch's generator,
            which is faster on a GPU.
        site: index of this dropout in the layer.
    """
    if keys is None or p == 0:
        return F.dropout(x, p)
    return torch.where(_kept(keys, site, x.shape[-1], p), x * (1 / (1 - p)), 0.0)
