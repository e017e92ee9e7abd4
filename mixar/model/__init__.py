"""The trained model: MAR's backbone with the discrete guidance, and its diffusion head."""

from mixar.model.diffusion import Diffusion
from mixar.model.guidance import guidance_of
from mixar.model.init import init_weights, initial_value
from mixar.model.mixar import Losses, MixAR, patchify, unpatchify

__all__ = [
    "Diffusion", "Losses", "MixAR", "guidance_of", "init_weights", "initial_value", "patchify", "unpatchify",
]  # fmt: skip
