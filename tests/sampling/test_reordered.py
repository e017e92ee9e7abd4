"""Linear layers on reordered weights give what they gave."""

import copy

import pytest
import torch
from torch import nn

from mixar.sampling.reordered import reorder_linears


def layers(bias: bool = True) -> tuple[nn.Linear, nn.Linear]:
    """One as it is, and one reordered."""
    torch.manual_seed(0)
    plain = nn.Linear(48, 33, bias=bias)
    reordered = copy.deepcopy(plain)
    reorder_linears(reordered)
    return plain, reordered


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(48,), (1, 48), (700, 48), (0, 48), (2, 5, 48)])
@torch.no_grad()
def test_gives_what_the_plain_layer_gives(shape, bias):
    plain, reordered = layers(bias)
    x = torch.randn(shape)
    torch.testing.assert_close(reordered(x), plain(x))
    strided = torch.randn(*shape[:-1], 96)[..., ::2]
    torch.testing.assert_close(reordered(strided), plain(strided))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(reordered(x), plain(x))
    torch.testing.assert_close(reordered(x), plain(x))  # float32 again: each precision has weights of its own
    torch.testing.assert_close(reordered.double()(x.double()), plain.double()(x.double()))


@torch.no_grad()
def test_follows_a_change_of_the_weights():
    plain, reordered = layers()
    x = torch.randn(7, 48)
    before = reordered(x)
    plain.weight.mul_(2)
    reordered.load_state_dict(plain.state_dict())
    torch.testing.assert_close(reordered(x), plain(x))
    assert not torch.allclose(reordered(x), before)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):  # its cache would keep what the weights were
        reordered(x)
        for state in ({"bias": plain.bias + 1}, {"weight": 3 * plain.weight}):  # a part alone, and another parameter
            for layer in (plain, reordered):
                layer.load_state_dict(state, strict=False, assign="weight" in state)
            torch.testing.assert_close(reordered(x), plain(x))


def test_trains_and_copies_as_before():
    plain, reordered = layers()
    with torch.no_grad():
        reordered(torch.randn(1, 48))  # reordered by now
    x = torch.randn(7, 48)
    for layer in (plain, reordered):
        layer(x).square().sum().backward()
    assert torch.equal(reordered.weight.grad, plain.weight.grad)
    twin = copy.deepcopy(reordered)
    assert twin.state_dict().keys() == plain.state_dict().keys()
    with torch.no_grad():
        twin.weight.zero_()
        torch.testing.assert_close(reordered(x), plain(x))
        torch.testing.assert_close(twin(x), twin.bias.expand(7, -1))
