"""Sampling: the autoregressive loop, and the pipeline from labels to images."""

from mixar.sampling.autoregressive import reveal_schedule, sample_steps, sample_tokens
from mixar.sampling.pipeline import MixARPipeline
from mixar.weights import find_export

__all__ = ["MixARPipeline", "find_export", "reveal_schedule", "sample_steps", "sample_tokens"]
