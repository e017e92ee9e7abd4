"""What a run will be, computed from its config alone: parameters, length, work, memory, and its speed on GPUs."""

from mixar.plan.figures import make_plan, parameter_count
from mixar.plan.text import render

__all__ = ["make_plan", "parameter_count", "render"]
