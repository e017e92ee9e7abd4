"""The scale between the VAE's latents and the model's tokens."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LatentNorm:
    """Per-channel statistics that normalise latents [B, C, h, w] to zero mean and unit variance, and back."""

    mean: Tensor  # [C]
    std: Tensor  # [C]

    @classmethod
    def from_scale(cls, scale: float, channels: int) -> "LatentNorm":
        """MAR's form: one factor for all channels, normalised = latents * scale."""
        return cls(torch.zeros(channels), torch.full((channels,), 1 / scale))

    @classmethod
    def from_dict(cls, values: dict[str, list[float]]) -> "LatentNorm":
        """The inverse of `to_dict`."""
        return cls(torch.tensor(values["mean"]), torch.tensor(values["std"]))

    def to_dict(self) -> dict[str, list[float]]:
        """As plain values, for files."""
        return {"mean": self.mean.tolist(), "std": self.std.tolist()}

    def to(self, device: torch.device | str) -> "LatentNorm":
        """The same on a device, so that no use of it waits for a copy."""
        return LatentNorm(self.mean.to(device), self.std.to(device))

    def normalise(self, latents: Tensor) -> Tensor:
        """From the scale of `VAE.encode` to the model's."""
        return (latents - self.mean[:, None, None]) / self.std[:, None, None]

    def denormalise(self, latents: Tensor) -> Tensor:
        """From the model's scale to that of `VAE.decode`."""
        return latents * self.std[:, None, None] + self.mean[:, None, None]
