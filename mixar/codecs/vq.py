"""A tokenizer with learned codes: VQ-VAE (van den Oord et al. 2017) with the codes on a sphere, as in ViT-VQGAN.

Codes and encoder outputs have the same norm (Yu et al. 2022), so that the nearest code is the one with the smallest
angle, and every code can be reached.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixar.codecs.tokenizer import ConvTokenizer, Losses, Quantizer
from mixar.config import TokenizerConfig


class VQTokenizer(ConvTokenizer):
    """A tokenizer whose tokens are indices of the nearest of 2^bits codes of `code_dim` channels."""

    def __init__(self, cfg: TokenizerConfig) -> None:
        assert cfg.code_dim is not None
        super().__init__(cfg, VectorQuantizer(cfg, cfg.code_dim), cfg.code_dim)


class VectorQuantizer(Quantizer):
    """A quantizer to learned codes on the sphere of radius √K, whose channels have the size of MaskBit's."""

    def __init__(self, cfg: TokenizerConfig, channels: int) -> None:
        super().__init__(cfg)
        self.codebook = nn.Parameter(torch.randn(2**cfg.bits, channels))

    def codes(self) -> Tensor:
        return self.scaled(self.codebook)

    def scaled(self, z: Tensor) -> Tensor:
        return F.normalize(z, dim=1) * z.shape[1] ** 0.5

    def ids(self, z: Tensor) -> Tensor:
        with torch.autocast(z.device.type, enabled=False):
            return (z.movedim(1, -1) @ self.codes().T).argmax(-1)

    def distances(self, z: Tensor, codes: Tensor) -> Losses:
        return super().distances(z, codes) | {"codebook_loss": F.mse_loss(codes, z.detach())}
