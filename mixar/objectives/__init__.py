"""The objectives: the two codecs, the discrete prior, MixAR."""

from mixar.objectives.base import Objective
from mixar.objectives.codecs import TokenizerObjective, VAEObjective
from mixar.objectives.mixar import MixARObjective
from mixar.objectives.prior import PriorObjective

__all__ = ["MixARObjective", "Objective", "PriorObjective", "TokenizerObjective", "VAEObjective"]
