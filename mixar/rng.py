"""Random numbers as a pure function of (seed, stream, index), without a generator state to store and restore.

Every random number of training and sampling is keyed by the global index of its image, so that it is the same for any
batch size and any number of ranks, and after resuming. The generator is SplitMix64 (Steele, Lea, Flood 2014): a counter
times the golden ratio, followed by a 64-bit finaliser. The integer part is bit-exact on every device.
"""

import math
from enum import IntEnum

import torch
from torch import Tensor


class Stream(IntEnum):
    """The purpose of random numbers. Streams are independent; do not renumber them, since old runs must resume."""

    DATA_ORDER = 1
    FLIP = 2
    POSTERIOR = 3
    MASK_ORDER = 4
    MASK_RATIO = 5
    CLASS_DROP = 6
    CODE_DROP = 7
    TIMESTEP = 8
    NOISE = 9
    RHO = 10
    PRIOR_FILL = 11
    PRIOR_RATIO = 12
    PRIOR_MASK = 13
    PRIOR_TOKEN = 14
    PRIOR_GUMBEL = 15
    DROPOUT = 16
    SAMPLE_ORDER = 17
    SAMPLE_INIT = 18
    SAMPLE_STEP = 19
    INIT = 20


def _signed(x: int) -> int:
    """The int64 with the same 64 bits as the unsigned `x`."""
    return x - (1 << 64) if x >= 1 << 63 else x


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MIX1 = _signed(0xBF58476D1CE4E5B9)
_MIX2 = _signed(0x94D049BB133111EB)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    # torch's >> on int64 is arithmetic; the mask makes it logical
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _finalise(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * _MIX1
    x = (x ^ _shift_right(x, 27)) * _MIX2
    return x ^ _shift_right(x, 31)


def bits(seed: int, stream: Stream, index: Tensor, *shape: int, start: int = 0) -> Tensor:
    """64 random bits per element.

    Args:
        seed: the run's seed, or 0 if `index` holds a seed per image.
        index: int64 [B], the global index (or seed) of each image.
        shape: the shape per image.
        start: the counter of the first number, to continue a stream after an earlier call.

    Returns:
        int64 [B, *shape] on `index`'s device.
    """
    seed64 = _signed((seed * 0x2545F4914F6CDD1D + int(stream)) % (1 << 64))
    key = _finalise(torch.full((), seed64, dtype=torch.int64, device=index.device))  # without a copy to wait for
    row = _finalise(key + index * _GOLDEN)
    counter = torch.arange(start + 1, start + 1 + math.prod(shape), device=index.device)
    return _finalise(row[:, None] + counter * _GOLDEN).view(-1, *shape)


def uniform(seed: int, stream: Stream, index: Tensor, *shape: int, start: int = 0) -> Tensor:
    """float32 [B, *shape], uniform on [0, 1) in steps of 2^-24. Arguments as in `bits`."""
    return _shift_right(bits(seed, stream, index, *shape, start=start), 40).float() * 2.0**-24


def normal(seed: int, stream: Stream, index: Tensor, *shape: int, start: int = 0) -> Tensor:
    """float32 [B, *shape], standard normal by Box and Muller: each 64 bits give a pair. Arguments as in `bits`."""
    count = math.prod(shape)
    pairs = bits(seed, stream, index, (count + 1) // 2, start=start)
    u1 = (_shift_right(pairs, 40).float() + 1) * 2.0**-24  # (0, 1]: its logarithm is finite
    u2 = ((pairs >> 8) & 0xFFFFFF).float() * 2.0**-24
    radius, angle = torch.sqrt(-2 * torch.log(u1)), 2 * math.pi * u2
    both = torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], -1)
    return both.flatten(1)[:, :count].reshape(-1, *shape)


def gumbel(seed: int, stream: Stream, index: Tensor, *shape: int, start: int = 0) -> Tensor:
    """float32 [B, *shape], standard Gumbel, -log(-log(u)). Arguments as in `bits`."""
    u = (_shift_right(bits(seed, stream, index, *shape, start=start), 40).float() + 0.5) * 2.0**-24
    return -torch.log(-torch.log(u))


def permutation(seed: int, stream: Stream, index: Tensor, n: int) -> Tensor:
    """int64 [B, n], a uniform random permutation of 0..n-1 per image."""
    return bits(seed, stream, index, n).argsort(-1)


def categorical(probs: Tensor, u: Tensor) -> Tensor:
    """Samples by the inverse CDF: the number of categories whose cumulative probability is at most u.

    Args:
        probs: [..., K], summing to one.
        u: [...], uniform on [0, 1).

    Returns:
        int64 [...], in 0..K-1.
    """
    # by rounding, the last cumulative value can be below u
    return (probs.cumsum(-1) <= u[..., None]).sum(-1).clamp_max(probs.shape[-1] - 1)
