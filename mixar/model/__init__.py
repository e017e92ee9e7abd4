"""The trained model: MAR's backbone with the discrete guidance, and its diffusion head."""

from mixar.model.diffusion import Diffusion
from mixar.model.init import init_weights, initial_value
from mixar.model.mixar import Losses, MixAR, patchify, unpatchify
from mixar.model.packed import pack_linears

__all__ = ["Diffusion", "Losses", "MixAR", "init_weights", "initial_value", "pack_linears", "patchify", "unpatchify"]
