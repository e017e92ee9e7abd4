"""The diffusion head's two ways to modulate, and what it computes once instead of once a row."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from mixar.config import ModelConfig
from mixar.model import MixAR, init_weights
from mixar.model.head import Head
from mixar.ops import in_one, load, native

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


def calls(work: Callable[[], object]) -> int:
    """How often the operator of the modulated norm is called."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        work()
    return sum(event.count for event in profile.key_averages() if event.key == "mixar::norm_modulate")


@pytest.fixture
def kernels() -> None:
    load("cpu")
    if not in_one("cpu"):
        pytest.skip("no g++ to compile the CPU operators with")


@pytest.mark.parametrize("separable", [False, True])
def test_without_gradients_the_modulated_norm_is_one_operator(kernels: None, separable: bool) -> None:
    head = head_of(separable)
    x, t, z = torch.randn(8, 4), torch.arange(8), torch.randn(8, 24)
    expected = head(x, t, z)
    with torch.no_grad():
        found = head(x, t, z)
        assert calls(lambda: head(x, t, z)) == 3  # two blocks, the final layer
    assert calls(lambda: head(x, t, z)) == 0
    for ours, trained in zip(found, expected):
        torch.testing.assert_close(ours, trained, rtol=1e-5, atol=1e-5)
    assert calls(lambda: head.requires_grad_(False)(x, t, z)) == 3
    assert calls(lambda: head(x, t, z.requires_grad_())) == 0


def test_without_kernels_a_cpu_composes_it(kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    head, x, t, z = head_of(False), torch.randn(8, 4), torch.arange(8), torch.randn(8, 24)
    expected = head(x, t, z)
    monkeypatch.setattr(native, "_compiled", set())
    with torch.no_grad():
        assert calls(lambda: head(x, t, z)) == 0
        assert all(map(torch.equal, head(x, t, z), expected))


def test_in_bfloat16_the_operator_rounds_less(kernels: None) -> None:
    head, x, t, z = head_of(False), torch.randn(256, 4), torch.arange(256), torch.randn(256, 24)
    truth = head(x, t, z)
    dtypes = []
    for layer in (*(block.mlp for block in head.res_blocks), head.final_layer.linear):
        layer.register_forward_pre_hook(lambda _, given: dtypes.append(given[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        composed = head(x, t, z)
        dtypes.clear()
        with torch.no_grad():
            found = head(x, t, z)
    assert dtypes == [torch.bfloat16, torch.bfloat16, torch.float32]
    for ours, theirs, exact in zip(found, composed, truth):
        assert ours.dtype == torch.float32 and not torch.equal(ours, theirs)
        assert (ours - exact).square().mean() < (theirs - exact).square().mean()


def test_a_cpu_s_compiled_head_fuses_the_composition(kernels: None) -> None:
    head, x, t, z = head_of(False), torch.randn(8, 4), torch.arange(8), torch.randn(8, 24)
    with torch.no_grad():
        compiled = torch.compile(head, fullgraph=True)
        found = compiled(x, t, z)
        assert calls(lambda: compiled(x, t, z)) == 0
        for ours, plain in zip(found, head(x, t, z)):
            torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gradient", [False, True])
def test_a_gpu_s_compiled_head_has_the_operator_in_its_graph(gradient: bool) -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, _):
        graphs.append(graph)
        return graph.forward

    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"), torch.set_grad_enabled(gradient):
        head, x, t, z = Head(4, 24, 2, 16), torch.randn(8, 4), torch.arange(8), torch.randn(8, 24)
        found, _ = torch.compile(head, backend=backend, fullgraph=True)(x, t, z)
    assert found.shape == (8, 4) and len(graphs) == 1
    assert sum("norm_modulate" in str(node.target) for node in graphs[0].graph.nodes) == (0 if gradient else 3)


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
