"""Linear layers on packed weights give what they gave."""

import copy

import pytest
import torch
from torch import nn

from mixar.sampling.packed import pack_linears


def layers(bias: bool = True) -> tuple[nn.Linear, nn.Linear]:
    """One as it is, and one packed."""
    torch.manual_seed(0)
    plain = nn.Linear(48, 33, bias=bias)
    packed = copy.deepcopy(plain)
    pack_linears(packed)
    return plain, packed


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(48,), (1, 48), (700, 48), (0, 48), (2, 5, 48)])
@torch.no_grad()
def test_gives_what_the_plain_layer_gives(shape, bias):
    plain, packed = layers(bias)
    x = torch.randn(shape)
    torch.testing.assert_close(packed(x), plain(x))
    strided = torch.randn(*shape[:-1], 96)[..., ::2]
    torch.testing.assert_close(packed(strided), plain(strided))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(packed(x), plain(x))
    torch.testing.assert_close(packed(x), plain(x))  # float32 again: each precision has weights of its own
    torch.testing.assert_close(packed.double()(x.double()), plain.double()(x.double()))


@torch.no_grad()
def test_follows_a_change_of_the_weights():
    plain, packed = layers()
    x = torch.randn(7, 48)
    before = packed(x)
    plain.weight.mul_(2)
    packed.load_state_dict(plain.state_dict())
    torch.testing.assert_close(packed(x), plain(x))
    assert not torch.allclose(packed(x), before)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):  # its cache would keep what the weights were
        packed(x)
        for state in ({"bias": plain.bias + 1}, {"weight": 3 * plain.weight}):  # a part alone, and another parameter
            for layer in (plain, packed):
                layer.load_state_dict(state, strict=False, assign="weight" in state)
            torch.testing.assert_close(packed(x), plain(x))


def test_trains_and_copies_as_before():
    plain, packed = layers()
    with torch.no_grad():
        packed(torch.randn(1, 48))  # packed by now
    x = torch.randn(7, 48)
    for layer in (plain, packed):
        layer(x).square().sum().backward()
    assert torch.equal(packed.weight.grad, plain.weight.grad)
    twin = copy.deepcopy(packed)
    assert twin.state_dict().keys() == plain.state_dict().keys()
    with torch.no_grad():
        twin.weight.zero_()
        torch.testing.assert_close(packed(x), plain(x))
        torch.testing.assert_close(twin(x), twin.bias.expand(7, -1))
