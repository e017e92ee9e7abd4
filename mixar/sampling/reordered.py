"""Linear layers of a network that only samples, on a CPU."""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _Reordered:
    """A linear layer's forward with its weights in oneDNN's blocks, reordered once per precision.

    torch hands a float32 product to MKL and reorders bfloat16 weights again in every call. The operators that do better
    are those which torch.compile itself emits, and have no public name.
    """

    def __init__(self, layer: nn.Linear) -> None:
        self.layer = layer
        self._kept: dict[torch.dtype, tuple[Tensor, int, Tensor]] = {}  # of which weight and version

    def __reduce__(self) -> tuple[type, tuple[nn.Linear]]:
        return _Reordered, (self.layer,)  # reordered weights can neither be copied nor pickled

    def __call__(self, x: Tensor) -> Tensor:
        weight, bias = self.layer.weight, self.layer.bias
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        if torch.is_grad_enabled() or dtype not in _dtypes():
            return F.linear(x, weight, bias)
        source, version, reordered = self._kept.get(dtype, (None, 0, weight))
        if source is not weight or version != weight._version:  # new, or changed since, as by loading other weights
            reordered = torch.ops.mkldnn._reorder_linear_weight(weight.to(dtype), None)
            self._kept[dtype] = weight, weight._version, reordered
        added = None if bias is None else bias.to(dtype)
        return torch.ops.mkldnn._linear_pointwise(x.to(dtype), reordered, added, "none", [], "")


@lru_cache(maxsize=1)
def _dtypes() -> tuple[torch.dtype, ...]:
    half = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return (torch.float32, torch.bfloat16) if half else (torch.float32,)


def reorder_linears(network: nn.Module) -> None:
    """Let a network's linear layers run on reordered weights where no gradients are needed; results differ by rounding.

    Only layers on the CPU, where they must stay; torch.compile cannot trace them. The reordered weights are kept beside
    the layers' own, which remain as they are: names, state dict and training.
    """
    if torch.backends.mkldnn.is_available():
        for layer in network.modules():
            if type(layer) is nn.Linear and layer.weight.device.type == "cpu":
                layer.forward = _Reordered(layer)  # type: ignore[method-assign, assignment]
