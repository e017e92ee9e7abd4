"""Checks of a training and of sampling on a GPU, each a function of a config and a device, as `mixar doctor --gpu`."""

from mixar.gpu.examination import CHECKS, examine
from mixar.gpu.findings import Finding
from mixar.gpu.report import describe, row

__all__ = ["CHECKS", "Finding", "describe", "examine", "row"]
