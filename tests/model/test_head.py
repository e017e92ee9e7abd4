"""The diffusion head's two ways to modulate, and what it computes once instead of once a row."""

import pytest
import torch
import torch.nn.functional as F

from mixar.config import ModelConfig
from mixar.model import MixAR, init_weights
from mixar.model.head import Head

ROWS, MUL = 300, 4


def head_of(separable: bool) -> Head:
    torch.manual_seed(0)
    head = Head(4, 24, 2, 16, separable)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, 0, 0.3)
    return head


def row_by_row(head: Head, x: torch.Tensor, t: torch.Tensor, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The head by its equations, everything computed for each row."""
    time, condition = head.time_embed(t), head.cond_embed(z)

    def modulation(maps, parts):
        if head.separable:
            values = maps["time"](F.silu(time)) + maps["1"](F.silu(condition))
        else:
            values = maps["1"](F.silu(time + condition))
        return values.chunk(parts, -1)

    x = head.input_proj(x)
    for block in head.res_blocks:
        shift, scale, gate = modulation(block.adaLN_modulation, 3)
        x = x + gate * block.mlp(F.layer_norm(x, x.shape[-1:], *block.in_ln.parameters(), 1e-6) * (1 + scale) + shift)
    shift, scale = modulation(head.final_layer.adaLN_modulation, 2)
    x = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift
    return head.final_layer.linear(x).chunk(2, -1)


@pytest.mark.parametrize("separable", [False, True])
@pytest.mark.parametrize("rows", [ROWS, 8])  # with and without a table of all timesteps
def test_the_head_is_its_equations(separable: bool, rows: int) -> None:
    head = head_of(separable)
    x, z = torch.randn(MUL * rows, 4), torch.randn(rows, 24)
    t = torch.randint(0, 1000, (MUL * rows,))
    found, expected = head(x, t, z), row_by_row(head, x, t, z.repeat(MUL, 1))
    for ours, plain in zip(found, expected):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)
    weight = torch.randn(MUL * rows, 4)
    gradients = [
        torch.autograd.grad(((eps + v) * weight).sum(), list(head.parameters()), retain_graph=True)
        for eps, v in (found, expected)
    ]
    for (name, _), ours, plain in zip(head.named_parameters(), *gradients):
        torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-3 * plain.abs().max().item(), msg=name)


def test_only_separable_heads_have_a_map_of_the_time() -> None:
    sizes = {"encoder_width": 32, "encoder_depth": 1, "encoder_heads": 2, "decoder_width": 32, "decoder_depth": 1,
             "decoder_heads": 2, "head_depth": 2, "head_width": 16, "code_bits": 4, "classes": 3,
             "code_dim": None, "grid": 4}  # fmt: skip
    joint, separable = (MixAR(ModelConfig(separable_adaln=kind, latent_channels=4, **sizes)) for kind in (False, True))
    extra = separable.state_dict().keys() - joint.state_dict().keys()
    assert extra == {
        *(f"diffloss.net.res_blocks.{i}.adaLN_modulation.time.weight" for i in range(2)),
        "diffloss.net.final_layer.adaLN_modulation.time.weight",
    }
    init_weights(separable, 0)
    assert all(not separable.state_dict()[name].any() for name in extra), "zero, as all that modulates at the start"
