"""Copies from the host to a device that nobody waits for."""

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on `device`, without waiting for the device's running work."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
