"""Conversion of images between float32 in [0, 1], as in networks, and uint8, as in files."""

from torch import Tensor, uint8


def from_bytes(images: Tensor) -> Tensor:
    """uint8 [B, 3, H, W] to float32 in [0, 1]."""
    return images.float() / 255


def to_bytes(images: Tensor) -> Tensor:
    """Images [B, 3, H, W], nominally in [0, 1], to uint8: clamped, then rounded to the nearest level, halves up.

    MaskBit's own script truncates instead, which darkens an image by half a level on average.
    """
    return (255 * images.float() + 0.5).clamp(0, 255).to(uint8)
