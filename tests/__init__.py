"""Ours by an `__init__.py`: torch-fidelity installs a package of the same name, which would win over a bare folder.

The tests and all processes that they start run on the CPU, also on a machine with GPUs, and each process that trains
starts a second earlier: streaming imports transformers, for sets of texts, whose half for torch nobody needs here.
"""

import os
from pathlib import Path

WITH_CARDS = dict(os.environ)  # for processes that shall see the machine's GPUs
os.environ |= {"CUDA_VISIBLE_DEVICES": "", "USE_TORCH": "0", "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1"}
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(Path(__file__).parent / "without_cards"), *filter(None, [os.environ.get("PYTHONPATH")])]
)
