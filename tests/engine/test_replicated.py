"""One process's engine: accumulation, clipping, skipping, EMA, and what it saves."""

import math
import sys
import types
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from mixar.config import Config, OptimConfig, TrainConfig
from mixar.dist import Place
from mixar.engine import build_engine, learning_rate, native
from mixar.engine.native import ReplicatedEngine
from mixar.engine.optim import apex_adamw, build_optimizer
from mixar.engine.slices import save_slices
from mixar.errors import UserError
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


def engine(optim: OptimConfig | None = None, lr: float = 0.1) -> ReplicatedEngine:
    optim = replace(optim or OptimConfig(clip=0, ema=0.9, weight_decay=0.0), lr=lr, warmup_epochs=0)
    cfg = Config(optim=optim, train=TrainConfig(batch=256, precision="fp32"))  # so many images have `optim.lr` itself
    return build_engine(cfg, Toy(), PLACE)


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
    optim = OptimConfig(lr=1e-4, warmup_epochs=10, schedule=schedule)
    at = lambda epoch: learning_rate(Config(optim=optim, train=TrainConfig(batch=2048, epochs=100)), epoch)
    assert at(0) == 0 and at(5) == pytest.approx(4e-4) and at(10) == pytest.approx(8e-4)
    assert at(100) == pytest.approx(end)
    rates = [at(e) for e in range(10, 101)]
    assert all(a >= b for a, b in pairwise(rates))


class FusedAdam(torch.optim.Optimizer):
    """What apex's does to parameters and state, as its source has it: one count a group, and no way to skip."""

    def __init__(self, params, lr, betas, adam_w_mode, eps=1e-8, weight_decay=0.0):
        assert adam_w_mode
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def zero_grad(self):
        super().zero_grad()

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                state = self.state[p]
                state["exp_avg"].lerp_(p.grad, 1 - beta1)
                state["exp_avg_sq"].mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                mean = state["exp_avg"] / (1 - beta1 ** group["step"])
                scale = (state["exp_avg_sq"] / (1 - beta2 ** group["step"])).sqrt() + group["eps"]
                p.sub_(group["lr"] * (mean / scale + group["weight_decay"] * p))


def with_apex(monkeypatch) -> ReplicatedEngine:
    """An engine whose optimizer is apex's, on the CPU."""
    apex = types.ModuleType("apex.optimizers")
    apex.FusedAdam = FusedAdam
    monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))
    monkeypatch.setitem(sys.modules, "apex.optimizers", apex)

    def build(parameters, cfg, decays):
        plain = build_optimizer(parameters, cfg, decays)
        groups = [{name: group[name] for name in ("params", "weight_decay")} for group in plain.param_groups]
        return apex_adamw(groups, (0.9, 0.95))

    monkeypatch.setattr(native, "build_optimizer", build)
    tested = engine(OptimConfig(weight_decay=0.1))
    monkeypatch.undo()
    return tested


def test_apex_does_what_torch_does(monkeypatch, tmp_path) -> None:
    plain, apex = engine(OptimConfig(weight_decay=0.1)), with_apex(monkeypatch)
    for step in range(6):
        data = batch(step)
        if step == 2:
            data[0] = math.nan  # skipped by both
        if step == 4:  # resumed: the count, which apex keeps elsewhere, must come back
            save_slices(apex.save(), tmp_path)
            apex = with_apex(monkeypatch)
            apex.load(tmp_path)
        plain.step([data], 0.0), apex.step([data], 0.0)
    assert isinstance(apex.optimizer, FusedAdam)
    for name, value in values(plain).items():
        torch.testing.assert_close(value, values(apex)[name])


def test_apex_steps_with_one_group_at_a_time(monkeypatch) -> None:
    apex = with_apex(monkeypatch).optimizer
    first, second = (group["params"] for group in apex.param_groups)
    for p in (*first, *second):
        p.grad = torch.ones_like(p)
    for step in range(1, 3):
        for params in ([first, []], [[], second]):  # as ZeRO-3 does with its partitions
            for group, some in zip(apex.param_groups, params):
                group["params"] = some
            apex.step()
        assert {int(apex.state[p]["step"]) for p in (*first, *second)} == {step}
        assert apex.param_groups[1]["step"] == step


def test_apex_is_asked_for_by_name_and_missed_by_name(monkeypatch) -> None:
    with pytest.raises(UserError, match="needs a CUDA card"):
        engine(OptimConfig(implementation="apex"))
    with pytest.raises(UserError, match=r"PyPI's apex is another package .*write optim.implementation=torch"):
        monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))
        apex_adamw([{"params": [torch.nn.Parameter(torch.zeros(2))]}], (0.9, 0.95))
