"""MixAR: continuous masked autoregressive image generation guided by discrete tokens."""

import os
import sys
from typing import Any

__version__ = "0.1.0"

# OpenMP reads this as torch is loaded. Threads that wait are to sleep: spinning, they take the cores from whoever else
# has work, and training beside one busy process falls to a fraction. A program that loaded torch before has decided.
if "torch" not in sys.modules:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def __getattr__(name: str) -> Any:
    if name == "MixARPipeline":  # on demand, so that `import mixar` stays quick
        from mixar.sampling import MixARPipeline

        return MixARPipeline
    raise AttributeError(f"module 'mixar' has no attribute '{name}'")
