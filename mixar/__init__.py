"""MixAR: continuous masked autoregressive image generation guided by discrete tokens."""

import os
import sys
from typing import Any

__version__ = "0.1.0"

# OpenMP reads this when torch is loaded. Waiting threads shall spin for a moment, then sleep: by default they occupy
# the cores, and training beside one busy process slows down to a quarter or less. A program that has loaded torch
# before is not affected, and the user's own setting has priority.
if "torch" not in sys.modules and "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")


def __getattr__(name: str) -> Any:
    if name == "MixARPipeline":  # on demand, so that `import mixar` is fast
        from mixar.sampling import MixARPipeline

        return MixARPipeline
    raise AttributeError(f"module 'mixar' has no attribute '{name}'")
