"""Where this process stands: its rank, its device, its precision."""

import os
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from mixar.errors import UserError


@dataclass(frozen=True)
class Place:
    """One process of a run."""

    rank: int
    world: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def autocast(self, precision: str) -> AbstractContextManager:
        """bfloat16 autocast for `bf16`, float32 for `fp32`."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=precision == "bf16")


def device() -> torch.device:
    """This process's accelerator, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def start() -> Place:
    """Find this process's place from its launcher's environment.

    Raises:
        UserError: more than one process.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1:
        raise UserError(
            f"{world} processes were launched, training on several processes is not built yet: start one process, "
            "python mixar/train.py CONFIG"
        )
    return Place(rank=int(os.environ.get("RANK", "0")), world=world, device=device())


def fast_precision(on: torch.device) -> str:
    """`bf16` where the hardware multiplies it natively, else `fp32`."""
    if on.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() else "fp32"
