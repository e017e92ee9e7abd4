"""The whole method on small images, on a CPU, in minutes: codecs, shards, prior, MixAR, samples, scores, a picture."""

from mixar.demo.stages import run

__all__ = ["run"]
