"""How a model is stepped: accumulation, clipping, finite check, optimizer, EMA."""

from mixar.engine.base import Engine, Scalars, StepInfo
from mixar.engine.local import LocalEngine
from mixar.engine.optim import build_optimizer, learning_rate

__all__ = ["Engine", "LocalEngine", "Scalars", "StepInfo", "build_optimizer", "learning_rate"]
