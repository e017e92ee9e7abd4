"""Random numbers as a function of a key, an image's index and a counter: SplitMix64 (Steele, Lea, Flood 2014)."""

import math

import torch
from torch import Tensor

from mixar.ops.native import define, in_one

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)  # as int64, like the two below
_MIX1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX2 = 0x94D049BB133111EB - (1 << 64)


def random_bits(index: Tensor, key: int, start: int, count: int) -> Tensor:
    """64 random bits per number.

    Args:
        index: int64 [B], the index (or seed) of each image.
        key: int64, the hash of what else the numbers depend on.
        start: the counter before the first number of an image, which are numbered from 1 on.
        count: of numbers per image.

    Returns:
        int64 [B, count] on `index`'s device.
    """
    draw = torch.ops.mixar.random_bits if in_one(index.device.type) else bits_reference
    return draw(index, key, start, count)


def random_uniform(index: Tensor, key: int, start: int, count: int) -> Tensor:
    """float32 [B, count], uniform on [0, 1) in steps of 2^-24. Arguments as in `random_bits`."""
    draw = torch.ops.mixar.random_uniform if in_one(index.device.type) else uniform_reference
    return draw(index, key, start, count)


def random_normal(index: Tensor, key: int, start: int, count: int) -> Tensor:
    """float32 [B, count], standard normal: 64 bits for each pair. Arguments as in `random_bits`."""
    # a CPU composes it in any case, so that its numbers do not depend on a compiler
    composed = index.device.type == "cpu"
    return (normal_reference if composed else torch.ops.mixar.random_normal)(index, key, start, count)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    # torch's >> on int64 is arithmetic; the mask makes it logical
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _finalise(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * _MIX1
    x = (x ^ _shift_right(x, 27)) * _MIX2
    return x ^ _shift_right(x, 31)


def bits_reference(index: Tensor, key: int, start: int, count: int) -> Tensor:
    """`random_bits` in plain PyTorch."""
    row = _finalise(index * _GOLDEN + key)
    counter = torch.arange(start + 1, start + 1 + count, device=index.device)
    return _finalise(row[:, None] + counter * _GOLDEN)


def uniform_reference(index: Tensor, key: int, start: int, count: int) -> Tensor:
    """`random_uniform` in plain PyTorch."""
    return _shift_right(random_bits(index, key, start, count), 40).float() * 2.0**-24


def normal_reference(index: Tensor, key: int, start: int, count: int) -> Tensor:
    """`random_normal` in plain PyTorch, by Box and Muller."""
    pairs = random_bits(index, key, start, (count + 1) // 2)
    u1 = (_shift_right(pairs, 40).float() + 1) * 2.0**-24  # (0, 1]: its logarithm is finite
    u2 = ((pairs >> 8) & 0xFFFFFF).float() * 2.0**-24
    radius, angle = torch.sqrt(-2 * torch.log(u1)), 2 * math.pi * u2
    both = torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], -1)
    return both.flatten(1)[:, :count].contiguous()


def _bits_fake(index: Tensor, key: int, start: int, count: int) -> Tensor:
    return index.new_empty(index.shape[0], count)


def _float_fake(index: Tensor, key: int, start: int, count: int) -> Tensor:
    return index.new_empty(index.shape[0], count, dtype=torch.float32)


_ARGUMENTS = "(Tensor index, SymInt key, SymInt start, SymInt count) -> Tensor"
define(f"random_bits{_ARGUMENTS}", bits_reference, _bits_fake)
define(f"random_uniform{_ARGUMENTS}", uniform_reference, _float_fake)
define(f"random_normal{_ARGUMENTS}", normal_reference, _float_fake)
