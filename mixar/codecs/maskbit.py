"""MaskBit's tokenizer between images and binary tokens (Weber et al. 2024).

The K channels of the autoencoder are quantised to their signs, without a lookup (Yu et al. 2024). The token of a
position is the K-bit number of these signs, with channel 0 as the least significant bit.
"""

import torch
from torch import Tensor

from mixar.codecs.tokenizer import ConvTokenizer, Quantizer
from mixar.config import TokenizerConfig
from mixar.ops import code_bits


def ids_from_bits(values: Tensor) -> Tensor:
    """The int64 ids [...] given by the signs of values [..., n]; zero counts as -1."""
    return ((values > 0).long() << torch.arange(values.shape[-1], device=values.device)).sum(-1)


class MaskBitTokenizer(ConvTokenizer):
    """A tokenizer whose tokens are the signs of `bits` channels."""

    def __init__(self, cfg: TokenizerConfig) -> None:
        super().__init__(cfg, SignQuantizer(cfg), cfg.bits)


class SignQuantizer(Quantizer):
    """A quantizer to the corners of a cube."""

    codebook: Tensor

    def __init__(self, cfg: TokenizerConfig) -> None:
        super().__init__(cfg)
        # derived values, but the published state dict contains them
        self.register_buffer("bits_to_indices", 2 ** torch.arange(cfg.bits, dtype=torch.int32))
        self.register_buffer("codebook", code_bits(torch.arange(2**cfg.bits), cfg.bits))

    def codes(self) -> Tensor:
        return self.codebook

    def ids(self, z: Tensor) -> Tensor:
        return ids_from_bits(z.movedim(1, -1))
