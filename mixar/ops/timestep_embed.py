"""The sinusoidal features of timesteps."""

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from mixar.ops.native import LIBRARY, define


def timestep_embed(
    t: Tensor, features: int = 256, max_period: float = 10000.0, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Sinusoidal features of a timestep, [cos | sin], frequencies max_period^(-i / half).

    Args:
        t: [R], on the scale of the 1000 training steps.
        dtype: float32 or bfloat16; angles are float32 in either case.

    Returns:
        [R, features] of `dtype`.
    """
    return torch.ops.mixar.timestep_embed(t.float(), _frequencies(features, max_period, t.device), dtype)


@lru_cache(maxsize=8)
def _frequencies(features: int, max_period: float, device: torch.device) -> Tensor:
    # computed here for all kernels: their own exp would change the angle at t = 1000 by 1e-4
    half = features // 2
    return torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float32, device=device) / half)


def reference(t: Tensor, frequencies: Tensor, dtype: torch.dtype) -> Tensor:
    """The operator in plain PyTorch: t [R], frequencies [half], float32, to [R, 2 half] of `dtype`."""
    angle = t[:, None] * frequencies
    return torch.cat([angle.cos(), angle.sin()], -1).to(dtype)


def _fake(t: Tensor, frequencies: Tensor, dtype: torch.dtype) -> Tensor:
    return t.new_empty(t.shape[0], 2 * frequencies.shape[0], dtype=dtype)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, frequencies, _ = inputs
    ctx.save_for_backward(frequencies, output)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    frequencies, output = ctx.saved_tensors
    (cos, sin), (d_cos, d_sin) = output.float().chunk(2, -1), grad.float().chunk(2, -1)
    return (d_sin * cos - d_cos * sin) @ frequencies, None, None


define("timestep_embed(Tensor t, Tensor frequencies, ScalarType dtype) -> Tensor", reference, _fake)
torch.library.register_autograd("mixar::timestep_embed", _backward, setup_context=_setup, lib=LIBRARY)
