"""MixAR: continuous masked autoregressive image generation guided by discrete tokens."""

import os
import sys
from typing import Any

__version__ = "0.1.0"

# OpenMP reads this as torch is loaded. Threads that wait are to spin for a moment only, then sleep: by default they
# take the cores from whoever else has work, and training beside one busy process falls to a quarter or less. A program
# that loaded torch before has decided, and so has a user who set how to wait.
if "torch" not in sys.modules and "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")


def __getattr__(name: str) -> Any:
    if name == "MixARPipeline":  # on demand, so that `import mixar` stays quick
        from mixar.sampling import MixARPipeline

        return MixARPipeline
    raise AttributeError(f"module 'mixar' has no attribute '{name}'")
