"""MaskBit's tokenizer between images and binary tokens (Weber et al. 2024).

A convolutional autoencoder whose K channels are quantised to their signs; the token of a position is the K-bit number
they spell, channel 0 the least significant. The names of the modules are those of the published weights.
"""

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mixar.codecs.layers import conv3, norm, stack
from mixar.config import TokenizerConfig
from mixar.ops import code_bits


def ids_from_bits(values: Tensor) -> Tensor:
    """The int64 ids [...] that the signs of values [..., n] spell; zero counts as -1."""
    return ((values > 0).long() << torch.arange(values.shape[-1], device=values.device)).sum(-1)


class Tokenizer(nn.Module):
    """Images [B, 3, H, W] in [0, 1] to tokens [B, N] and back; N = h w positions in raster order."""

    def __init__(self, cfg: TokenizerConfig) -> None:
        super().__init__()
        self.config = cfg
        self.encoder = _encoder(cfg)
        self.decoder = _decoder(cfg)
        self.quantize = Quantizer(cfg)

    def encode(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] to token ids [B, N] int64."""
        return ids_from_bits(rearrange(self.encoder(images), "b k h w -> b (h w) k"))

    def decode(self, ids: Tensor) -> Tensor:
        """Token ids [B, N] of a square grid to images [B, 3, H, W], nominally in [0, 1] but not clamped."""
        codes = self.quantize.codebook[ids]
        return self.decoder(rearrange(codes, "b (h w) k -> b k h w", h=math.isqrt(ids.shape[1])))

    def forward(
        self, images: Tensor, assignment: Tensor | None = None, survey: bool = False
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """For training: images [B, 3, H, W] to their reconstruction, with gradient, and the losses of `Quantizer`.

        Args:
            assignment: as in `Quantizer`, where these images are a part of the batch.
            survey: give these images' mean assignment [2^K] instead, and no losses.
        """
        z = self.encoder(images)
        if survey:
            return self.quantize.mean_assignment(z), {}
        codes, losses = self.quantize(z, assignment)
        return self.decoder(codes), losses


class Quantizer(nn.Module):
    """Lookup-free quantisation (Yu et al. 2024) of z [B, K, h, w] to its signs."""

    def __init__(self, cfg: TokenizerConfig) -> None:
        super().__init__()
        self.config = cfg
        # derived values, but the published state dict holds them
        self.codebook: Tensor
        self.register_buffer("bits_to_indices", 2 ** torch.arange(cfg.bits, dtype=torch.int32))
        self.register_buffer("codebook", code_bits(torch.arange(2**cfg.bits), cfg.bits))

    def forward(self, z: Tensor, assignment: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """The signs of z, with the gradient passed straight through, and the losses.

        Args:
            assignment: the mean of `mean_assignment` over the batch that z is one of several equal parts of. The mean
                over the parts then has the losses and gradients of the whole batch.

        Returns:
            codes [B, K, h, w], and scalars: `quantizer_loss`, which is the sum to minimise of `commitment_loss` and
            `entropy_loss` = weight (per_sample_entropy - avg_entropy), and the two entropies in nats.
        """
        z = z.float()
        codes = torch.where(z > 0, 1.0, -1.0)
        commitment = self.config.commitment_weight * F.mse_loss(z, codes)
        per_sample, average = self._entropies(z, assignment)
        entropy = self.config.entropy_weight * (per_sample - average)
        return z + (codes - z).detach(), {
            "quantizer_loss": commitment + entropy,
            "commitment_loss": commitment,
            "entropy_loss": entropy,
            "per_sample_entropy": per_sample,
            "avg_entropy": average,
        }

    def mean_assignment(self, z: Tensor) -> Tensor:
        """The mean of all positions' soft assignments to the codes, [2^K]."""
        return self._assignments(z.float()).mean(0)

    def _entropies(self, z: Tensor, assignment: Tensor | None) -> tuple[Tensor, Tensor]:
        """The mean entropy of a position's soft assignment to the codes; gamma times that of the mean one."""
        each = self._assignments(z)
        mean = each.mean(0)
        if assignment is not None:  # its value, and the gradient of a part, which is that of the whole in the mean
            mean = assignment + (mean - mean.detach())
        return _entropy(each).mean(), self.config.entropy_gamma * _entropy(mean)

    def _assignments(self, z: Tensor) -> Tensor:
        """Each position's soft assignment to the codes, [B h w, 2^K].

        Plainly over the whole codebook: 0.5 GB a copy for 32 images of 256 positions at 14 bits.
        """
        with torch.autocast(z.device.type, enabled=False):  # the temperature of 0.01 magnifies bf16's rounding
            affinities = 2 * rearrange(z, "b k h w -> (b h w) k") @ self.codebook.T
        return (affinities / self.config.entropy_temperature).softmax(-1)


def _entropy(probabilities: Tensor) -> Tensor:
    return -(probabilities * probabilities.clamp_min(1e-5).log()).sum(-1)


class ResBlock(nn.Module):
    """[B, inputs, h, w] to [B, outputs, h, w]: two pre-activated convolutions without bias."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1 = norm(inputs)
        self.conv1 = conv3(inputs, outputs, bias=False)
        self.norm2 = norm(outputs)
        self.conv2 = conv3(outputs, outputs, bias=False)
        self.nin_shortcut = nn.Conv2d(outputs, outputs, 1, bias=False) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        # where the width changes, the shortcut starts from the result: MaskGIT's quirk, which the weights expect
        return h + (x if self.nin_shortcut is None else self.nin_shortcut(h))


class Halve(nn.Conv2d):
    """3x3 convolution of stride 2 with TensorFlow's "same" padding: an odd side has a zero on both ends."""

    def __init__(self, width: int) -> None:
        super().__init__(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        return super().forward(F.pad(x, (width % 2, 1, height % 2, 1)))


def _blocks(inputs: int, width: int, count: int) -> nn.Sequential:
    return nn.Sequential(*(ResBlock(inputs if i == 0 else width, width) for i in range(count)))


def _encoder(cfg: TokenizerConfig) -> nn.Sequential:
    widths = [cfg.width * multiplier for multiplier in cfg.multipliers]
    down = nn.Sequential()
    for inputs, width in pairwise([cfg.width, *widths]):
        down.append(stack(res_blocks=_blocks(inputs, width, cfg.blocks)))
    for level, width in zip(down[:-1], widths):
        level.add_module("down_conv", Halve(width))
    return stack(
        conv_in=conv3(3, cfg.width, bias=False),
        down=down,
        mid=stack(res_blocks=_blocks(widths[-1], widths[-1], cfg.blocks)),
        norm_out=norm(widths[-1]),
        act=nn.SiLU(),
        conv_out=nn.Conv2d(widths[-1], cfg.bits, 1),
    )


def _decoder(cfg: TokenizerConfig) -> nn.Sequential:
    widths = [cfg.width * multiplier for multiplier in reversed(cfg.multipliers)]
    blocks = cfg.blocks if cfg.decoder_blocks is None else cfg.decoder_blocks
    up = nn.Sequential()
    for inputs, width in pairwise([widths[0], *widths]):
        up.append(stack(res_blocks=_blocks(inputs, width, blocks)))
    for level, width in zip(up[:-1], widths):
        level.add_module("nearest", nn.Upsample(scale_factor=2))
        level.add_module("upsample_conv", conv3(width, width))
    return stack(
        conv_in=conv3(cfg.bits, widths[0]),
        mid=stack(res_blocks=_blocks(widths[0], widths[0], blocks)),
        up=up,
        norm_out=norm(widths[-1]),
        act=nn.SiLU(),
        conv_out=conv3(widths[-1], 3),
    )
