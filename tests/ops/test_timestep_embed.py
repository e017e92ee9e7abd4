"""timestep_embed: the CPU kernel against float64, its gradient, and what torch asks of an operator."""

import pytest
import torch
from torch.library import opcheck

from mixar.ops import timestep_embed
from mixar.ops.timestep_embed import _frequencies, reference

CPU = torch.device("cpu")


def truth(t: torch.Tensor, features: int) -> torch.Tensor:
    angle = (t.float()[:, None] * _frequencies(features, 10000.0, CPU)).double()
    return torch.cat([angle.cos(), angle.sin()], -1)


@pytest.mark.parametrize("features", [2, 66, 256])
def test_float32_against_float64(native: None, features: int) -> None:
    t = torch.cat([torch.arange(1000), torch.tensor([0, 999])])
    torch.testing.assert_close(timestep_embed(t, features).double(), truth(t, features), rtol=0, atol=2e-7)
    plain = reference(t.float(), _frequencies(features, 10000.0, CPU), torch.float32)
    torch.testing.assert_close(timestep_embed(t, features), plain, rtol=0, atol=2e-7)


def test_bfloat16_is_float32_rounded_once(native: None) -> None:
    t = torch.rand(333) * 1000
    assert torch.equal(timestep_embed(t, 64, dtype=torch.bfloat16), timestep_embed(t, 64).bfloat16())


def test_angles_far_beyond_the_timesteps(native: None) -> None:
    t = torch.linspace(-1e5, 1e5, 100_001)
    found = torch.ops.mixar.timestep_embed(t, torch.ones(1), torch.float32).double()
    torch.testing.assert_close(found, torch.stack([t.double().cos(), t.double().sin()], -1), rtol=0, atol=2e-7)


def test_gradient_against_float64(native: None) -> None:
    t = torch.rand(9) * 10
    weight = torch.randn(9, 32)
    for leaf, embedded in ((t, lambda x: timestep_embed(x, 32)), (t.double(), lambda x: truth_of(x))):
        leaf.requires_grad_()
        (embedded(leaf) * weight).sum().backward()
    exact = t.detach().double().requires_grad_()
    (truth_of(exact) * weight).sum().backward()
    torch.testing.assert_close(t.grad.double(), exact.grad, rtol=1e-5, atol=1e-5)


def truth_of(t: torch.Tensor) -> torch.Tensor:
    angle = t[:, None] * _frequencies(32, 10000.0, CPU).double()
    return torch.cat([angle.cos(), angle.sin()], -1)


def test_opcheck(native: None) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for gradient in (False, True):
            t = torch.rand(5).requires_grad_(gradient)
            opcheck(torch.ops.mixar.timestep_embed.default, (t, _frequencies(8, 10000.0, CPU), dtype))


def test_compiles_to_one_graph(native: None) -> None:
    t = torch.arange(7)
    compiled = torch.compile(lambda t: timestep_embed(t, 8) * 2, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(t), timestep_embed(t, 8) * 2)
