"""The fast ways of the autoregressive loop; the exact one is held by tests/golden."""

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from mixar.config import PRESETS, PROCESSES, SampleConfig
from mixar.errors import UserError
from mixar.model import SOLVERS, STOCHASTIC, Diffusion, Process
from mixar.model.flow import Flow
from mixar.model.process import dpm
from mixar.sampling import reveal_schedule
from mixar.sampling.autoregressive import (
    DiffusionStep,
    by_tensors,
    compiled_step,
    denoise,
    diffusion_step,
    sample_tokens,
    sampling_order,
)


@pytest.mark.parametrize("order", ["random", "checkerboard"])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8, 16, 64, 300])
@pytest.mark.parametrize("tokens", [1, 9, 16, 256])
def test_every_position_is_revealed_once(tokens: int, steps: int, order: str) -> None:
    plan = reveal_schedule(tokens, SampleConfig(steps=steps, order=order))
    assert len(plan) == steps and plan[0].before == tokens and plan[-1].after == 0
    assert all(step.after == later.before <= step.before for step, later in pairwise(plan))


def test_a_checkerboard_takes_its_second_half_in_two_steps() -> None:
    plan = reveal_schedule(256, SampleConfig(steps=10, order="checkerboard"))
    assert [step.after for step in plan[-3:]] == [128, 64, 0]
    slow = [step.before - step.after for step in plan[:8]]
    assert slow == sorted(slow) and slow[0] < 5, "a cosine, few at first"
    assert [step.after for step in reveal_schedule(256, SampleConfig(steps=3, order="checkerboard"))][1:] == [128, 0]


def test_checkerboard_order_goes_from_coarse_to_fine() -> None:
    seeds = torch.arange(5)
    order = sampling_order("checkerboard", seeds, 256)
    assert torch.equal(order.sort(-1).values, torch.arange(256).expand(5, -1))
    assert not torch.equal(order[0], order[1]), "at random within a checkerboard"
    assert torch.equal(order[3:4], sampling_order("checkerboard", seeds[3:4], 256))
    row, column = order.flip(-1) // 16, order.flip(-1) % 16  # in the order of generation
    for count, spacing in ((4, 8), (16, 4), (64, 2)):
        assert (row[:, :count] % spacing == 0).all() and (column[:, :count] % spacing == 0).all()
    for count, spacing in ((8, 4), (32, 2), (128, 1)):  # the quincunx between two lattices
        assert ((row[:, :count] // spacing + column[:, :count] // spacing) % 2 == 0).all()


def test_disa_lets_the_diffusion_steps_fall() -> None:
    plan = reveal_schedule(256, SampleConfig(steps=64, diffusion_steps="50", diffusion_steps_end=5))
    found = [int(step.diffusion_steps) for step in plan]
    assert found == [5 + math.floor((63 - k) / 63 * 45) for k in range(64)]
    assert found[0] == 50 and found[-1] == 5


def test_guidance_is_left_out_outside_of_its_interval() -> None:
    whole = reveal_schedule(256, SampleConfig(steps=16, cfg_scale=3.0))
    part = reveal_schedule(256, SampleConfig(steps=16, cfg_scale=3.0, cfg_interval=[0.25, 0.75]))
    assert all(step.cfg_scale == 1 for step in part[:4] + part[12:])
    assert part[4:12] == whole[4:12] and all(step.cfg_scale > 1 for step in whole)


@pytest.mark.parametrize(("kind", "share"), [(Diffusion, 0), (Flow, 0.4)])
def test_the_ode_solver_is_of_second_order(kind: type[Process], share: float) -> None:
    """On a Gaussian, whose ε and whose flow are known, twice the steps leave a quarter of the error.

    Down to the last step, whose time is the same for any number of steps of `Diffusion`, and down to two fifths of the
    time of `Flow`, where its steps meet whatever their number.
    """
    mean, std = 1.5, 0.3
    errors = []
    for steps in (25, 50, 100):
        process = kind(str(steps), 950)
        alpha, sigma = process.alpha, process.sigma
        spread = np.sqrt((alpha * std) ** 2 + sigma**2)
        quantile = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
        x, before = float(alpha[-1]) * mean + float(spread[-1]) * quantile, torch.zeros(9, 1)
        last = max(0, round(share * steps) - 1)
        for step in reversed(range(last + 1, len(process))):
            eps = float(sigma[step] / spread[step] ** 2) * (x - float(alpha[step]) * mean)
            x0 = mean + float(alpha[step] * std**2 / spread[step] ** 2) * (x - float(alpha[step]) * mean)
            prediction = eps if kind is Diffusion else eps - x0
            x, before = dpm(process, step, x, (prediction, None), before, None, 1.0)
        errors.append((x - (float(alpha[last]) * mean + float(spread[last]) * quantile)).abs().max().item())
    assert errors[-1] < 0.02 * std
    for coarse, fine in pairwise(errors):
        assert 3 < coarse / fine < 5


def test_the_last_ode_step_gives_the_clean_tokens() -> None:
    process, x, eps = Diffusion("8", 950), torch.randn(5, 3), torch.randn(5, 3)
    done, clean = dpm(process, 0, x, (eps, None), torch.randn(5, 3), None, 1.0)
    torch.testing.assert_close(done, ((x - process.sigma[0] * eps) / process.alpha[0]).float())
    assert torch.equal(done, clean)


def no_noise(done: int) -> torch.Tensor:
    raise AssertionError("this solver draws nothing")


@pytest.mark.parametrize("kind", [Diffusion, Flow])
def test_noise_is_drawn_only_where_a_step_adds_it(make_pipeline, kind: type[Process]) -> None:
    head, asked = make_pipeline("none", "flow" if kind is Flow else "ddpm").model.diffloss.net, []
    given = head, kind("4"), torch.randn(7, 32), 1.0, torch.randn(7, 4)
    with torch.no_grad():
        assert len(list(denoise(*given, no_noise, SampleConfig(solver="dpm")))) == 4
        drawn = denoise(*given, lambda done: asked.append(done) or torch.randn(7, 4), SampleConfig(solver="ddpm"))
        assert len(list(drawn)) == 4 and asked == [0, 1, 2]


def falling(solver: str) -> SampleConfig:
    """Ten autoregressive steps of six different numbers of rows, each with another number of diffusion steps."""
    settings = SampleConfig(
        steps=10, solver=solver, diffusion_steps="11", diffusion_steps_end=2, diffusion_start=950, cfg_scale=2.5
    )
    plan = reveal_schedule(64, settings)
    assert len({step.diffusion_steps for step in plan}) == 10 and len({step.before - step.after for step in plan}) == 6
    return settings


def fixed_sizes() -> DiffusionStep:
    """What a GPU runs, but for what compiles its graphs."""
    graphs = torch.compile(diffusion_step, fullgraph=True, dynamic=False, backend="eager")
    return by_tensors(graphs, torch.device("cpu"), replayed=True)


@pytest.mark.parametrize(("make", "graphs"), [(lambda: compiled_step(torch.device("cpu")), 1), (fixed_sizes, 6)])
@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("solver", SOLVERS)
def test_compiled_samples_are_the_plain_ones_without_a_graph_per_step(
    make_pipeline, solver: str, process: str, make: Callable[[], DiffusionStep], graphs: int
) -> None:
    """One graph for all steps; where sizes are fixed, one for each number of rows."""
    torch._dynamo.reset()
    counters.clear()
    model, run = make_pipeline("none", process).model, make()
    labels, seeds = torch.tensor([0, 1, 2, 0, 1]), torch.arange(5)
    for temperature in (1.0, 0.9) if solver in STOCHASTIC else (1.0,):
        settings = replace(falling(solver), temperature=temperature)
        plain, compiled = (sample_tokens(model, labels, None, seeds, settings, step) for step in (diffusion_step, run))
        torch.testing.assert_close(compiled, plain, rtol=0, atol=1e-4 * plain.abs().max().item())
    assert counters["stats"]["unique_graphs"] == graphs


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("preset", PRESETS)
def test_presets_sample(make_pipeline, preset: str, process: str) -> None:
    pipeline = make_pipeline(process=process).with_settings(**PRESETS[preset])
    images = pipeline([0, 1, 2], [5, 6, 7])
    assert images.float().std() > 1
    alone = pipeline([1], [6])  # rounding of matrices of other sizes may carry a pixel over the edge of its level
    assert (alone.int() - images[1:2].int()).abs().max() <= 1


def test_fast_settings_draw_otherwise(make_pipeline) -> None:
    pipeline = make_pipeline()
    seen = {pipeline([0, 1], [5, 6]).numpy().tobytes()}
    for changes in (
        {"order": "checkerboard"}, {"solver": "dpm"}, {"diffusion_steps_end": 2}, {"cfg_interval": [0.5, 1.0]},
    ):  # fmt: skip
        seen.add(pipeline.with_settings(**changes)([0, 1], [5, 6]).numpy().tobytes())
    assert len(seen) == 5


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"cfg_interval": [0.5]}, r"cfg_interval=\[0.25,1\]"),
        ({"cfg_interval": [0.8, 0.2]}, r"cfg_interval=\[0.25,1\]"),
        ({"diffusion_steps": "ddim50", "diffusion_steps_end": 5}, "write sample.diffusion_steps=50"),
        ({"diffusion_steps": "4", "diffusion_steps_end": 60}, "write sample.diffusion_steps=60"),
        ({"solver": "dpm", "diffusion_steps": "1"}, "write sample.diffusion_steps=2"),
        ({"solver": "dpm", "temperature": 0.9}, "write sample.temperature=1"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(make_pipeline, changes: dict, told: str) -> None:
    with pytest.raises(UserError, match=told):
        make_pipeline().with_settings(**changes)
