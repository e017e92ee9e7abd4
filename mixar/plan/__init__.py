"""The plan of a run from its config alone: parameters, length, FLOP, memory, and speed on GPUs."""

from mixar.plan.figures import make_plan, memory_fixes, parameter_count
from mixar.plan.text import render
from mixar.plan.work import step_flops

__all__ = ["make_plan", "memory_fixes", "parameter_count", "render", "step_flops"]
