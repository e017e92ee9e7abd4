"""Rows in groups: the same outputs and gradients, with the sums of biases' gradients in two stages."""

import pytest
import torch
from torch import nn

from mixar.model import attention, blocks, head
from mixar.model.attention import Lengths, Queries
from mixar.model.blocks import Block
from mixar.model.head import Head
from mixar.model.rows import Linear, flat, grouped


@pytest.fixture(params=[1, 4])
def in_groups(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """Groups on the CPU, too, once it is called."""

    def begin() -> None:
        for module in (attention, blocks, head):
            monkeypatch.setattr(module, "grouped", lambda x: x.unflatten(0, (request.param, -1)))

    return begin


def outputs_and_gradients(module: nn.Module, *inputs) -> list[torch.Tensor]:
    module.zero_grad()
    outs = module(*inputs)
    outs = [x for x in outs if x is not None] if isinstance(outs, tuple) else [outs]
    sum((out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)).sum() for out in outs).backward()
    return [*outs, *(parameter.grad.clone() for parameter in module.parameters())]


def test_a_linear_map_of_groups() -> None:
    torch.manual_seed(0)
    layer, plain = Linear(5, 7).double(), nn.Linear(5, 7).double()
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(12, 5, dtype=torch.float64)
    expected = outputs_and_gradients(plain, x)
    for form in (x, x.view(4, 3, 5), x.view(1, 12, 5)):
        out, *gradients = outputs_and_gradients(layer, form)
        torch.testing.assert_close([flat(out) if form is not x else out, *gradients], expected)


def test_the_sum_of_a_group_is_in_float32() -> None:
    layer = Linear(2, 3).bfloat16()
    x = torch.randn(2, 5000, 2, dtype=torch.bfloat16)
    layer(x).backward(torch.ones(2, 5000, 3, dtype=torch.bfloat16))
    assert layer.bias.grad.tolist() == [9984.0] * 3, "10,000 as the type holds it; summed in it, it would end at 256"


@pytest.mark.parametrize("separable", [False, True])
def test_the_head_in_groups_is_the_head(in_groups, separable: bool) -> None:
    torch.manual_seed(0)
    net = Head(4, 24, 2, 16, separable)
    x, t, z = torch.randn(16, 4), torch.rand(16) * 999, torch.randn(4, 24)
    expected = outputs_and_gradients(net, x, t, z)
    in_groups()
    torch.testing.assert_close(outputs_and_gradients(net, x, t, z), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("asked", [False, True])
def test_a_block_in_groups_is_the_block(in_groups, cross: bool, asked: bool) -> None:
    torch.manual_seed(0)
    block = Block(16, 2, 4.0, 0.0, 1e-6, 8 if cross else None).double()
    counts = (3, 7, 6)
    queries = Queries(torch.tensor([1, 2, 5, 15]), Lengths((2, 1, 1), None, 2)) if asked else None
    inputs = torch.randn(16, 16).double(), Lengths(counts, None, 7), torch.randn(3, 5, 8).double(), None, queries
    expected = outputs_and_gradients(block, *inputs)
    in_groups()
    torch.testing.assert_close(outputs_and_gradients(block, *inputs), expected)


def test_rows_on_a_cpu_stay_as_they_are() -> None:
    x = torch.randn(8, 2, requires_grad=True)
    assert grouped(x) is x
    assert torch.compile(grouped, backend="eager", fullgraph=True)(x).shape == x.shape
    assert flat(x).shape == x.shape
