"""The trained model: MAR's backbone with the discrete guidance, and its head.

Shapes are written with these letters, here and wherever the model is trained or sampled:

    B  images of a batch                    D  width of encoder or decoder; w of the head
    N  token positions per image            S  class tokens before them
    V  visible positions per image          R  rows: masked positions, over all images of a batch
    P  positions of a sequence              T  tokens of a packed batch, without padding
    C  channels of a continuous token       m  sub-tokens of a discrete token
"""

from mixar.model.diffusion import Diffusion
from mixar.model.guidance import guidance_of
from mixar.model.init import init_weights, initial_value
from mixar.model.mixar import Losses, MixAR, patchify, process_of, unpatchify
from mixar.model.process import SOLVERS, STOCHASTIC, Process, Solver

__all__ = [
    "SOLVERS", "STOCHASTIC", "Diffusion", "Losses", "MixAR", "Process", "Solver", "guidance_of", "init_weights",
    "initial_value", "patchify", "process_of", "unpatchify",
]  # fmt: skip
