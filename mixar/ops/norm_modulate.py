"""A layer norm and the modulation behind it in one pass, where no gradient is needed."""

import torch
import torch.nn.functional as F
from torch import Tensor

from mixar.ops.native import define


def norm_modulate(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, shift: Tensor, scale: Tensor, eps: float, dtype: torch.dtype
) -> Tensor:
    """(norm(x) · weight + bias) (1 + scale) + shift, in float32, rounded once. It has no gradient.

    Args:
        x: [R, w], float32 or bfloat16.
        weight, bias: float32 [w], or None.
        shift, scale: [R, w], float32 or bfloat16; columns of a wider tensor are not copied.
        dtype: float32 or bfloat16.

    Returns:
        [R, w] of `dtype`.

    Raises:
        RuntimeError: shapes or types do not fit.
    """
    return torch.ops.mixar.norm_modulate(x, weight, bias, shift, scale, eps, dtype)


def reference(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, shift: Tensor, scale: Tensor, eps: float, dtype: torch.dtype
) -> Tensor:
    """The operator in plain PyTorch."""
    h = F.layer_norm(x.float(), x.shape[-1:], weight, bias, eps)
    return (h * scale + h + shift).to(dtype)


def _fake(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, shift: Tensor, scale: Tensor, eps: float, dtype: torch.dtype
) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype)


define(
    "norm_modulate(Tensor x, Tensor? weight, Tensor? bias, Tensor shift, Tensor scale, float eps, ScalarType dtype) "
    "-> Tensor",
    reference,
    _fake,
)
