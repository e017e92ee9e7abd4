"""Rows in groups, so that torch.compile sums a bias's gradient in the kernel that makes it.

The sum over all rows would read the gradient once more: inductor splits it into parts of its own choice, for which it
does not reorder the loops of the elementwise kernel before it. A sum over the rows of each group, and a small one over
the groups, it fuses with that kernel, if the kernel's tensors have the groups as a dimension of their own.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GROUPS = 64  # at most; as many columns of partial sums keep a GPU busy


def grouped(x: Tensor) -> Tensor:
    """Rows [R, w] as [n, R / n, w] where torch.compile makes a training step for a GPU; elsewhere x as it is."""
    if not (x.is_cuda and torch.compiler.is_compiling() and torch.is_grad_enabled()):
        return x
    return x.unflatten(0, (max(n for n in range(1, GROUPS + 1) if len(x) % n == 0), -1))


def flat(x: Tensor) -> Tensor:
    """The inverse of `grouped`: rows [R, w] as they are, or of [n, R / n, w]."""
    return x.flatten(0, -2)


class _Summed(torch.autograd.Function):
    """y, to which a bias was added already, with the gradient of that bias: the sum of each group, then of the sums."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, bias: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, grad.sum(1, dtype=torch.promote_types(grad.dtype, torch.float32)).sum(0)


class Linear(nn.Linear):
    """A linear map that also takes rows in groups, [n, m, w]."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 2 or self.bias is None:
            return super().forward(x)
        return _Summed.apply(F.linear(x, self.weight, self.bias.detach()), self.bias)
