"""The patch discriminator (Isola et al. 2017) that a codec is trained against, as in VQGAN (Esser et al. 2021)."""

from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from mixar.codecs.layers import norm
from mixar.config import CodecLosses

Codec = TypeVar("Codec", bound=nn.Module)


class Discriminator(nn.Module):
    """Images [B, 3, H, W], nominally in [0, 1], to float32 logits [B, 1, h, w], positive for real ones.

    A logit is of a patch of 70 pixels, and h = H // 8 - 2. Group norm takes the place of batch norm, so that the logits
    of an image do not depend on the others in its pass.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for (inputs, outputs), stride in zip(pairwise(width * m for m in (1, 2, 4, 8)), (2, 2, 1)):
            convolution = nn.Conv2d(inputs, outputs, 4, stride, padding=1, bias=False)
            layers += [convolution, norm(outputs, 32), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(8 * width, 1, 4, padding=1))

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images * 2 - 1).float()


def for_training(codec: Codec, losses: CodecLosses) -> Codec:
    """`codec` with what only its training needs: a discriminator, if the adversarial loss has a weight.

    A pass of training then also returns the logits [3B, 1, h, w] of its reconstructions, of the same without gradient
    to the codec, and of its images. It is all one forward of one module, as engines that shard weights need it. Only
    `forward` is replaced, so that the names of the codec's weights do not change.
    """
    if losses.discriminator_weight == 0:
        return codec
    reconstruct, discriminator = codec.forward, Discriminator(losses.discriminator_width)

    def forward(images: Tensor, *inputs: Any, **survey: bool) -> tuple[Any, ...]:
        output, found = reconstruct(images, *inputs, **survey)
        if survey:
            return output, found
        return output, found, discriminator(torch.cat([output, output.detach(), images]))

    codec.discriminator = discriminator
    codec.forward = forward
    return codec
