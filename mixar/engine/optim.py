"""AdamW, its parameter groups, and the learning rate as a function of images seen."""

import importlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mixar.config import Config, OptimConfig
from mixar.errors import UserError


def build_optimizer(
    parameters: dict[str, Tensor], cfg: OptimConfig, decays: Callable[[str], bool]
) -> torch.optim.Optimizer:
    """AdamW in two groups, with and without weight decay, divided by `decays(name)`.

    Its step does nothing if its attribute `found_inf` is set.

    Raises:
        UserError: `optim.implementation=apex` without a CUDA card or without NVIDIA's apex.
    """
    groups = [
        {
            "params": [p for name, p in parameters.items() if decays(name) is decay],
            "weight_decay": cfg.weight_decay if decay else 0.0,
        }
        for decay in (True, False)
    ]
    # a rank may hold no slice of a small model, but AdamW needs a parameter
    filled = [group for group in groups if group["params"]] or [{"params": [torch.zeros(1)]}]
    betas = (cfg.betas[0], cfg.betas[1])
    if cfg.implementation == "torch":
        return torch.optim.AdamW(filled, lr=0.0, betas=betas, fused=True)  # skips without a synchronisation
    if not all(p.is_cuda for p in parameters.values()):
        raise UserError("optim.implementation=apex needs a CUDA card, not a CPU: write optim.implementation=torch")
    return apex_adamw(filled, betas)


def apex_adamw(groups: list[dict[str, Any]], betas: tuple[float, float]) -> torch.optim.Optimizer:
    """apex's FusedAdam as AdamW, with the skipping and the state of torch's AdamW.

    Raises:
        UserError: NVIDIA's apex is missing.
    """
    try:
        fused_adam: Any = importlib.import_module("apex.optimizers").FusedAdam

        class Apex(fused_adam):  # the base class is known only at run time
            found_inf: torch.Tensor | None = None

            def step(self) -> None:
                # waits for the device once, since this kernel always writes
                if self.found_inf is not None and self.found_inf.item():
                    return
                for group in self.param_groups:
                    counts = [self.state[p]["step"] for p in group["params"] if "step" in self.state[p]]
                    if counts:  # ZeRO-3 steps with one of its partitions in one group at a time
                        group["step"] = int(counts[0].item())  # apex counts by group, checkpoints by parameter
                        torch._foreach_add_(counts, 1)
                super().step()

        return Apex(groups, lr=0.0, betas=betas, adam_w_mode=True)
    except Exception as error:  # without its CUDA extension it may raise anything
        reason = " ".join(str(error).split())
        raise UserError(
            "optim.implementation=apex needs NVIDIA's apex, built from github.com/NVIDIA/apex with CUDA extensions; "
            f"PyPI's apex is another package ({reason}): install it, or write optim.implementation=torch"
        ) from None


def learning_rate(cfg: Config, epoch: float) -> float:
    """The learning rate after `epoch` epochs: linear in the global batch, linear warm-up, then the schedule."""
    optim, train = cfg.optim, cfg.train
    peak = optim.lr * train.batch / 256
    if epoch < optim.warmup_epochs:
        return peak * epoch / optim.warmup_epochs
    if optim.schedule == "constant":
        return peak
    progress = min(1.0, (epoch - optim.warmup_epochs) / max(train.epochs - optim.warmup_epochs, 1e-9))
    return peak * (1 - progress if optim.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2)
