"""Random numbers as a pure function of (seed, stream, index), without a generator state to store and restore.

Every random number of training and sampling is keyed by the global index of its image, so that it is the same for any
batch size and any number of ranks, and after resuming. The generator is SplitMix64 (Steele, Lea, Flood 2014): a counter
times the golden ratio, followed by a 64-bit finaliser, in `mixar.ops.random`. The integer part is bit-exact on every
device.
"""

import math
from enum import IntEnum

import torch
from torch import Tensor

from mixar.ops import random_bits, random_normal, random_uniform


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


def _key(seed: int, stream: Stream) -> int:
    """The hash of seed and stream as int64, by the finaliser of SplitMix64 in Python's integers."""
    x = (seed * 0x2545F4914F6CDD1D + int(stream)) % (1 << 64)
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % (1 << 64)
    x = (x ^ x >> 27) * 0x94D049BB133111EB % (1 << 64)
    x ^= x >> 31
    return x - (1 << 64) if x >= 1 << 63 else x


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
    return random_bits(index, _key(seed, stream), start, math.prod(shape)).view(index.shape[0], *shape)


def uniform(seed: int, stream: Stream, index: Tensor, *shape: int, start: int = 0) -> Tensor:
    """float32 [B, *shape], uniform on [0, 1) in steps of 2^-24. Arguments as in `bits`."""
    return random_uniform(index, _key(seed, stream), start, math.prod(shape)).view(index.shape[0], *shape)


def normal(seed: int, stream: Stream, index: Tensor, *shape: int, start: int = 0) -> Tensor:
    """float32 [B, *shape], standard normal by Box and Muller: each 64 bits give a pair. Arguments as in `bits`."""
    return random_normal(index, _key(seed, stream), start, math.prod(shape)).view(index.shape[0], *shape)


def gumbel(seed: int, stream: Stream, index: Tensor, *shape: int, start: int = 0) -> Tensor:
    """float32 [B, *shape], standard Gumbel, -log(-log(u)). Arguments as in `bits`."""
    u = uniform(seed, stream, index, *shape, start=start) + 2.0**-25  # the middle of each step of `uniform`
    u = u.clamp_max(1 - 2.0**-24)  # that of the last one rounds to 1, whose value would be infinite
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
