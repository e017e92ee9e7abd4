"""Layers that both codecs use."""

import math
from collections import OrderedDict

from torch import nn


def norm(width: int, groups: int) -> nn.GroupNorm:
    """GroupNorm of the LDM and MaskGIT families, eps 1e-6: `groups` groups, or fewer that divide `width`.

    A group of one channel has no mean left, and with it goes the colour of an image: give each at least 4 channels.
    """
    return nn.GroupNorm(math.gcd(groups, width), width, eps=1e-6)


def conv3(inputs: int, outputs: int, bias: bool = True) -> nn.Conv2d:
    """3x3 convolution that keeps height and width."""
    return nn.Conv2d(inputs, outputs, 3, padding=1, bias=bias)


def stack(**parts: nn.Module) -> nn.Sequential:
    """The parts in sequence, each with its name in the state dict."""
    return nn.Sequential(OrderedDict(parts))
