"""MixAR: continuous masked autoregressive image generation guided by discrete tokens."""

from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "MixARPipeline":  # on demand, so that `import mixar` stays quick
        from mixar.sampling import MixARPipeline

        return MixARPipeline
    raise AttributeError(f"module 'mixar' has no attribute '{name}'")
