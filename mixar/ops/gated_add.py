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


def backward_reference(grad: Tensor, gate: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of gate and branch; that of x is `grad`."""
    return grad * branch, grad * gate


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return grad, *torch.ops.mixar.gated_add_backward(grad, *ctx.saved_tensors)


define(
    "gated_add(Tensor x, Tensor gate, Tensor branch) -> Tensor", reference, lambda x, gate, branch: torch.empty_like(x)
)
define(
    "gated_add_backward(Tensor grad, Tensor gate, Tensor branch) -> (Tensor, Tensor)",
    backward_reference,
    lambda grad, gate, branch: (torch.empty_like(grad), torch.empty_like(grad)),
)
torch.library.register_autograd("mixar::gated_add", _backward, setup_context=_setup, lib=LIBRARY)
