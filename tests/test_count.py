"""The counter of a GPU's step: that it counts, and the ceilings that the step keeps."""

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks import count
from benchmarks.count import CARD, Trace, passes, run_backward, trace_step, without_a_card
from mixar.config import load_config
from mixar.ops import gated_add

ROOT = Path(__file__).parents[1]
TINY = [  # each step has a batch of its own, and with it a mask ratio
    "model.encoder_width=64", "model.encoder_heads=2", "model.encoder_depth=1", "model.decoder_depth=2",
    "model.head_depth=1", "model.head_width=64", "prior.width=64", "prior.depth=1", "prior.heads=2",
    "prior.mlp_width=64", "engine.compile=true", "train.batch=16",
]  # fmt: skip
MODES = (  # shapes would vary from step to step in the first two
    "ti_mix.enabled=true ti_mix.source=shards", "mask.ratio_scope=batch", "ti_mix.enabled=true", "model.guidance=none",
    "model.guidance=dc_mix", "model.guidance=dc_sa", "model.guidance=dc_ca", "model.process=flow",
    "engine.recompute=all",
)  # fmt: skip
STEPS = 4  # without fixed shapes the second one compiles again


@pytest.fixture
def trace() -> Iterator[Trace]:
    if torch.cuda.is_available():
        pytest.skip("the counter stands in for a card that is not there")
    found = Trace()
    with without_a_card(found), found:
        yield found


def test_operators_are_counted_with_their_bytes_and_flop(trace: Trace) -> None:
    x, y = torch.empty(64, 32, device=CARD), torch.empty(32, 16, device=CARD, dtype=torch.bfloat16)
    trace.clear()
    z = (x + 1).bfloat16().view(-1, 32).t().t() @ y
    z.relu_()
    torch._foreach_add_([x, x.clone()], 1.0)
    torch.rand(8)  # on the host
    assert [kernel.name for kernel in trace.kernels] == ["add", "_to_copy", "mm", "relu_", "clone", "_foreach_add_"]
    assert [kernel.moved for kernel in trace.kernels] == [
        2 * 4 * 64 * 32, (4 + 2) * 64 * 32, 2 * (64 * 32 + 32 * 16 + 64 * 16), 2 * 2 * 64 * 16, 2 * 4 * 64 * 32,
        4 * 4 * 64 * 32,
    ]  # fmt: skip
    assert [kernel.flops for kernel in trace.kernels] == [0, 0, 2 * 64 * 32 * 16, 0, 0, 0]
    assert not trace.blocking


@pytest.mark.parametrize(
    ("wait", "waits"),
    [
        (lambda x: x.sum().item(), True),
        (lambda x: x.cpu(), True),
        (lambda x: torch.ones(3).to(CARD), True),
        (lambda x: torch.ones(3).to(CARD, non_blocking=True), True),  # its memory is not pinned
        (lambda x: x[torch.tensor([0, 1])], True),
        (lambda x: torch.ones(3).pin_memory().to(CARD, non_blocking=True), False),
        (lambda x: x[torch.zeros(2, dtype=torch.int64, device=CARD)], False),
        (lambda x: x.to(torch.float16), False),
    ],
)
def test_what_makes_the_host_wait_is_found(trace: Trace, wait, waits: bool) -> None:
    wait(torch.empty(4, 4, device=CARD))
    assert bool(trace.blocking) is waits
    assert all(place.startswith(__file__) for place in trace.blocking), "the place is named"


def test_its_gradients_are_autograd_s() -> None:
    torch.manual_seed(0)
    shared, net = nn.Parameter(torch.randn(5)), nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 5))
    x = torch.randn(3, 5, requires_grad=True)

    def loss() -> torch.Tensor:
        return (net(x * shared) + shared).square().mean() + x[0].sum()

    leaves = [shared, x, *net.parameters()]
    expected = torch.autograd.grad(loss(), leaves)
    found = run_backward(Trace(), [loss()], [None], False, False, leaves)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    run_backward(Trace(), [loss()], [None], False, False)
    for leaf, theirs in zip(leaves, expected):
        torch.testing.assert_close(leaf.grad, theirs)


def norm_of_columns(x: torch.Tensor, wide: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:]) * wide.chunk(4, -1)[1]


def twice_over(x: torch.Tensor, wide: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x.cos(), x.sin().sum(0)


def operator(x: torch.Tensor, wide: torch.Tensor) -> torch.Tensor:
    return gated_add(x, wide.chunk(4, -1)[2], x)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the counter stands in for a card that is not there")
@pytest.mark.parametrize(("function", "tensors"), [(norm_of_columns, 3), (twice_over, 3), (operator, 3)])
def test_compiled_kernels_are_counted_with_what_each_reads(function, tensors: int) -> None:
    found = Trace()
    torch._dynamo.reset()
    with without_a_card(found), found:
        x, wide = torch.empty(4096, 1024, device=CARD), torch.empty(4096, 4096, device=CARD)
        torch.compile(function, options={"combo_kernels": True})(x, wide)
    moved = sum(kernel.moved for kernel in found.kernels if kernel.name != "empty")
    least = tensors * x.nbytes  # one column of `wide` is as large as x
    assert least <= moved <= 1.05 * least


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the counter stands in for a card that is not there")
@pytest.mark.parametrize("mode", MODES)
def test_no_mode_waits_or_compiles_again(mode: str) -> None:
    cfg = load_config(ROOT / "configs/mixar_l.yaml", [*TINY, *mode.split()])
    trace, graphs = trace_step(cfg, 16, STEPS)
    assert graphs == {"graphs": 4, "dynamic": 0, "recompiles": 0}
    assert trace.blocking == []
    calls = Counter((kernel.name, kernel.backward) for kernel in trace.kernels if kernel.part == "attention")
    again = "recompute" in mode  # in the backward pass, from the forward's random numbers
    assert calls["_flash_attention_forward", True] == (calls["_flash_attention_forward", False] if again else 0)
    assert calls["_flash_attention_backward", True] == calls["_flash_attention_forward", False] > 0


def counted(*args: str) -> dict:
    done = subprocess.run([sys.executable, count.__file__, *args, "--json"], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the counter stands in for a card that is not there")
def test_the_ceilings_of_the_large_model() -> None:
    found = counted(str(ROOT / "configs/mixar_l.yaml"))
    compiled = found["compiled"]
    assert found["images"] == 64
    assert found["kernels"]["total"] <= 2900
    assert found["kernels"]["random"] <= 20
    assert found["attention_calls"] == {"forward": 32, "backward": 32} == compiled["attention_calls"]
    assert found["bytes_other"] <= 335e9
    assert found["blocking"] == compiled["blocking"] == []
    assert found["mfu"] >= 0.32
    assert compiled["kernels"]["total"] <= 1800
    assert compiled["bytes_other"] <= 142e9
    assert (compiled["graphs"], compiled["dynamic"], compiled["recompiles"]) == (4, 0, 0)
    assert compiled["mfu"] >= 0.43
    assert found["optimizer"]["kernels"] <= 40
    assert found["sampling"]["kernels_per_diffusion_step"] <= 110


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the counter stands in for a card that is not there")
@pytest.mark.parametrize(("name", "images", "share"), [("mixar_l", 32, 0.42), ("mixar_b", 128, 0.375)])
def test_the_share_of_the_peak_of_smaller_work(name: str, images: int, share: float) -> None:
    cfg = load_config(ROOT / f"configs/{name}.yaml", ["engine.compile=true"])
    trace, _ = trace_step(cfg, images)
    assert passes(cfg, images, trace)["mfu"] >= share


@pytest.mark.parametrize(
    ("given", "told"),
    [(["prior_14bit"], "name a config of task=mixar"), (["mixar_l", "--steps", "1"], "write --steps 2 or more")],
)
def test_what_is_not_counted_is_refused(given: list[str], told: str) -> None:
    done = subprocess.run([sys.executable, count.__file__, *given], capture_output=True, text=True)
    assert done.returncode == 1
    assert told in done.stderr
