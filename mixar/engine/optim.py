"""AdamW, its parameter groups, and the learning rate as a function of images seen."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from mixar.config import OptimConfig


def build_optimizer(
    parameters: dict[str, Tensor], cfg: OptimConfig, decays: Callable[[str], bool]
) -> torch.optim.AdamW:
    """AdamW in two groups, with and without weight decay, as `decays(name)` says."""
    groups = [
        {
            "params": [p for name, p in parameters.items() if decays(name) is decay],
            "weight_decay": cfg.weight_decay if decay else 0.0,
        }
        for decay in (True, False)
    ]
    # a rank may hold no slice of a small model, and AdamW wants a parameter
    filled = [group for group in groups if group["params"]] or [{"params": [torch.zeros(1)]}]
    return torch.optim.AdamW(filled, lr=0.0, betas=(cfg.betas[0], cfg.betas[1]), fused=True)


def learning_rate(cfg: OptimConfig, batch: int, epoch: float, epochs: float) -> float:
    """lr after `epoch` epochs: linear scaling with the global batch, linear warm-up, then the schedule."""
    peak = cfg.lr * batch / 256
    if epoch < cfg.warmup_epochs:
        return peak * epoch / cfg.warmup_epochs
    if cfg.schedule == "constant":
        return peak
    progress = min(1.0, (epoch - cfg.warmup_epochs) / max(epochs - cfg.warmup_epochs, 1e-9))
    return peak * (1 - progress if cfg.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2)
