"""The convolutional encoder and decoder of MaskBit's tokenizer (Weber et al. 2024), for any quantizer.

The names of the modules are those of the published weights.
"""

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from mixar.codecs.layers import conv3, norm, stack
from mixar.config import TokenizerConfig


class ResBlock(nn.Module):
    """[B, inputs, h, w] to [B, outputs, h, w]: two pre-activated convolutions without bias."""

    def __init__(self, inputs: int, outputs: int, groups: int) -> None:
        super().__init__()
        self.norm1 = norm(inputs, groups)
        self.conv1 = conv3(inputs, outputs, bias=False)
        self.norm2 = norm(outputs, groups)
        self.conv2 = conv3(outputs, outputs, bias=False)
        self.nin_shortcut = nn.Conv2d(outputs, outputs, 1, bias=False) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        # if the width changes, the shortcut starts from the result: a peculiarity of MaskGIT that the weights need
        return h + (x if self.nin_shortcut is None else self.nin_shortcut(h))


class Halve(nn.Conv2d):
    """3x3 convolution of stride 2 with TensorFlow's "same" padding: an odd side gets a zero at both ends."""

    def __init__(self, width: int) -> None:
        super().__init__(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        return super().forward(F.pad(x, (width % 2, 1, height % 2, 1)))


def _blocks(inputs: int, width: int, count: int, groups: int) -> nn.Sequential:
    return nn.Sequential(*(ResBlock(inputs if i == 0 else width, width, groups) for i in range(count)))


def encoder(cfg: TokenizerConfig, channels: int) -> nn.Sequential:
    """Images [B, 3, H, W] to z [B, channels, h, w]."""
    widths = [cfg.width * multiplier for multiplier in cfg.multipliers]
    down = nn.Sequential()
    for inputs, width in pairwise([cfg.width, *widths]):
        down.append(stack(res_blocks=_blocks(inputs, width, cfg.blocks, cfg.norm_groups)))
    for level, width in zip(down[:-1], widths):
        level.add_module("down_conv", Halve(width))
    return stack(
        conv_in=conv3(3, cfg.width, bias=False),
        down=down,
        mid=stack(res_blocks=_blocks(widths[-1], widths[-1], cfg.blocks, cfg.norm_groups)),
        norm_out=norm(widths[-1], cfg.norm_groups),
        act=nn.SiLU(),
        conv_out=nn.Conv2d(widths[-1], channels, 1),
    )


def decoder(cfg: TokenizerConfig, channels: int) -> nn.Sequential:
    """Codes [B, channels, h, w] to images [B, 3, H, W]."""
    widths = [cfg.width * multiplier for multiplier in reversed(cfg.multipliers)]
    blocks = cfg.blocks if cfg.decoder_blocks is None else cfg.decoder_blocks
    up = nn.Sequential()
    for inputs, width in pairwise([widths[0], *widths]):
        up.append(stack(res_blocks=_blocks(inputs, width, blocks, cfg.norm_groups)))
    for level, width in zip(up[:-1], widths):
        level.add_module("nearest", nn.Upsample(scale_factor=2))
        level.add_module("upsample_conv", conv3(width, width))
    return stack(
        conv_in=conv3(channels, widths[0]),
        mid=stack(res_blocks=_blocks(widths[0], widths[0], blocks, cfg.norm_groups)),
        up=up,
        norm_out=norm(widths[-1], cfg.norm_groups),
        act=nn.SiLU(),
        conv_out=conv3(widths[-1], 3),
    )
