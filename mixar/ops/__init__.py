"""Custom operators for the memory-bound parts of training and sampling.

Each has a reference in plain PyTorch here, and most a CPU and a CUDA kernel in csrc/ that `mixar.ops.native` loads.
"""

from mixar.ops.gated_add import gated_add
from mixar.ops.mix_gather import code_bits, mix_gather
from mixar.ops.native import in_one, load
from mixar.ops.norm_modulate import norm_modulate
from mixar.ops.random import random_bits, random_normal, random_uniform
from mixar.ops.timestep_embed import timestep_embed

__all__ = [
    "code_bits", "gated_add", "in_one", "load", "mix_gather", "norm_modulate", "random_bits", "random_normal",
    "random_uniform", "timestep_embed",
]  # fmt: skip
