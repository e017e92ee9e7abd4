"""The KL autoencoder between images and continuous latents.

It has the architecture of latent diffusion (Rombach et al. 2022), in the two geometries with published weights: VA-VAE
f16d32 (Yao et al. 2025) and MAR's KL-16 (Li et al. 2024). The names of the modules are those of the weights.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mixar.codecs.layers import conv3, norm, stack
from mixar.config import VAEConfig


class VAE(nn.Module):
    """An encoder to the moments of a diagonal Gaussian, a decoder of its samples; h = H / stride, C latent channels.

    The published weights use images in [-1, 1], which is internal to this class.
    """

    def __init__(self, cfg: VAEConfig) -> None:
        super().__init__()
        self.config = cfg
        self.encoder = _encoder(cfg)
        self.decoder = _decoder(cfg)
        self.quant_conv = nn.Conv2d(2 * cfg.latent_channels, 2 * cfg.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(cfg.latent_channels, cfg.latent_channels, 1)

    def encode(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] to moments [B, 2C, h, w]: the means, then the log-variances."""
        return self.quant_conv(self.encoder(images * 2 - 1))

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, C, h, w] in the scale of `encode` to float32 images [B, 3, H, W], nominally in [0, 1]."""
        return self.decoder(self.post_quant_conv(latents)).float() / 2 + 0.5

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """For training: images as in `encode` and standard normal noise [B, C, h, w] to reconstruction and moments."""
        moments = self.encode(images)
        mean, std = posterior(moments)
        return self.decode(mean + std * noise), moments


def posterior(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, each [B, C, h, w] float32, of moments [B, 2C, h, w]; log-variance in [-30, 20]."""
    mean, logvar = moments.float().chunk(2, dim=1)
    return mean, torch.exp(0.5 * logvar.clamp(-30, 20))


def kl(moments: Tensor) -> Tensor:
    """KL divergence [B] of the posterior from the unit Gaussian, in nats, summed over the latents per image."""
    mean, std = posterior(moments)
    return 0.5 * (mean**2 + std**2 - 1 - 2 * std.log()).sum(dim=(1, 2, 3))


class ResBlock(nn.Module):
    """[B, inputs, h, w] to [B, outputs, h, w]: two pre-activated convolutions, added to the input."""

    def __init__(self, inputs: int, outputs: int, groups: int) -> None:
        super().__init__()
        self.norm1 = norm(inputs, groups)
        self.conv1 = conv3(inputs, outputs)
        self.norm2 = norm(outputs, groups)
        self.conv2 = conv3(outputs, outputs)
        self.nin_shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.nin_shortcut(x) + h


class Attention(nn.Module):
    """Self-attention with one head over the positions of a feature map [B, width, h, w]."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.norm = norm(width, groups)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (rearrange(project(h), "b d h w -> b 1 (h w) d") for project in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(rearrange(h, "b 1 (h w) d -> b d h w", h=x.shape[-2]))


class Level(nn.Module):
    """The residual blocks of one resolution, each followed by attention if the level has it."""

    def __init__(self, inputs: int, width: int, blocks: int, attention: bool, groups: int) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResBlock(inputs if i == 0 else width, width, groups) for i in range(blocks))
        self.attn = nn.ModuleList(Attention(width, groups) if attention else nn.Identity() for _ in range(blocks))
        self.downsample: nn.Module = nn.Identity()
        self.upsample: nn.Module = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        for block, attn in zip(self.block, self.attn):
            x = attn(block(x))
        return self.upsample(self.downsample(x))


def _middle(width: int, groups: int) -> nn.Sequential:
    return stack(
        block_1=ResBlock(width, width, groups),
        attn_1=Attention(width, groups),
        block_2=ResBlock(width, width, groups),
    )


def _attends(cfg: VAEConfig, level: int) -> bool:
    return bool({level, level - len(cfg.multipliers)} & set(cfg.attention_levels))


def _encoder(cfg: VAEConfig) -> nn.Sequential:
    widths = [cfg.width * multiplier for multiplier in cfg.multipliers]
    down = nn.Sequential()
    for i, (inputs, width) in enumerate(pairwise([cfg.width, *widths])):
        level = Level(inputs, width, cfg.blocks, _attends(cfg, i), cfg.norm_groups)
        if i < len(widths) - 1:
            # the published weights expect zero padding at the right and the bottom only
            level.downsample = stack(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=nn.Conv2d(width, width, 3, stride=2))
        down.append(level)
    return stack(
        conv_in=conv3(3, cfg.width),
        down=down,
        mid=_middle(widths[-1], cfg.norm_groups),
        norm_out=norm(widths[-1], cfg.norm_groups),
        act=nn.SiLU(),
        conv_out=conv3(widths[-1], 2 * cfg.latent_channels),
    )


def _decoder(cfg: VAEConfig) -> nn.Sequential:
    widths = [cfg.width * multiplier for multiplier in cfg.multipliers]
    up = {}  # the deepest level comes first; each is named by the index of its resolution
    for i, (inputs, width) in reversed(list(enumerate(zip([*widths[1:], widths[-1]], widths)))):
        up[str(i)] = Level(inputs, width, cfg.blocks + 1, cfg.decoder_attention and _attends(cfg, i), cfg.norm_groups)
        if i > 0:
            up[str(i)].upsample = stack(nearest=nn.Upsample(scale_factor=2), conv=conv3(width, width))
    return stack(
        conv_in=conv3(cfg.latent_channels, widths[-1]),
        mid=_middle(widths[-1], cfg.norm_groups),
        up=stack(**up),
        norm_out=norm(widths[0], cfg.norm_groups),
        act=nn.SiLU(),
        conv_out=conv3(widths[0], 3),
    )
