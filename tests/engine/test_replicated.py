"""One process's engine: accumulation, clipping, skipping, EMA, and what it saves."""

import math
from itertools import pairwise

import pytest
import torch

from mixar.config import Config, OptimConfig, TrainConfig
from mixar.dist import Place
from mixar.engine import build_engine, learning_rate
from mixar.engine.native import ReplicatedEngine
from mixar.engine.slices import save_slices
from mixar.objectives.base import mean_of

PLACE = Place(0, 1, torch.device("cpu"))


class Toy:
    """The least that an engine can train."""

    def build(self) -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))

    def initial(self, name: str, like: torch.Tensor) -> torch.Tensor:
        return torch.randn(like.shape, generator=torch.Generator().manual_seed(len(name))) / 2

    def decays(self, name: str, parameter: torch.Tensor) -> bool:
        return parameter.ndim > 1

    def loss(self, model, batch, epoch):
        value = model(batch).square().mean()
        return value, {"loss": mean_of(value)}


def engine(optim: OptimConfig | None = None, lr: float = 0.1, tmp_path=None) -> ReplicatedEngine:
    optim = optim or OptimConfig(clip=0, ema=0.9, weight_decay=0.0)
    cfg = Config(optim=optim, train=TrainConfig(precision="fp32"))
    return build_engine(cfg, Toy(), lambda epoch: lr, PLACE, tmp_path)


def values(tested: ReplicatedEngine) -> dict[str, torch.Tensor]:
    """All that the engine keeps, copied."""
    return {name: piece.flat.clone() for name, piece in tested._state().items()}


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
    before = values(tested)
    for poison in (math.nan, math.inf):
        info = tested.step([batch(3), batch(4).fill_(poison)], 0.0)
        assert info.finite.item() == 0
        assert same(before, values(tested))
    assert tested.step([batch(5)], 0.0).finite.item() == 1
    assert not same(before, values(tested))


def test_ema_follows_its_formula() -> None:
    tested = engine(OptimConfig(ema=0.9, ema_warmup=True))
    expected = {name: p.detach().clone() for name, p in tested.parameters.items()}
    for step in range(4):
        info = tested.step([batch(step)], 0.0, measure=True)
        decay = min(0.9, (1 + step) / (10 + step))
        for name, p in tested.parameters.items():
            expected[name] = decay * expected[name] + (1 - decay) * p.detach()
    for name, value in tested.full_weights("ema").items():
        torch.testing.assert_close(value, expected[name])
        distance = sum((expected[n] - p.detach()).square().sum() for n, p in tested.parameters.items()).sqrt()
        torch.testing.assert_close(info.ema_distance, distance)


def test_clipping_bounds_the_gradient() -> None:
    free, clipped = engine(lr=1e-3), engine(OptimConfig(clip=1e-3, ema=0.9, weight_decay=0.0), lr=1e-3)
    assert torch.equal(free.step([batch(0)], 0.0).grad_norm, clipped.step([batch(0)], 0.0).grad_norm)
    moments = torch.cat(list(clipped.moments["exp_avg"].values()))
    assert moments.norm() <= 0.1 * 1e-3 * 1.01  # (1 - β1) times the clipped norm


def test_weight_decay_groups() -> None:
    tested = engine(OptimConfig(weight_decay=0.02))
    names = {id(piece.flat): name for name, piece in tested.slices.items()}
    groups = [(g["weight_decay"], {names[id(p)] for p in g["params"]}) for g in tested.optimizer.param_groups]
    assert groups == [(0.02, {"0.weight", "2.weight"}), (0.0, {"0.bias", "2.bias"})]


def test_save_and_load_are_exact(tmp_path) -> None:
    first, second = engine(), engine()
    for step in range(3):
        first.step([batch(step)], 0.0)
    saved = first.save()
    first.step([batch(9)], 0.0)  # what was saved is a copy
    save_slices(saved, tmp_path)
    second.load(tmp_path)
    assert not same(values(first), values(second))
    second.step([batch(9)], 0.0)
    assert same(values(first), values(second))


@pytest.mark.parametrize(("schedule", "end"), [("constant", 8e-4), ("linear", 0.0), ("cosine", 0.0)])
def test_learning_rate(schedule: str, end: float) -> None:
    cfg = OptimConfig(lr=1e-4, warmup_epochs=10, schedule=schedule)
    at = lambda epoch: learning_rate(cfg, 2048, epoch, 100)
    assert at(0) == 0 and at(5) == pytest.approx(4e-4) and at(10) == pytest.approx(8e-4)
    assert at(100) == pytest.approx(end)
    rates = [at(e) for e in range(10, 101)]
    assert all(a >= b for a, b in pairwise(rates))
