"""The gated residual connection of the diffusion head."""

from typing import Any

import torch
from torch import Tensor

from mixar.ops.native import LIBRARY, define


def gated_add(x: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
    """x + gate · branch, all [R, w].

    It is an operator so that torch.compile stores its result: a compiled head would otherwise read all earlier gates
    and branches again in each of its blocks, and compute their sums anew in the backward pass.
    """
    return torch.ops.mixar.gated_add(x, gate, branch)


def reference(x: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
    """The operator in plain PyTorch."""
    return torch.addcmul(x, gate, branch)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    gate, branch = ctx.saved_tensors
    return grad, grad * branch, grad * gate


define(
    "gated_add(Tensor x, Tensor gate, Tensor branch) -> Tensor", reference, lambda x, gate, branch: torch.empty_like(x)
)
torch.library.register_autograd("mixar::gated_add", _backward, setup_context=_setup, lib=LIBRARY)
