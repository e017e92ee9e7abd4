"""Linear layers of a network that only samples, on a CPU."""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _Packed:
    """A linear layer's forward with its weights in oneDNN's blocks, packed once a precision.

    torch hands a float32 product to MKL and packs bfloat16 weights again in every call. The operators that do better
    are those which torch.compile itself emits, and have no public name.
    """

    def __init__(self, layer: nn.Linear) -> None:
        self.layer = layer
        self._packed: dict[torch.dtype, tuple[Tensor, int, Tensor]] = {}  # of which weight and version

    def __reduce__(self) -> tuple[type, tuple[nn.Linear]]:
        return _Packed, (self.layer,)  # packed weights can neither be copied nor pickled

    def __call__(self, x: Tensor) -> Tensor:
        weight, bias = self.layer.weight, self.layer.bias
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        if torch.is_grad_enabled() or dtype not in _dtypes():
            return F.linear(x, weight, bias)
        source, version, packed = self._packed.get(dtype, (None, 0, weight))
        if source is not weight or version != weight._version:  # new, or changed since, as by loading other weights
            packed = torch.ops.mkldnn._reorder_linear_weight(weight.to(dtype), None)
            self._packed[dtype] = weight, weight._version, packed
        added = None if bias is None else bias.to(dtype)
        return torch.ops.mkldnn._linear_pointwise(x.to(dtype), packed, added, "none", [], "")


@lru_cache(maxsize=1)
def _dtypes() -> tuple[torch.dtype, ...]:
    half = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return (torch.float32, torch.bfloat16) if half else (torch.float32,)


def pack_linears(network: nn.Module) -> None:
    """Let a network's linear layers run on packed weights where no gradients are asked for; results differ by rounding.

    Only layers on the CPU, where they must stay; torch.compile cannot trace them. The packed weights are kept beside
    the layers' own, which remain as they are: names, state dict and training.
    """
    if torch.backends.mkldnn.is_available():
        for layer in network.modules():
            if type(layer) is nn.Linear and layer.weight.device.type == "cpu":
                layer.forward = _Packed(layer)  # type: ignore[method-assign, assignment]
