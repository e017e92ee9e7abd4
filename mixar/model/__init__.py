"""The trained model: MAR's backbone with the discrete guidance, and its head."""

from mixar.model.diffusion import Diffusion
from mixar.model.guidance import guidance_of
from mixar.model.init import init_weights, initial_value
from mixar.model.mixar import Losses, MixAR, patchify, process_of, unpatchify
from mixar.model.process import SOLVERS, Process

__all__ = [
    "SOLVERS", "Diffusion", "Losses", "MixAR", "Process", "guidance_of", "init_weights", "initial_value", "patchify",
    "process_of", "unpatchify",
]  # fmt: skip
