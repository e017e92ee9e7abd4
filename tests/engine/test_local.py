"""One process's engine: accumulation, clipping, skipping, EMA, and what it saves."""

import copy
import math
from itertools import pairwise

import pytest
import torch

from mixar.config import OptimConfig
from mixar.dist import Place
from mixar.engine import LocalEngine, build_optimizer, learning_rate
from mixar.objectives.base import mean_of

PLACE = Place(0, 1, torch.device("cpu"))


def engine(cfg: OptimConfig | None = None, lr: float = 0.1) -> LocalEngine:
    cfg = cfg or OptimConfig(clip=0, ema=0.9, weight_decay=0.0)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))

    def loss(model, batch, epoch):
        value = model(batch).square().mean()
        return value, {"loss": mean_of(value)}

    optimizer = build_optimizer(model, cfg, lambda name, p: p.ndim > 1)
    return LocalEngine(model, loss, optimizer, cfg, lambda epoch: lr, PLACE, "fp32")


def batch(seed: int, n: int = 8) -> torch.Tensor:
    return torch.randn(n, 4, generator=torch.Generator().manual_seed(seed))


def same(a: dict, b: dict) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def test_accumulation_equals_one_large_batch() -> None:
    whole, parts = engine(), engine()
    for step in range(5):
        data = batch(step)
        one, two = whole.step([data], 0.0), parts.step(list(data.split(4)), 0.0)
        torch.testing.assert_close(one.loss, two.loss)
        torch.testing.assert_close(one.grad_norm, two.grad_norm)
        assert two.scalars["loss"][1] == 2
    for name, value in whole.full_weights("live").items():
        torch.testing.assert_close(value, parts.full_weights("live")[name])


def test_a_step_that_is_not_finite_changes_nothing() -> None:
    tested = engine(OptimConfig(clip=1.0, ema=0.9))
    for step in range(3):
        tested.step([batch(step)], 0.0)
    before = copy.deepcopy(tested._state())
    for poison in (math.nan, math.inf):
        info = tested.step([batch(3), batch(4).fill_(poison)], 0.0)
        assert info.finite.item() == 0
        assert same(before, tested._state())
    assert tested.step([batch(5)], 0.0).finite.item() == 1
    assert not same(before, tested._state())


def test_ema_follows_its_formula() -> None:
    tested = engine(OptimConfig(ema=0.9, ema_warmup=True))
    expected = {name: p.detach().clone() for name, p in tested.parameters.items()}
    for step in range(4):
        tested.step([batch(step)], 0.0)
        decay = min(0.9, (1 + step) / (10 + step))
        for name, p in tested.parameters.items():
            expected[name] = decay * expected[name] + (1 - decay) * p.detach()
    for name, value in tested.full_weights("ema").items():
        torch.testing.assert_close(value, expected[name])
    distance = sum((expected[n] - p.detach()).square().sum() for n, p in tested.parameters.items()).sqrt()
    torch.testing.assert_close(tested.ema_distance(), distance)


def test_clipping_bounds_the_gradient() -> None:
    free, clipped = engine(lr=1e-3), engine(OptimConfig(clip=1e-3, ema=0.9, weight_decay=0.0), lr=1e-3)
    assert torch.equal(free.step([batch(0)], 0.0).grad_norm, clipped.step([batch(0)], 0.0).grad_norm)
    moments = [clipped.optimizer.state[p]["exp_avg"].norm() for p in clipped.parameters.values()]
    assert torch.stack(moments).norm() <= 0.1 * 1e-3 * 1.01  # (1 - β1) times the clipped norm


def test_weight_decay_groups() -> None:
    groups = engine(OptimConfig(weight_decay=0.02)).optimizer.param_groups
    assert [(g["weight_decay"], {p.ndim for p in g["params"]}) for g in groups] == [(0.02, {2}), (0.0, {1})]


def test_save_and_load_are_exact(tmp_path) -> None:
    first, second = engine(), engine()
    for step in range(3):
        first.step([batch(step)], 0.0)
    first.save(tmp_path)
    second.load(tmp_path)
    assert same(first._state(), second._state())
    first.step([batch(9)], 0.0)
    second.step([batch(9)], 0.0)
    assert same(first._state(), second._state())


@pytest.mark.parametrize(("schedule", "end"), [("constant", 8e-4), ("linear", 0.0), ("cosine", 0.0)])
def test_learning_rate(schedule: str, end: float) -> None:
    cfg = OptimConfig(lr=1e-4, warmup_epochs=10, schedule=schedule)
    at = lambda epoch: learning_rate(cfg, 2048, epoch, 100)
    assert at(0) == 0 and at(5) == pytest.approx(4e-4) and at(10) == pytest.approx(8e-4)
    assert at(100) == pytest.approx(end)
    rates = [at(e) for e in range(10, 101)]
    assert all(a >= b for a, b in pairwise(rates))
