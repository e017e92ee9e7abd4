"""Engines, the optimizer steps over the ranks of a run: accumulation, clipping, finite check, optimizer, EMA."""

from mixar.config import Config
from mixar.dist import Place
from mixar.engine.base import Engine, Scalars, StepInfo, Trainable
from mixar.engine.native import FSDPEngine, ReplicatedEngine
from mixar.engine.optim import learning_rate

__all__ = ["Engine", "Scalars", "StepInfo", "Trainable", "build_engine", "choose_engine", "learning_rate"]


def choose_engine(cfg: Config, place: Place) -> tuple[str, str]:
    """The engine of a run, and the reason for it."""
    if cfg.engine.name is not None:
        return cfg.engine.name, "engine.name says so"
    if place.world == 1:
        return "ddp", "there is one process"
    if place.launcher == "deepspeed":
        return "zero3", "the deepspeed launcher started it"
    return ("fsdp", "all ranks are on one node") if place.nodes == 1 else ("hsdp", f"there are {place.nodes} nodes")


def build_engine(cfg: Config, task: Trainable, place: Place) -> Engine:
    """The engine that `choose_engine` chooses, with its initial weights; a collective.

    Raises:
        UserError: the DeepSpeed file cannot be read or contradicts the config.
    """
    name, _ = choose_engine(cfg, place)
    if name == "ddp":
        return ReplicatedEngine(cfg, task, place)
    if name in ("fsdp", "hsdp"):
        return FSDPEngine(cfg, task, place, hybrid=name == "hsdp")
    from mixar.engine.zero import ZeroEngine  # imports DeepSpeed, which takes seconds

    return ZeroEngine(cfg, task, place, int(name.removeprefix("zero")))
