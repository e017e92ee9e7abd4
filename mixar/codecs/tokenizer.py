"""Discrete tokenizers: their interface, and the autoencoder with a quantizer that both implementations share."""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mixar.codecs.convolutions import decoder, encoder
from mixar.config import TokenizerConfig

Losses = dict[str, Tensor]


class Tokenizer(nn.Module):
    """Images [B, 3, H, W] in [0, 1] to tokens [B, N] and back; N = h w positions in raster order.

    A token is an id in 0..2^bits - 1. The prior reads its bits, in `prior.splits` sub-tokens. DC-Mix maps the same
    bits, or a vector of `code_dim` channels per id.

    Attributes:
        config: with `bits`, `code_dim` (None: DC-Mix maps the bits) and `stride`.
    """

    config: TokenizerConfig

    def encode(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] to token ids [B, N] int64."""
        raise NotImplementedError

    def decode(self, ids: Tensor) -> Tensor:
        """Token ids [B, N] of a square grid to float32 images [B, 3, H, W], nominally in [0, 1]."""
        raise NotImplementedError

    def codebook(self) -> Tensor:
        """The vectors [2^bits, code_dim] that DC-Mix maps; used only if there is a `code_dim`."""
        raise NotImplementedError

    def forward(self, images: Tensor, assignment: Tensor | None = None, survey: bool = False) -> tuple[Tensor, Losses]:
        """For training: images as in `encode` to their reconstruction, with gradient, and scalar losses.

        Args:
            assignment: [2^bits], the mean of the results of `survey` over a batch, if these images are a part of it.
            survey: instead return the mean assignment [2^bits] of these images to the codes, without losses.

        Returns:
            The losses contain `quantizer_loss`, to minimise together with that of reconstruction; the rest is logged.
        """
        raise NotImplementedError


class ConvTokenizer(Tokenizer):
    """The convolutional autoencoder with a quantizer of `channels` channels."""

    def __init__(self, cfg: TokenizerConfig, quantize: "Quantizer", channels: int) -> None:
        super().__init__()
        self.config = cfg
        self.encoder = encoder(cfg, channels)
        self.decoder = decoder(cfg, channels)
        self.quantize = quantize

    def encode(self, images: Tensor) -> Tensor:
        return self.quantize.ids(self.quantize.scaled(self.encoder(images).float())).flatten(1)

    def decode(self, ids: Tensor) -> Tensor:
        codes = self.quantize.codes()[ids]
        return self.decoder(rearrange(codes, "b (h w) k -> b k h w", h=math.isqrt(ids.shape[1]))).float()

    def codebook(self) -> Tensor:
        return self.quantize.codes()

    def forward(self, images: Tensor, assignment: Tensor | None = None, survey: bool = False) -> tuple[Tensor, Losses]:
        found, losses = self.quantize(self.encoder(images), assignment, survey)
        return found if survey else self.decoder(found).float(), losses


class Quantizer(nn.Module):
    """A map of z [B, K, h, w] to one of 2^bits codes at each position.

    Its entropy loss (Yu et al. 2024) favours a certain choice at each position, and the use of all codes in a batch.
    """

    def __init__(self, cfg: TokenizerConfig) -> None:
        super().__init__()
        self.config = cfg

    def codes(self) -> Tensor:
        """The codes [2^bits, K]."""
        raise NotImplementedError

    def scaled(self, z: Tensor) -> Tensor:
        """z [B, K, h, w], float32, in the scale of the codes."""
        return z

    def ids(self, z: Tensor) -> Tensor:
        """The int64 ids [B, h, w] of the codes nearest to the scaled z [B, K, h, w]."""
        raise NotImplementedError

    def distances(self, z: Tensor, codes: Tensor) -> Losses:
        """The weighted losses that pull the scaled z and its codes [B, K, h, w] together."""
        return {"commitment_loss": self.config.commitment_weight * F.mse_loss(z, codes.detach())}

    def forward(self, z: Tensor, assignment: Tensor | None = None, survey: bool = False) -> tuple[Tensor, Losses]:
        """The codes of z [B, K, h, w], with the gradient passed straight through to it, and the losses.

        Args:
            assignment: [2^bits], the mean of the results of `survey` over a batch, if z is one of its equal parts. The
                mean over the parts then has the losses and gradients of the whole batch.
            survey: instead return the mean over all positions of the soft assignment to the codes [2^bits], without
                losses.

        Returns:
            codes [B, K, h, w], and scalars: `quantizer_loss`, the loss to minimise, which is the sum of those of
            `distances` and `entropy_loss` = weight (per_sample_entropy - avg_entropy); the two entropies in nats.
        """
        z = self.scaled(z.float())
        if survey:
            return self._assignments(z).mean(0), {}
        codes = rearrange(self.codes()[self.ids(z)], "b h w k -> b k h w")
        losses = self.distances(z, codes)
        per_sample, average = self._entropies(z, assignment)
        losses["entropy_loss"] = self.config.entropy_weight * (per_sample - average)
        losses["quantizer_loss"] = torch.stack([*losses.values()]).sum()
        return z + (codes - z).detach(), losses | {"per_sample_entropy": per_sample, "avg_entropy": average}

    def _entropies(self, z: Tensor, assignment: Tensor | None) -> tuple[Tensor, Tensor]:
        """The mean entropy of the soft assignments per position; gamma times the entropy of their mean."""
        each = self._assignments(z)
        mean = each.mean(0)
        if assignment is not None:  # its value, with the gradient of this part: their mean is that of the batch
            mean = assignment + (mean - mean.detach())
        return _entropy(each).mean(), self.config.entropy_gamma * _entropy(mean)

    def _assignments(self, z: Tensor) -> Tensor:
        """Each position's soft assignment to the codes, [B h w, 2^bits]; all codes have the same norm.

        It is computed over the whole codebook: 0.5 GB per copy for 32 images of 256 positions at 14 bits.
        """
        with torch.autocast(z.device.type, enabled=False):  # the temperature of 0.01 amplifies bf16's rounding errors
            affinities = 2 * rearrange(z, "b k h w -> (b h w) k") @ self.codes().T
        return (affinities / self.config.entropy_temperature).softmax(-1)


def _entropy(probabilities: Tensor) -> Tensor:
    return -(probabilities * probabilities.clamp_min(1e-5).log()).sum(-1)
