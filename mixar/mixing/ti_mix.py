"""TI-Mix (Eq. 12): a transition from the true discrete tokens to the prior's in the course of training."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from mixar.config import TIMixConfig


class Mixture(NamedTuple):
    """The tokens that replace true ones in TI-Mix, and the positions; the operator that embeds tokens also mixes them.

    Attributes:
        drawn: int64 [B, N], the prior's x̂_d.
        rho: float32 [B, N], uniform on [0, 1).
        share: float32 [1], λ.
    """

    drawn: Tensor
    rho: Tensor
    share: Tensor


def ground_truth_share(cfg: TIMixConfig, epoch: float) -> float:
    """λ, the share of masked positions that keep their true token, after `epoch` epochs."""
    if not cfg.enabled or epoch < cfg.start_epoch:
        return 1.0
    if cfg.schedule == "constant" or epoch >= cfg.start_epoch + cfg.duration_epochs:
        return cfg.end
    progress = (epoch - cfg.start_epoch) / cfg.duration_epochs
    fallen = progress if cfg.schedule == "linear" else (1 - math.cos(math.pi * progress)) / 2
    return 1 + (cfg.end - 1) * fallen


def ti_mix(codes: Tensor, drawn: Tensor, masked: Tensor, rho: Tensor, share: float | Tensor) -> Tensor:
    """Eq. 12: the true token where ρ < λ or the position is visible, the prior's draw elsewhere.

    Args:
        codes: int64 [B, N], x_d.
        drawn: int64 [B, N], the prior's x̂_d.
        masked: bool [B, N].
        rho: float [B, N], uniform on [0, 1).
        share: λ.

    Returns:
        int64 [B, N].
    """
    return torch.where(masked & (rho >= share), drawn, codes)
